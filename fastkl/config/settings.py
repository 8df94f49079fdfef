"""Every setting of a training run in one frozen dataclass: the names of `fastkl train --help` and of config.yaml.

A field holds everything about its setting: type, default, the choices or the range of its values, and, in the string
below it, its help. The command line's options, the reader and the writer of config.yaml, docs/settings.md and the first
half of `check_config` are made from the fields. The sampling parameters are inherited, since generator and scorer have
them, too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Literal

from fastkl.config.held_out import check_evaluation, samples_of
from fastkl.config.setting import Registry, Setting, Unset, table_of
from fastkl.data.prompts import template_kwargs
from fastkl.errors import UserError
from fastkl.objective.advantages import ADVANTAGES, Advantage, find_advantage, scaled
from fastkl.objective.kl_estimators import ESTIMATORS, NO_REFERENCE, Penalty, check_penalty
from fastkl.objective.loss_levels import LOSS_LEVELS
from fastkl.objective.reuse import Reuse, check_reuse
from fastkl.objective.stale import check_stale
from fastkl.rollout.generator import GENERATORS
from fastkl.sampling.params import (
    AT_LEAST_0,
    AT_LEAST_1,
    SEEDS,
    SHARE,
    Heading,
    Range,
    Sampling,
    SamplingSettings,
)

NO_REWARD = ("none",)
ZERO_OR_ONE = Range("0 or 1", lambda x: x in (0, 1))


@dataclass(frozen=True, slots=True)
class TrainConfig(SamplingSettings):
    """Settings of one training run. The defaults are the embedded main job: a story model learns to alliterate."""

    model: Annotated[str, Heading("What is trained, on what, for what")] = "storyteller"
    """Policy and reference: "storyteller" (embedded), a local folder, or a hub id; safetensors, no remote code."""
    revision: str = ""
    """Branch, tag or commit of a hub id, for model and tokenizer; empty is the newest."""
    prompts: str = "Once upon a time"
    """One prompt as text, or a file (.jsonl, .json, .parquet, .csv), data set folder or hub id with a column of texts
    or chat messages; "text:" or "hub:" in front says which is meant. "hub:ID?config=main&split=train", "FOLDER?split=
    test". "gym:chain_sum?size=2000&max_terms=2": questions of reasoning-gym (one user message where the tokenizer has a
    chat template), for the reward gym."""
    prompt_column: str = "prompt"
    """The column of the prompts. Where there is no "prompt", "messages" is taken: conversations, of which the
    assistant's last message is left out (in another column it is continued)."""
    system_prompt: str = ""
    """The system message that every prompt begins with, unless it has one of its own; a text becomes the user message
    after it. Empty for none."""
    chat_template_kwargs: tuple[str, ...] = ()
    """Keywords for the chat template, KEY=VALUE, such as enable_thinking=false; a row's own column
    `chat_template_kwargs` wins."""
    long_prompts: Literal["error", "drop"] = "error"
    """Prompts that leave no room for max_new_tokens in the model's context: "error" refuses the run, "drop" leaves them
    out and says how many."""
    shuffle: bool = True
    """Prompts in a new random order in every epoch (the default); --no-shuffle keeps their own order in every epoch."""
    reward: tuple[str, ...] = ("alliteration",)
    """Reward functions: a built-in name (alliteration, starts_with_a, gym), one with its options (regex?pattern=TEXT,
    length?target=N, soft_overlong?max_tokens=N&cache=N, math_verify?answer=COLUMN), a server (http://HOST:PORT/PATH),
    a reward model (model:ID_OR_FOLDER), package.module:function, or file.py:function. none: no reward,
    for a run that only learns from its reference."""
    reward_weights: tuple[float, ...] = ()
    """One weight per reward function; none weighs each 1."""
    reward_timeout: Annotated[float, AT_LEAST_0] = 600.0
    """Seconds that a reward function may take for a step's completions; a later one ends the run, with its completed
    steps saved. 0 waits as long as it takes."""

    kl_coef: Annotated[float, Heading("The objective"), AT_LEAST_0] = 0.2
    """beta: the reward lost per nat of KL(policy, reference)."""
    kl_estimator: Annotated[str, Registry(ESTIMATORS, own=True, besides=("auto",))] = "auto"
    """"k1", "k1_full" (k1, and exactly what it cannot see under truncated sampling), "k2", "k3", "exact" (over the
    ids that could be sampled), "exact_full" (over all ids), or a function of yours. "auto": k1, but exact_full where
    sampling keeps ids from being drawn, since no draw shows what moves there."""
    kl_placement: Literal["auto", "reward", "loss"] = "auto"
    """"reward": taken from the reward; "loss": added to the loss; "auto": the reward, but the loss for the exact_full
    that is chosen by itself. Pairs that are biased are refused."""
    kl_direction: Literal["reverse", "forward", "jsd"] = "reverse"
    """The divergence between policy pi and reference q that is charged: "reverse" KL(pi, q), which the policy lowers by
    writing only what the reference would; "forward" KL(q, pi), by writing all of it; "jsd" (Jensen-Shannon), between
    the two. The latter two are charged exactly and in the loss, which "auto" then means."""
    kl_reduction: Literal["sum", "mean"] = "sum"
    """"sum": sequence KL; "mean": KL per token, the difference of the mean cross entropies."""
    kl_credit: Literal["completion", "caused"] = "completion"
    """"completion": all tokens share its KL; "caused": each gets only what it had a part in (less noise)."""
    kl_target: Annotated[float, AT_LEAST_0] = 0.0
    """Reverse KL of a completion, nats, that kl_coef is steered to; 0 keeps kl_coef fixed."""
    reference: str = ""
    """A teacher: another model, of any size, with the same tokenizer, in the place of the policy's own start; a local
    folder or a hub id. Empty is the policy's start."""
    reference_every: Annotated[int, AT_LEAST_0] = 0
    """Steps between renewals of the reference from the policy; 0 keeps it frozen."""
    reference_device: str = "policy"
    """Where the reference is: on the "policy"'s device, on the "cpu", or on a GPU of its own, such as "cuda:1". Its
    hidden states are sent to the policy."""
    no_reference: bool = False
    """With kl_coef 0: no second model and no second forward, and no KL is logged, charged or audited. Without it the KL
    is measured at a coefficient of 0, too."""
    reference_share: Annotated[float, SHARE] = 1.0
    """The policy's share in a renewed reference: 1 copies; with reference_every 1, below 1 is a moving average."""
    advantage: Annotated[str, Registry(ADVANTAGES, own=True)] = "rloo"
    """What a reward is compared with: "rloo" (mean of the prompt's other samples), "dr_grpo" (mean of all of them),
    "grpo" (the same, in units of their spread), "reinforce_pp" (mean and spread of the whole step), "none" (plain
    REINFORCE), or a function of yours."""
    advantage_scale: Literal["none", "group", "batch"] = "none"
    """What the advantage is divided by: "none", the spread of the rewards in its "group", or in the whole "batch" of
    the step. A spread changes what is optimised."""
    reward_clip: tuple[float, ...] = ()
    """LOW HIGH: rewards below and above are cut to these, before the KL is taken off; none does not clip."""
    loss_level: Annotated[str, Registry(LOSS_LEVELS)] = "sum"
    """What the loss of a step's tokens is averaged over: "sum" (completions), "mean" (each completion's mean over its
    tokens, then completions: GRPO), "token" (all tokens: DAPO), "max_length" ("sum" over max_new_tokens: Dr. GRPO)."""
    entropy_coef: Annotated[float, AT_LEAST_0] = 0.0
    """Reward per nat of entropy, summed over a completion's tokens, in the loss; 0 for none."""
    truncated: Literal["keep", "drop"] = "keep"
    """Completions cut at max_new_tokens: "keep" scores them whole, "drop" takes them out of their group."""
    importance: Literal["none", "token", "sequence"] = "none"
    """Weights for a generator that differs from the trainer: "none", "token", "sequence"."""
    importance_cap: Annotated[float, AT_LEAST_1] = 2.0
    """Largest importance weight; larger ones are cut to it."""

    updates_per_rollout: Annotated[int, AT_LEAST_1] = 1
    """M: a rollout is cut into M minibatches of whole prompt groups, with an update for each. Above 1, clip or
    importance sequence must correct for the policy that has moved on."""
    epochs: Annotated[int, AT_LEAST_1] = 1
    """Times that a rollout's minibatches are passed over; above 1 needs clip."""
    clip: tuple[float, ...] = ()
    """LOW HIGH: PPO's clipping of the ratio to the policy that sampled, to 1 - LOW and 1 + HIGH; none does not clip."""
    clip_level: Literal["token", "sequence"] = "token"
    """The ratio is each "token"'s, or the geometric mean over its completion, "sequence" (GSPO)."""
    old_logprobs: Literal["trainer", "engine"] = "trainer"
    """Whose log-probs the clipped ratio is to: the "trainer"'s before the first update, or those that the "engine"
    recorded."""

    prompts_per_step: Annotated[int, Heading("Sampling"), AT_LEAST_1] = 8
    """B, prompts drawn for each step (a single prompt is repeated)."""
    num_samples: Annotated[int, AT_LEAST_1] = 16
    """K, completions per prompt."""
    rollout_ahead: Annotated[int, ZERO_OR_ONE] = 0
    """1: the completions of the next step are drawn while this one trains, so that those of every step but the first
    come from the weights before its last update; importance must correct for that. 0: each step draws its own."""
    dynamic_sampling: Annotated[int, AT_LEAST_0] = 0
    """Times that a prompt whose samples all got the same reward is replaced by the next one; 0 never. The reward's part
    of the update grows longer; the KL of such prompts is no longer charged."""
    generator: Annotated[str, Registry(GENERATORS, besides=("auto",))] = "auto"
    """"vllm", "transformers", or "auto": vLLM where it can run the model. "server": the engines, if there are any."""
    engines: tuple[str, ...] = ()
    """Addresses of servers that `fastkl serve` has started, such as http://127.0.0.1:8001; they draw the completions.
    None: the engine is in this process."""
    engine_weights: Literal["auto", "network", "folder"] = "auto"
    """How new weights reach the servers: over the "network" (NCCL between GPUs, gloo otherwise), or through a "folder"
    in `output`, which the servers must see; "auto": over the network where all servers take them so."""
    gpu_memory_utilization: Annotated[float, SHARE] = 0.3
    """Share of the GPU's memory that vLLM may take; ignored without a GPU."""
    engine_sleep: bool = False
    """vLLM gives its GPU memory to the trainer between sampling and the next push of weights; its share may then be
    larger. With a GPU only."""
    engine_tp: Annotated[int, AT_LEAST_1] = 1
    """Of several processes (--nproc, torchrun): how many neighbours share one vLLM engine, each with a part of every
    matrix (tensor parallelism), for a model that one GPU does not hold beside the training; 1: each has its own."""

    lora_rank: Annotated[int, Heading("Adapters"), AT_LEAST_0] = 0
    """Rank of LoRA adapters, which are then all that is trained; the reference is the same model with them off. 0
    trains every weight."""
    lora_alpha: Annotated[float, AT_LEAST_0] = 32.0
    """Their scale is lora_alpha / lora_rank."""
    lora_targets: tuple[str, ...] = ("all-linear",)
    """The layers that carry adapters, by the ends of their names (q_proj v_proj); "all-linear": every matrix but the
    head."""
    qlora: bool = False
    """With adapters: the frozen matrices in 4 bits (NF4 of bitsandbytes, which has to be installed), half a byte per
    number instead of 2; reference and engine have the rounded weights, too. With a GPU only."""

    steps: Annotated[int, Heading("Optimisation"), AT_LEAST_1] = 40
    """Rollouts; each has one optimizer step, or updates_per_rollout times epochs."""
    lr: Annotated[float | None, AT_LEAST_0, Unset("auto")] = None
    """Peak learning rate of AdamW; auto: 1e-3 for the small embedded model, 1e-6 for any other (1e-5 with
    adapters)."""
    warmup_steps: Annotated[int, AT_LEAST_0] = 2
    """Linear warm-up from 0."""
    lr_decay: Literal["linear", "cosine", "constant"] = "linear"
    """"linear" to zero at the last step, "cosine", or "constant"."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """"adamw8bit": AdamW whose moments have 8 bits, 2 bytes per parameter instead of 8, rounded at random. Slower on a
    CPU."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """"bfloat16": the policy's matrices and their gradients take 2 bytes a number instead of 4; updates are rounded at
    random. Embeddings, norms and the head stay float32."""
    offload: tuple[Literal["optimizer", "reference"], ...] = ()
    """What waits in the host's memory, with a GPU only: "optimizer", the moments between steps; "reference", the
    reference whenever it does not score (while the engine generates, too)."""
    weight_decay: Annotated[float, AT_LEAST_0] = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: Annotated[float, AT_LEAST_0] = 1.0
    """Gradients are scaled down to this global norm; 0 does not clip."""
    micro_batch_tokens: Annotated[int, AT_LEAST_0] = 0
    """Packed tokens per forward and backward; the result does not depend on it. A larger prompt group is cut between
    samples, at one more forward of both models where the KL is in the reward. 0: as many as activations of 2 GiB (on a
    GPU an eighth of its memory) hold, at most 4,096 (on a GPU 16,384)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward: less memory, one more forward."""
    compile: bool = False
    """Run the layers through torch.compile, which fuses their norms, rotary embeddings and gates: less than half the
    kernels. For a GPU, where it has not been measured yet; a CPU wins nothing. The start takes half a minute to some
    minutes longer; layers that differ from uncompiled ones are refused."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute type over float32 weights: "float32", "bfloat16", or "auto": bfloat16 where the machine is fast at it."""
    shard: Literal["auto", "none", "full", "hybrid"] = "auto"
    """Of several processes (--nproc, torchrun): "none" gives each all weights, "full" a piece of every weight, gradient
    and moment, gathered layer by layer; "hybrid" has all pieces on each machine. "auto": none where the run fits each
    GPU by the line that it prints of its memory, else full."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """"cpu", "cuda", or "auto"."""

    eval_prompts: Annotated[str, Heading("Held-out evaluation")] = ""
    """Prompts that are not trained on, as in prompts, or a share of these, such as 0.1, chosen by a hash of each."""
    eval_every: Annotated[int, AT_LEAST_0] = 10
    """Steps between evaluations; besides, there is one before the first step and one after the last. 0: these two."""
    eval_samples: Annotated[int, AT_LEAST_1] = 4
    """Completions of each held-out prompt."""
    eval_temperature: Annotated[float | None, AT_LEAST_0] = None
    """Their temperature; none is the training's, 0 takes the likeliest token (and one completion of each prompt)."""
    eval_reward: tuple[str, ...] = ()
    """Their reward functions, as in reward; none: those of the training."""
    eval_pass: float = 0.99
    """A reward of at least this much is a pass."""
    eval_text: str = ""
    """A text file: its loss in nats per token shows whether the model still writes as it did."""
    best: str = ""
    """The measure by which checkpoints/best is kept, such as eval/pass@1; for losses less is better, "min:" or "max:"
    in front says otherwise."""

    output: Annotated[str, Heading("The run")] = "auto"
    """Run folder: config.yaml, metrics.jsonl, samples.jsonl, tensorboard/, checkpoints/, report.html. auto:
    runs/MODEL-REWARD, runs/alliteration for the embedded job."""
    seed: Annotated[int, SEEDS] = 0
    """All randomness derives from it."""
    save_every: Annotated[int, AT_LEAST_0] = 10
    """Steps between checkpoints (one more at the end); 0 saves only at the end."""
    keep_checkpoints: Annotated[int, AT_LEAST_0] = 2
    """Newest checkpoints kept; 0 keeps all."""
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    """"tensorboard", "wandb", "trackio"; none for files only."""
    sample_every: Annotated[int, AT_LEAST_0] = 5
    """Steps between completions shown in the terminal."""
    fork: str = ""
    """Begin where another run's checkpoint ended, RUN:STEP or RUN (its newest), with any settings changed."""
    resume: bool = False
    """Continue the run in `output` from its newest checkpoint."""


@cache
def settings() -> dict[str, Setting]:
    """Every setting by its name, in the order of help pages and files."""
    return table_of(TrainConfig)


def check_config(config: TrainConfig) -> None:
    """Raises UserError for the first setting that is wrong whatever the model, the files and the machine are."""
    for name, setting in settings().items():
        setting.check(getattr(config, name))
    check_combinations(config)
    template_kwargs(config.chat_template_kwargs)
    penalty, advantage = penalty_of(config), advantage_of(config)
    check_penalty(penalty, advantage, config.loss_level)
    sampling = Sampling.of(config, ())
    check_reuse(reuse_of(config), penalty, advantage, config.importance, sampling, config.prompts_per_step)
    if config.rollout_ahead:
        check_ahead(config)
        check_stale(penalty, config.importance, reuse_of(config), sampling)


def check_combinations(config: TrainConfig) -> None:
    """Settings that are valid one by one but not together."""
    for name in ("model", "prompts", "prompt_column", "output"):
        if not getattr(config, name).strip():
            raise UserError(f"{name}: is empty; `fastkl train --help` says what it takes.")
    if config.reward in ((), NO_REWARD) and not config.reference:
        raise UserError(
            "reward: names no function; give a built-in name, package.module:function or file.py:function, or a "
            "teacher to learn from without one (--reference)."
        )
    if not all(name.strip() for name in config.reward):
        raise UserError("reward: names no function; give a built-in name, package.module:function or file.py:function.")
    for name in ("reference_every", "no_reference") if config.reference else ():
        if getattr(config, name):
            raise UserError(f"{name}: the reference is the teacher {config.reference!r}, which stays; leave it out.")
    if config.reward_weights and len(config.reward_weights) != len(config.reward):
        raise UserError(
            f"reward_weights: {len(config.reward_weights)} weights for {len(config.reward)} reward functions; give "
            "one for each."
        )
    check_advantage(config)
    check_engines(config)
    if config.min_tokens > config.max_new_tokens:
        raise UserError(
            f"min_tokens: {config.min_tokens} is more than max_new_tokens ({config.max_new_tokens}); lower it."
        )
    if config.lora_rank and config.reference_every:
        raise UserError(
            "reference_every: the reference of a run with adapters is the model without them, which never changes; "
            "leave it at 0, or train without lora_rank."
        )
    if config.lora_rank and not config.lora_targets:
        raise UserError("lora_targets: names no layer; give all-linear or the ends of layers' names.")
    if config.qlora and not config.lora_rank:
        raise UserError("qlora: weights of 4 bits cannot be trained themselves; add --lora-rank 16.")
    if config.qlora and config.compile:
        raise UserError("compile: True is not known to work with the 4 bits of qlora; leave one of them out.")
    if config.lora_rank and config.param_dtype == "bfloat16":
        raise UserError("param_dtype: adapters are small and stay in float32; leave it at float32 with lora_rank.")
    if config.shard in ("full", "hybrid"):
        check_sharded(config)
    check_reference_place(config)
    if "" in config.stop:
        raise UserError("stop: an empty text would end every completion at its first token; leave it out.")
    for name in ("kl_coef", "reference_every") if config.no_reference else ():
        if value := getattr(config, name):
            raise UserError(
                f"{name}: {value:g} needs the reference that no_reference leaves out; set {name} to 0, or keep the "
                "reference."
            )
    if config.kl_target and not config.kl_coef:
        raise UserError("kl_coef: 0 cannot be steered to kl_target; start from a value above 0.")
    if config.allowed_token_ids and set(config.allowed_token_ids) <= set(config.banned_token_ids):
        raise UserError("allowed_token_ids: banned_token_ids bans them all; leave one to be sampled.")
    num_samples = samples_of(config.eval_samples, config.eval_temperature)
    check_evaluation(
        config.eval_prompts, config.eval_text, config.eval_reward, num_samples, config.best, not config.no_reference
    )


def check_advantage(config: TrainConfig) -> None:
    """Rewards and what they are compared with."""
    needed = advantage_of(config).min_samples
    if config.num_samples < needed:
        raise UserError(
            f"num_samples: {config.num_samples} leaves the advantage {config.advantage} no other sample to compare "
            f"with; use {needed} or more, or --advantage none."
        )
    if config.dynamic_sampling and needed < 2:
        raise UserError(
            f"dynamic_sampling: equal rewards are a signal, too, to the advantage {config.advantage}, which does not "
            "compare a prompt's samples alone; use 0, or --advantage rloo."
        )
    if config.advantage_scale != "none" and find_advantage(config.advantage).is_scaled:
        raise UserError(
            f"advantage_scale: the advantage {config.advantage} is in units of a spread already; use none, or another "
            "advantage."
        )
    if config.reward_clip and (len(config.reward_clip) != 2 or config.reward_clip[0] >= config.reward_clip[1]):
        raise UserError(
            f"reward_clip: {' '.join(f'{x:g}' for x in config.reward_clip)} is no range; give its lower and its upper "
            "end."
        )


def check_engines(config: TrainConfig) -> None:
    """UserError for addresses that are none, and where servers and another generator are asked for."""
    if config.engines and config.generator not in ("auto", "server"):
        raise UserError(
            f"engines: servers draw the completions, and generator {config.generator} does not; leave one out."
        )
    if config.generator == "server" and not config.engines:
        raise UserError("generator: server needs the addresses of servers; give --engines http://127.0.0.1:8001 ...")
    if config.engine_weights != "auto" and not config.engines:
        raise UserError(
            f"engine_weights: {config.engine_weights} is a way to servers, and there are none; give their addresses "
            "with --engines, or leave it out."
        )
    for url in config.engines:
        if not re.fullmatch(r"https?://[^/@\s?#]+/?", url):
            raise UserError(f"engines: {url!r} is no address of a server; write http://HOST:PORT.")
    if len({url.rstrip("/") for url in config.engines}) < len(config.engines):
        raise UserError("engines: a server is named twice; name each once.")


def check_ahead(config: TrainConfig) -> None:
    """UserError for what asks something of the generator while it draws ahead."""
    if config.dynamic_sampling:
        raise UserError(
            f"dynamic_sampling: {config.dynamic_sampling} draws other prompts once the rewards are known, when the "
            "generator is drawing the next step (rollout_ahead); leave one of them out."
        )
    if config.engine_sleep:
        raise UserError(
            "engine_sleep: with rollout_ahead the engine draws while the trainer works, and never sleeps; leave one of "
            "them out."
        )
    if config.engine_tp > 1:
        raise UserError(
            f"engine_tp: with rollout_ahead the {config.engine_tp} processes of an engine would exchange while the "
            "trainer does, in an order that may differ between them, and wait for ever; leave one of them out."
        )


def reuse_of(config: TrainConfig) -> Reuse:
    """How often a rollout is trained on."""
    return Reuse(config.updates_per_rollout, config.epochs, config.clip, config.clip_level, config.old_logprobs)


def advantage_of(config: TrainConfig) -> Advantage:
    """The advantage with its scale."""
    return scaled(find_advantage(config.advantage), config.advantage_scale)


def check_sharded(config: TrainConfig) -> None:
    """UserError for what cannot be cut."""
    if what := uncut(config):
        raise UserError(f"shard: {what}; use --shard none, or leave it out.")


def uncut(config: TrainConfig) -> str:
    """What in these settings does not go with weights in pieces, and why; empty if all does."""
    if config.qlora:
        return "qlora keeps matrices in blocks of 4 bits, which are not cut by rows"
    if "reference" in config.offload:
        return "offload reference moves a reference that is whole"
    if config.reference_device != "policy":
        return f"reference_device {config.reference_device} moves a reference that is whole"
    if config.compile:
        return "compile has layers whose weights are whole"
    return ""


def check_reference_place(config: TrainConfig) -> None:
    """UserError where there is no second model that could be elsewhere."""
    place = config.reference_device
    if not re.fullmatch(r"policy|cpu|cuda:\d+", place):
        raise UserError(f"reference_device: {place!r} is no device; use policy, cpu, or a GPU's number, as in cuda:1.")
    away = [("offload", "reference")] if "reference" in config.offload else []
    away += [("reference_device", place)] if place != "policy" else []
    if len(away) == 2:
        raise UserError(
            f"offload: a reference on the {place} (reference_device) takes no memory of the policy's GPU that could be "
            "freed; leave one of them out."
        )
    for name, value in away:
        if config.no_reference:
            raise UserError(
                f"{name}: {value} moves a reference, and no_reference leaves it out; leave one of them out."
            )
        if config.lora_rank and not config.reference:
            raise UserError(
                f"{name}: {value} moves a second model, and the reference of a run with adapters is the policy's own "
                "without them; leave it out, or name a teacher (--reference)."
            )


def penalty_of(config: TrainConfig, coef: float | None = None) -> Penalty:
    """The KL penalty's settings; `coef` where the controller has moved it."""
    beta = config.kl_coef if coef is None else coef
    if config.no_reference:
        return Penalty(beta, NO_REFERENCE, direction=config.kl_direction)
    how = estimator_and_placement(config)
    return Penalty(beta, *how, config.kl_reduction, config.kl_credit, config.kl_direction)


def estimator_and_placement(config: TrainConfig) -> tuple[str, Literal["reward", "loss"]]:
    """What "auto" means for these settings. k1 in the reward charges nothing for mass that leaves the ids that can be
    drawn; the exact KL over all ids in the loss brings it home (docs/negative-kl.md has the measurement). No other
    direction than the reverse KL is estimated from draws."""
    estimator = config.kl_estimator
    if config.kl_direction != "reverse":
        placement = "loss" if config.kl_placement == "auto" else config.kl_placement
        return "exact_full" if estimator == "auto" else estimator, placement
    unseen = estimator == "auto" and Sampling.of(config, ()).truncates
    if estimator == "auto":
        estimator = "exact_full" if unseen else "k1"
    if config.kl_placement != "auto":
        return estimator, config.kl_placement
    return estimator, "loss" if unseen and config.kl_credit == "completion" else "reward"
