"""Every setting of a training run in one frozen dataclass: the names of `fastkl train --help` and of config.yaml.

The string below a field is its help text, and the comment above a block of fields is the block's title there
(configfile.py). Below the dataclass: the checks that need the settings alone (`check_config`), and the run folder.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from fastkl.errors import UserError, nearest
from fastkl.objective.advantages import find_advantage
from fastkl.objective.kl_estimators import Penalty, check_penalty


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """Settings of one training run. The defaults are the embedded main job: a story model learns to alliterate."""

    # What is trained, on what, for what
    model: str = "storyteller"
    """Policy and reference: "storyteller" (embedded), a local folder, or a hub id; safetensors, no remote code."""
    prompts: str = "Once upon a time"
    """One prompt as text, or a file (.jsonl, .json, .parquet, .csv), data set folder or hub id with a `prompt` column
    (texts or chat messages); "text:" or "hub:" in front says which is meant."""
    reward: tuple[str, ...] = ("alliteration",)
    """Reward functions: a built-in name, package.module:function, or file.py:function."""
    reward_weights: tuple[float, ...] | None = None
    """One weight per reward function; None weighs each 1."""

    # The objective
    kl_coef: float = 0.2
    """beta: the reward lost per nat of KL(policy, reference)."""
    kl_estimator: str = "k1"
    """"k1", "k2", "k3", "exact" (over the ids that could be sampled), "exact_full" (over all ids), or
    file.py:function."""
    kl_placement: str = "reward"
    """"reward": taken from the reward; "loss": added to the loss. Pairs that are biased are refused."""
    kl_reduction: str = "sum"
    """"sum": sequence KL; "mean": KL per token, the difference of the mean cross entropies."""
    kl_credit: str = "completion"
    """"completion": all tokens share its KL; "caused": each gets only what it had a part in (less noise)."""
    kl_target: float = 0.0
    """KL of a completion, nats, that kl_coef is steered to; 0 keeps kl_coef fixed."""
    reference_every: int = 0
    """Steps between renewals of the reference from the policy; 0 keeps it frozen."""
    reference_share: float = 1.0
    """The policy's share in a renewed reference: 1 copies; with reference_every 1, below 1 is a moving average."""
    advantage: str = "rloo"
    """"rloo" (leave one out), "none" (plain REINFORCE), or file.py:function."""
    truncated: str = "keep"
    """Completions cut at max_new_tokens: "keep" scores them whole, "drop" takes them out of their group."""
    importance: str = "none"
    """Weights for a generator that differs from the trainer: "none", "token", "sequence"."""
    importance_cap: float = 2.0
    """Largest importance weight; larger ones are cut to it."""

    # Sampling
    prompts_per_step: int = 8
    """B, prompts drawn for each step (a single prompt is repeated)."""
    num_samples: int = 16
    """K, completions per prompt."""
    max_new_tokens: int = 96
    """Completions are cut at this many tokens."""
    temperature: float = 1.0
    """Sampling temperature; scores use the same."""
    top_k: int = 0
    """Keep only the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Nucleus sampling; 1 keeps all."""
    min_p: float = 0.0
    """Keep tokens with at least this fraction of the likeliest one's probability; 0 keeps all."""
    min_tokens: int = 0
    """No end-of-sequence before this many tokens."""
    banned_token_ids: tuple[int, ...] = ()
    """Token ids that are never sampled; none for no ban."""
    allowed_token_ids: tuple[int, ...] = ()
    """The only token ids that are sampled; none allows all."""
    generator: str = "auto"
    """"vllm", "transformers", or "auto": vLLM where it can run the model."""
    gpu_memory_utilization: float = 0.3
    """Share of the GPU's memory that vLLM may take; ignored without a GPU."""

    # Optimisation
    steps: int = 40
    """Optimizer steps."""
    lr: float = 1e-3
    """Peak learning rate of AdamW."""
    warmup_steps: int = 2
    """Linear warm-up from 0."""
    lr_decay: str = "linear"
    """"linear" to zero at the last step, "cosine", or "constant"."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 does not clip."""
    micro_batch_tokens: int = 0
    """Packed tokens per forward and backward; prompt groups stay whole; the result does not depend on it. 0: 16,384 on
    a GPU, 4,096 on a CPU, whose activations then fit into memory that is used again and again."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward: less memory, one more forward."""
    dtype: str = "auto"
    """Compute type over float32 weights: "float32", "bfloat16", or "auto": bfloat16 where the machine is fast at it."""
    device: str = "auto"
    """"cpu", "cuda", or "auto"."""

    # The run
    output: str = "runs/alliteration"
    """Run folder: config.yaml, metrics.jsonl, samples.jsonl, tensorboard/, checkpoints/, report.html."""
    seed: int = 0
    """All randomness derives from it."""
    save_every: int = 10
    """Steps between checkpoints (one more at the end); 0 saves only at the end."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept; 0 keeps all."""
    report_to: tuple[str, ...] = ("tensorboard",)
    """"tensorboard", "wandb", "trackio"; none for files only."""
    sample_every: int = 5
    """Steps between completions shown in the terminal."""
    resume: bool = False
    """Continue the run in `output` from its newest checkpoint."""


CHOICES: dict[str, tuple[str, ...]] = {
    "kl_placement": ("reward", "loss"),
    "kl_reduction": ("sum", "mean"),
    "kl_credit": ("completion", "caused"),
    "truncated": ("keep", "drop"),
    "importance": ("none", "token", "sequence"),
    "generator": ("auto", "vllm", "transformers"),
    "lr_decay": ("linear", "cosine", "constant"),
    "dtype": ("auto", "float32", "bfloat16"),
    "device": ("auto", "cpu", "cuda"),
    "report_to": ("tensorboard", "wandb", "trackio"),
}


AT_LEAST_ONE = ("prompts_per_step", "num_samples", "max_new_tokens", "steps")


NOT_NEGATIVE = (
    *("kl_coef", "kl_target", "reference_every", "top_k", "min_tokens", "lr", "warmup_steps", "weight_decay"),
    *("max_grad_norm", "seed", "save_every", "keep_checkpoints", "sample_every", "micro_batch_tokens"),
)


RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    **{name: (lambda x: x >= 1, "1 or more") for name in AT_LEAST_ONE},
    **{name: (lambda x: x >= 0, "0 or more") for name in NOT_NEGATIVE},
    "temperature": (lambda x: x > 0, "above 0"),
    "top_p": (lambda x: 0 < x <= 1, "above 0 and at most 1"),
    "reference_share": (lambda x: 0 < x <= 1, "above 0 and at most 1"),
    "importance_cap": (lambda x: x >= 1, "1 or more"),
    "min_p": (lambda x: 0 <= x < 1, "0 or more and below 1"),
    "gpu_memory_utilization": (lambda x: 0 < x <= 1, "above 0 and at most 1"),
}


def check_config(config: TrainConfig) -> None:
    """Raises UserError for the first setting that cannot be right, whatever the model, the files and the machine."""
    for name in ("model", "prompts", "output"):
        if not getattr(config, name).strip():
            raise UserError(f"{name}: is empty; `fastkl train --help` says what it takes.")
    for name, known in CHOICES.items():
        value = getattr(config, name)
        for item in (value,) if isinstance(value, str) else value:
            if item not in known:
                raise UserError(f"{name}: unknown {item!r}.{nearest(item, known)} Choose from {', '.join(known)}.")
    for name, (fits, wanted) in RANGES.items():
        value = getattr(config, name)
        if not (math.isfinite(value) and fits(value)):
            raise UserError(f"{name}: {value} is out of range; it must be {wanted}.")
    check_rewards(config)
    check_combinations(config)
    check_penalty(penalty_of(config))


def check_rewards(config: TrainConfig) -> None:
    """At least one reward function, and one finite weight for each."""
    if not config.reward or not all(name.strip() for name in config.reward):
        raise UserError("reward: names no function; give a built-in name, package.module:function or file.py:function.")
    weights = config.reward_weights
    if weights is not None and len(weights) != len(config.reward):
        raise UserError(
            f"reward_weights: {len(weights)} weights for {len(config.reward)} reward functions; give one for each."
        )
    if weights is not None and not all(map(math.isfinite, weights)):
        raise UserError(f"reward_weights: {weights} holds a value that is not finite; give numbers.")


def check_combinations(config: TrainConfig) -> None:
    """Settings that are right alone and wrong together."""
    needed = find_advantage(config.advantage).min_samples
    if config.num_samples < needed:
        raise UserError(
            f"num_samples: {config.num_samples} leaves the advantage {config.advantage} no other sample to compare "
            f"with; use {needed} or more, or --advantage none."
        )
    if config.min_tokens > config.max_new_tokens:
        raise UserError(
            f"min_tokens: {config.min_tokens} is more than max_new_tokens ({config.max_new_tokens}); lower it."
        )
    if config.kl_target and not config.kl_coef:
        raise UserError("kl_coef: 0 cannot be steered to kl_target; start from a value above 0.")
    for name in ("banned_token_ids", "allowed_token_ids"):
        if any(i < 0 for i in getattr(config, name)):
            raise UserError(f"{name}: {getattr(config, name)} holds a negative id; token ids start at 0.")
    if config.allowed_token_ids and set(config.allowed_token_ids) <= set(config.banned_token_ids):
        raise UserError("allowed_token_ids: banned_token_ids bans them all; leave one to be sampled.")


def penalty_of(config: TrainConfig, coef: float | None = None) -> Penalty:
    """The KL penalty's settings; `coef` where the controller has moved it."""
    beta = config.kl_coef if coef is None else coef
    return Penalty(beta, config.kl_estimator, config.kl_placement, config.kl_reduction, config.kl_credit)
