"""Set-up: from a TrainConfig to a Run that is ready for its first step.

The order is that of cost: settings, rewards, tokenizer, prompts, generator's ability and folder are checked before a
weight is read, and the models are checked before an engine starts. Every user's mistake ends in one UserError.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import importlib.util
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import nn

from fastkl.config.defaults import lr_of, lr_warnings, resolved
from fastkl.config.held_out import best_by
from fastkl.config.settings import TrainConfig, advantage_of, check_config, penalty_of, reuse_of
from fastkl.data.prompts import PromptSource
from fastkl.distributed.start import launched
from fastkl.distributed.world import ALONE, World
from fastkl.errors import UserError
from fastkl.evaluation.evaluate import Evaluator
from fastkl.evaluation.plan import eval_rewards, evaluator_of, prompts_of, split, text_windows
from fastkl.objective.kl_control import KlController
from fastkl.objective.rloo import Objective
from fastkl.report.loggers import RunLog, check_report_to
from fastkl.report.metrics import taken_reward_names
from fastkl.report.silent import log_of, view_of
from fastkl.report.terminal import View
from fastkl.rewards.call import check_columns
from fastkl.rewards.load import RewardFunction, load_rewards, prepare_rewards
from fastkl.rollout.agreement import AGREEMENT_NATS
from fastkl.rollout.ahead import Ahead
from fastkl.rollout.generator import GENERATORS, Generator, choose_generator
from fastkl.rollout.requests import EngineOptions
from fastkl.sampling.params import Sampling, check_ids
from fastkl.scoring import backbone, models
from fastkl.scoring.adapters import WEIGHTS, add_adapters, check_adapters, load_adapters
from fastkl.scoring.head import check_head, head_of
from fastkl.scoring.memory import micro_batch_tokens
from fastkl.scoring.pack import pack
from fastkl.scoring.placement import HeadCopy, moved, put_away
from fastkl.scoring.scored_model import ScoredModel, WithoutAdapters
from fastkl.scoring.shard import gathered, shard
from fastkl.scoring.source import resolve_model, snapshot
from fastkl.scoring.unread import META, fill, is_unread
from fastkl.training import checkpoint
from fastkl.training.best import Best
from fastkl.training.callbacks import check_callbacks, speaking
from fastkl.training.engines import check_engine_groups, check_engine_tp
from fastkl.training.environment import record_environment
from fastkl.training.fork import begin, copy_lines, forked
from fastkl.training.given import Given
from fastkl.training.memory_plan import (
    MemoryPlan,
    num_adapter_parameters,
    num_in_head,
    num_in_matrices,
    num_parameters,
    plan_of,
)
from fastkl.training.resume import fingerprints, first_numbers, resume
from fastkl.training.run_folder import has_checkpoint, lock_run_folder, prepare_run_folder
from fastkl.training.sharding import is_sharded, mesh_of, settled_shard
from fastkl.training.small_adamw import SmallAdamW, check_pieces
from fastkl.training.state import Run, StepLimits
from fastkl.training.teacher import teacher_of
from fastkl.types import Completion, PackedBatch, Prompt, RolloutBatch

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a run starts from, checked before any weight is read."""

    device: torch.device
    source: str  # folder or hub id of the reference
    model_config: Any
    tokenizer: Any
    rewards: tuple[RewardFunction, ...]
    prompts: list[Prompt]
    evaluator: Evaluator | None
    sampling: Sampling
    generator: str
    generator_reason: str
    folder: Path
    lock: TextIO | None  # held while it is open; the first process has it
    resumed: checkpoint.Checkpoint | None  # what the run continues
    is_fork: bool  # `resumed` is another run's
    given: Given  # objects in the place of what the settings name
    teacher: str = ""  # folder or hub id of a reference that is another model; empty: it is the policy's start


def check_inputs(
    config: TrainConfig,
    given: Given | None = None,
    say: Callable[[str], None] = lambda message: None,
    world: World = ALONE,
) -> Inputs:
    """Everything that a user can get wrong, in the order of cost. Raises UserError.

    given: objects in the place of what the settings name. say: shows a person what happens.
    """
    given = given or Given()
    check_config(config)
    check_engine_groups(config, world.size)
    check_report_to(config.report_to)
    check_adapters(config.lora_rank, config.lora_targets)
    device = choose_device(config.device, world)
    rewards = load_rewards(given.rewards or config.reward, config.reward_weights, taken_reward_names())
    rewards_of_held = eval_rewards(config, rewards)
    models.quiet_transformers()
    source = resolve_model(config.model, config.revision)
    model_config = models.load_config(source)
    tokenizer = given.tokenizer or models.load_tokenizer(source)
    room = room_for_prompt(config, model_config)
    teacher = ""
    if config.reference:
        teacher, teacher_config = teacher_of(config.reference, tokenizer, model_config)
        room = min(room, room_for_prompt(config, teacher_config))
    prompts = prompts_of(config, config.prompts if given.prompts is None else given.prompts, tokenizer, room, say)
    check_columns(rewards, dict.fromkeys(name for prompt in prompts for name in prompt.columns))
    prompts, held = split(config, prompts, tokenizer, room)
    text = text_windows(config, tokenizer, models.context_length(model_config))
    sampling = Sampling.of(config, models.stop_token_ids(model_config, source, tokenizer))
    check_vocabulary(models.vocabulary(model_config), [*prompts, *held], sampling)
    evaluator = evaluator_of(config, held, prompts, rewards_of_held, sampling, text)
    generator, reason = choose_generator("server" if config.engines else config.generator, model_config, device)
    check_sleep(config, generator, device)
    check_engine_tp(config.engine_tp, generator, models.text_config(model_config))
    if config.engines:
        from fastkl.rollout.server import check_servers

        check_servers(
            config.engines,
            sampling,
            vocab=models.text_config(model_config).vocab_size,
            dtype=str(compute_dtype(config.dtype, device)).removeprefix("torch."),
            max_model_len=longest_sequence((*prompts, *held), config),
        )
    lock = lock_run_folder(config) if world.is_first else None
    with closed_on_failure(lock):
        folder, resumed, is_fork = world.once(lambda: folder_of(config))
    return Inputs(
        *(device, source, model_config, tokenizer, rewards, prompts, evaluator, sampling, generator, reason, folder),
        *(lock, resumed, is_fork, given, teacher),
    )


def folder_of(config: TrainConfig) -> tuple[Path, checkpoint.Checkpoint | None, bool]:
    """The run's folder, made; the checkpoint that it goes on from, if any; whether that is another run's."""
    folder = prepare_run_folder(config)
    saved = config.resume and has_checkpoint(folder)
    resumed = checkpoint.newest_checkpoint(folder / "checkpoints") if saved else None
    fork = forked(config, folder)
    return folder, resumed or fork, fork is not None


def check_vocabulary(vocab: int | None, prompts: Iterable[Prompt], sampling: Sampling) -> None:
    """UserError for an id that the model has no embedding for, or that is never sampled since it does not exist."""
    if vocab is None:
        return
    check_ids(sampling, vocab)
    for prompt in prompts:
        if (wrong := max(prompt.token_ids, default=0)) >= vocab:
            raise UserError(
                f"prompts: row {prompt.row} has the token id {wrong}, which is not in the model's vocabulary, 0 to "
                f"{vocab - 1}; the tokenizer has tokens that the model was not resized for."
            )


def set_up(config: TrainConfig, *, callbacks: Iterable[object] = (), given: Given | None = None) -> Run:
    """Checks everything, loads everything, and resumes if asked. Raises UserError for a user's mistake.

    given: objects in the place of what the settings name.
    """
    world = launched()
    with world.together():
        checked, config = check_callbacks(callbacks), resolved(config)
        title = f"{config.model} → {', '.join(config.reward)}, β {config.kl_coef:g}"
        view = view_of(world, lambda: View(title, total_steps=config.steps))
        inputs = check_inputs(config, given, view.note, world)
        with closed_on_failure(inputs.lock):
            run = load(config, inputs, speaking(checked, world), view, world)
        world.everybodys(None)  # all of them are ready
    return run


def load(config: TrainConfig, inputs: Inputs, callbacks: tuple[object, ...], view: View, world: World = ALONE) -> Run:
    """The run that these inputs describe: models checked and loaded, generator started, state resumed."""
    resumed = inputs.resumed
    view.first_step = resumed.step + 1 if resumed else 1
    dtype = compute_dtype(config.dtype, inputs.device)
    config = prepare(config, inputs, dtype, view, world)
    scored, referred, first = ready_models(config, inputs, dtype, view, world)
    limits = limits_of(config, scored, world)
    hashes = fingerprints(config, inputs.prompts, first, inputs.evaluator, inputs.given.rewards)
    store_frozen(config, inputs, scored, referred, dtype, world)
    view.note(f"starting {inputs.generator} ...")
    generator = start_generator(inputs, config, scored, view.note, world)
    if inputs.is_fork and resumed and world.is_first:
        copy_lines(resumed, inputs.folder)
    seed_everything(config.seed + world.rank)
    run = Run(
        config=config,
        folder=inputs.folder,
        policy=scored,
        reference=referred,
        tokenizer=inputs.tokenizer,
        optimizer=optimizer_of(config, scored.model),
        prompts=PromptSource(inputs.prompts, seed=config.seed, shuffle=config.shuffle),
        rewards=inputs.rewards,
        generator=generator,
        objective=objective_of(config, inputs.sampling),
        controller=KlController(config.kl_coef, config.kl_target),
        limits=limits,
        log=log_of(world, lambda: new_log(config, inputs, view)),
        view=view,
        well_formed=storyteller_checker(config.model, inputs.model_config),
        evaluator=inputs.evaluator,
        best=Best(best_by(config.best)) if config.best else None,
        callbacks=callbacks,
        ahead=ahead_of(config, inputs, generator, view.note, world),
        world=world,
        lock=inputs.lock,
        inputs=hashes,
    )
    go_on(run, inputs, dtype)
    return run


def prepare(config: TrainConfig, inputs: Inputs, dtype: torch.dtype, view: View, world: World) -> TrainConfig:
    """What comes before the first weight: whether the memory will do, reward functions, downloads. Raises UserError.

    Returns the settings, with who holds which weights.
    """
    device = inputs.device
    if device.type == "cpu":
        keep_freed_memory()
    check_storage(config, device, dtype)
    reference_place(config, device, world)
    config = settled_shard(config, lambda settings: plan_for(settings, inputs, dtype, world), world)
    say_what_it_takes(config, inputs, dtype, view.note, world)
    view.note(f"loading {config.model} ...")
    of_held = inputs.evaluator.rewards if inputs.evaluator else ()
    prepare_rewards((*inputs.rewards, *(reward for reward in of_held if reward not in inputs.rewards)), device)
    if config.revision:
        snapshot(config.model, config.revision, weights=True)
    return config


def ready_models(
    config: TrainConfig, inputs: Inputs, dtype: torch.dtype, view: View, world: World
) -> tuple[ScoredModel, ScoredModel | None, bytes | None]:
    """Policy and reference, loaded, with the layouts that score them right, and checked to be trainable and savable;
    and the first numbers of the reference, before any of them is rounded."""
    device, shards = inputs.device, is_sharded(config)

    def settled(model: nn.Module, source: str) -> ScoredModel:
        return (
            in_pieces(config, model, source, device, dtype, view, world) if shards else ScoredModel(model, dtype=dtype)
        )

    unread = dataclasses.replace(inputs, device=META) if shards else inputs
    scored, referred, first = load_models(config, unread, settled)
    policy = scored.model
    differ = referred is not None and (bool(inputs.teacher) or referred.device != scored.device)
    start = scored if referred is None or differ else referred
    probe = probe_batch(inputs.prompts[0], device)
    layout, layout_reason = checked_layout(start, inputs, config, probe)
    scored.layout = layout
    if referred:
        referred.layout = checked_layout(referred, inputs, config, probe)[0] if differ else layout
        send_to(referred, scored.device)
    if config.param_dtype == "bfloat16" and not shards:
        models.store_as_computed(policy, dtype, trained=True)
    check_trainable(scored, probe)
    if repaired := world.once(
        lambda: checkpoint.check_savable(inputs.folder / "checkpoints", policy, inputs.tokenizer)
    ):
        view.note(repaired)
    if config.gradient_checkpointing:
        policy.gradient_checkpointing_enable()
    if world.size > 1:
        has = "a piece of every weight" if shards else "all weights"
        view.note(f"{world.size} processes, each with {has} and a share of the samples")
    view.note(f"generator: {inputs.generator} ({inputs.generator_reason})")
    view.note(f"backbone: {layout} ({layout_reason}), {str(dtype).removeprefix('torch.')} on {device.type}")
    return scored, referred, first


def in_pieces(
    config: TrainConfig, model: nn.Module, source: str, device: torch.device, dtype: torch.dtype, view: View,
    world: World,
) -> ScoredModel:  # fmt: skip
    """A loaded model of which each process keeps its pieces, in the dtypes that `ready_models` and `store_frozen` give
    to whole ones later: FSDP2 takes those that it finds."""
    is_frozen = not any(parameter.requires_grad for parameter in model.parameters())
    if not (is_frozen and config.reference_every):
        models.store_as_computed(model, dtype, trained=config.param_dtype == "bfloat16")
    found, is_empty = ScoredModel(model, dtype=dtype), is_unread(model)
    shard(found, device, mesh_of(config, world))
    if config.optimizer == "adamw8bit":
        check_pieces(model.named_parameters())
    if is_empty:
        fill(model, source, device)
    else:
        view.note(f"each process has all weights of {source} before it keeps its piece")
    return found


def store_frozen(
    config: TrainConfig,
    inputs: Inputs,
    scored: ScoredModel,
    referred: ScoredModel | None,
    dtype: torch.dtype,
    world: World,
) -> None:
    """Keeps the matrices that nobody trains in the dtype in which they are computed."""
    if config.reference_every or is_sharded(config):
        return
    for frozen in (scored, referred) if referred and inputs.teacher and config.lora_rank else (referred or scored,):
        models.store_as_computed(frozen.model, dtype)
    if referred and "reference" in config.offload:
        referred.scores_on = inputs.device
        put_away(referred.model)
    give_back_gpu_memory(inputs.device)


def new_log(config: TrainConfig, inputs: Inputs, view: View) -> RunLog:
    """The run's log, cut to the step that it goes on from."""
    return RunLog(
        inputs.folder,
        config.report_to,
        dataclasses.asdict(config),
        inputs.resumed.step if inputs.resumed else -1 if config.resume else None,
        evaluates=inputs.evaluator is not None,
        report_problem=view.note,
    )


def go_on(run: Run, inputs: Inputs, dtype: torch.dtype) -> None:
    """Notes what the run runs on, and takes over the state that it continues."""
    resumed, world = inputs.resumed, run.world
    first_step = resumed.step + 1 if resumed else 1
    world.once(lambda: record_environment(inputs.folder, first_step=first_step, device=inputs.device, dtype=dtype))
    for note in inputs.evaluator.notes if inputs.evaluator else ():
        run.view.note(note)
    if resumed:
        (begin if inputs.is_fork else resume)(run, resumed)
    elif run.config.resume:
        run.view.note("the run ended before its first checkpoint: it starts anew")


def checked_layout(scored: ScoredModel, inputs: Inputs, config: TrainConfig, probe: PackedBatch) -> tuple[str, str]:
    """How a model goes over a batch, and why; after a look at its head. UserError where it cannot be scored."""
    in_float32 = models.widened(scored.model) if scored.is_sharded else contextlib.nullcontext()
    with gathered(scored), in_float32:
        check_head(scored.model, list(inputs.prompts[0].token_ids))
        tokens = max_sequence_tokens(inputs, config)
        return backbone.choose_layout(scored.model, moved(probe, scored.device), scored.dtype, max_tokens=tokens)


def check_trainable(policy: ScoredModel, probe: PackedBatch) -> None:
    """UserError where a backward through the model fails: Reformer's wants training mode and one length only."""
    try:
        with policy.scoring():
            policy.hidden(probe).states.float().square().mean().backward()
    except Exception as failure:  # the model's own code
        raise UserError(
            f"model: {type(policy.model).__name__} cannot be trained ({models.first_line(failure)}); name another."
        ) from failure
    finally:
        policy.zero_grad(set_to_none=True)
    give_back_gpu_memory(policy.device)


def give_back_gpu_memory(device: torch.device) -> None:
    """What PyTorch keeps for later goes back to the GPU: an engine measures what is free."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def load_models(
    config: TrainConfig, inputs: Inputs, settled: Callable[[nn.Module, str], ScoredModel]
) -> tuple[ScoredModel, ScoredModel | None, bytes | None]:
    """Policy and reference: one module, whose reference is without its adapters, or two; or no reference. And the
    reference's first numbers, as it was read.

    settled: makes of each, and of where it comes from, what scores, before the next is read, so that no process holds
    two whole models where they are sharded.
    """
    resumed, source = inputs.resumed, inputs.source
    if config.lora_rank:
        policy = models.load_model(source, inputs.device, four_bit=config.qlora)
        first = None if config.no_reference or inputs.teacher else first_numbers(policy, source)
        add_adapters(policy, config.lora_rank, config.lora_alpha, config.lora_targets, config.seed)
        if resumed:
            load_adapters(resumed.folder, policy)
        scored = settled(policy, source)
        if inputs.teacher:
            return scored, *reference_of(config, inputs, settled)
        return scored, None if config.no_reference else WithoutAdapters(scored), first
    if resumed and (resumed.folder / WEIGHTS).is_file():
        raise UserError(f"lora_rank: the checkpoint {str(resumed.folder)!r} holds adapters; give the rank they have.")
    start = str(resumed.folder) if resumed else source
    if inputs.teacher:
        return settled(policy_of(inputs), start), *reference_of(config, inputs, settled)
    if config.no_reference:
        return settled(policy_of(inputs), start), None, None
    reference, first = reference_of(config, inputs, settled)
    scored = settled(policy_of(inputs), start)
    check_same_shape(scored.model, reference.model, resumed)
    return scored, reference, first


def reference_of(
    config: TrainConfig, inputs: Inputs, settled: Callable[[nn.Module, str], ScoredModel]
) -> tuple[ScoredModel, bytes]:
    """The reference as a model of its own, and its first numbers."""
    source, model = inputs.teacher or inputs.source, reference_model(config, inputs)
    first = first_numbers(model, source)
    return settled(model, source), first


def check_storage(config: TrainConfig, device: torch.device, dtype: torch.dtype) -> None:
    """UserError where weights or moments cannot be kept as the settings ask."""
    if config.param_dtype == "bfloat16" and dtype != torch.bfloat16:
        raise UserError(
            "param_dtype: bfloat16 weights take part in products of bfloat16, and those of this run are float32; add "
            "--dtype bfloat16, or leave param_dtype at float32."
        )
    if config.qlora and device.type != "cuda":
        raise UserError(f"qlora: 4 bits need a GPU, and this run is on the {device.type}; leave it out.")
    if config.qlora and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("qlora: bitsandbytes, which stores the 4 bits, is not installed; pip install bitsandbytes.")
    if config.offload and device.type != "cuda":
        raise UserError(
            f"offload: {' '.join(config.offload)} frees a GPU's memory, and this run is on the {device.type}; leave it "
            "at none."
        )


def reference_place(config: TrainConfig, device: torch.device, world: World = ALONE) -> torch.device:
    """Where the reference is; device: the policy's. UserError where there is no such device for this process."""
    place = torch.device(config.reference_device) if config.reference_device != "policy" else device
    if config.reference_device in ("policy", "cpu"):
        return place
    if world.size > 1:
        raise UserError(
            f"reference_device: {place} is one GPU, and there are {world.size} processes, each with a reference; use "
            "policy or cpu."
        )
    if place.index >= torch.cuda.device_count():
        raise UserError(
            f"reference_device: {place} is not here, since PyTorch sees {torch.cuda.device_count()} GPUs, which count "
            "from cuda:0; use policy or cpu."
        )
    return place


def check_sleep(config: TrainConfig, generator: str, device: torch.device) -> None:
    """UserError where no engine has memory of a GPU to give."""
    if not config.engine_sleep:
        return
    if device.type != "cuda":
        raise UserError(
            f"engine_sleep: vLLM gives up a GPU's memory, and this run is on the {device.type}; leave it out."
        )
    if generator != "vllm":
        raise UserError(
            f"engine_sleep: only vLLM has an engine that can sleep, and the generator is {generator}; leave it out."
        )


def is_apart(config: TrainConfig, device: torch.device) -> bool:
    """Whether the reference is on another device than the policy's, `device`."""
    place = reference_place(config, device)
    return place.type != device.type or (place.index or 0) != (device.index or 0)


def optimizer_of(config: TrainConfig, policy: nn.Module) -> torch.optim.Optimizer:
    """torch's AdamW, or the one in little memory where the settings ask for what torch's does not do."""
    trained = [p for p in policy.parameters() if p.requires_grad]
    lr, decay = lr_of(config), config.weight_decay
    home = CPU if "optimizer" in config.offload else None
    if (config.optimizer, config.param_dtype, home) == ("adamw", "float32", None):
        return torch.optim.AdamW(trained, lr=lr, weight_decay=decay, fused=True)
    eight_bit = config.optimizer == "adamw8bit"
    return SmallAdamW(trained, lr=lr, weight_decay=decay, eight_bit=eight_bit, home=home, seed=config.seed)


def reference_model(config: TrainConfig, inputs: Inputs) -> nn.Module:
    """The reference: the teacher, or the model that the policy starts from."""
    place = reference_place(config, inputs.device)
    return models.load_model(inputs.teacher or inputs.source, place).requires_grad_(False)


def send_to(reference: ScoredModel, device: torch.device) -> None:
    """Has a reference that is elsewhere send what it computes to the policy's device."""
    if reference.device != device:
        reference.head_copy = HeadCopy(device)
        reference.head_copy.of(head_of(reference.model))  # now: an engine measures what is left


def policy_of(inputs: Inputs) -> Any:
    """The model that is trained: read from the checkpoint or the start, or the caller's own module, which is trained in
    place and gets a checkpoint's weights."""
    resumed, module = inputs.resumed, inputs.given.policy
    if module is None:
        return models.load_model(str(resumed.folder) if resumed else inputs.source, inputs.device)
    device = CPU if inputs.device == META else inputs.device  # it is here, and need not be read
    module = models.without_dropout(module).to(device)
    if resumed:
        saved = models.load_model(str(resumed.folder), device)
        check_same_shape(module, saved, resumed)
        module.load_state_dict(saved.state_dict())
    return module


def plan_for(config: TrainConfig, inputs: Inputs, dtype: torch.dtype, world: World = ALONE) -> MemoryPlan | None:
    """What the run takes; None where the model's size is not known."""
    parameters = num_parameters(inputs.source)
    if not parameters:
        return None
    return plan_of(
        config,
        inputs.model_config,
        parameters,
        generator=inputs.generator,
        device=inputs.device,
        dtype=dtype,
        max_tokens=max_sequence_tokens(inputs, config),
        world=world,
        adapters=num_adapter_parameters(inputs.source, config.lora_rank) if config.lora_rank else 0,
        matrices=num_in_matrices(inputs.source),
        teacher=(inputs.teacher and num_parameters(inputs.teacher)) or 0,
        ref_head=num_in_head(inputs.teacher or inputs.source) if is_apart(config, inputs.device) else 0,
    )


def say_what_it_takes(
    config: TrainConfig, inputs: Inputs, dtype: torch.dtype, say: Callable[[str], None], world: World = ALONE
) -> None:
    """One line of memory arithmetic, and a warning where the learning rate is far above what the model's size bears."""
    if (plan := plan_for(config, inputs, dtype, world)) is None:
        return
    say(plan.line())
    for warning in () if config.lora_rank else lr_warnings(lr_of(config), num_parameters(inputs.source) or 0):
        say(warning)


@contextlib.contextmanager
def closed_on_failure(lock: TextIO | None) -> Iterator[None]:
    """A run that does not come about leaves its folder to the next one, in this process, too."""
    try:
        yield
    except BaseException:
        if lock is not None:
            lock.close()
        raise


def objective_of(config: TrainConfig, sampling: Sampling) -> Objective:
    """What the steps optimise; its coefficient is the controller's, step by step."""
    return Objective(
        penalty_of(config),
        advantage_of(config),
        sampling,
        config.importance,
        config.importance_cap,
        config.entropy_coef,
        config.loss_level,
        reuse_of(config),
    )


def limits_of(config: TrainConfig, policy: ScoredModel, world: World = ALONE) -> StepLimits:
    """What bounds an update of this policy, in every process alike."""
    return StepLimits(
        micro_batch_tokens=config.micro_batch_tokens or min(world.everybodys(micro_batch_tokens(policy))),
        max_grad_norm=config.max_grad_norm,
        agreement_nats=AGREEMENT_NATS[policy.dtype],
    )


def start_generator(
    inputs: Inputs,
    config: TrainConfig,
    policy: ScoredModel,
    note: Callable[[str], None],
    world: World = ALONE,
) -> Generator:
    """The chosen generator, running with the policy's weights."""
    return GENERATORS[inputs.generator].start(
        EngineOptions(
            source=inputs.source,
            policy=policy.model,
            tokenizer=inputs.tokenizer,
            sampling=inputs.sampling,
            dtype=policy.dtype,
            max_model_len=max_sequence_tokens(inputs, config),
            gpu_memory_utilization=config.gpu_memory_utilization,
            sleep=config.engine_sleep,
            engines=config.engines,
            log=inputs.folder / ("engine.log" if world.is_first else f"engine-{world.rank}.log"),
            world=world,
            engine_tp=config.engine_tp,
            whole=partial(gathered, policy),
            note=note,
        )
    )


def ahead_of(
    config: TrainConfig, inputs: Inputs, generator: Generator, note: Callable[[str], None], world: World
) -> Ahead | None:
    """What draws the next step's completions ahead, if that is asked for."""
    if not config.rollout_ahead:
        return None
    has_weights = GENERATORS[inputs.generator].has_weights
    if not has_weights:
        note(
            f"rollout_ahead: the generator {inputs.generator} draws with the policy's own weights, so that it draws "
            "before each update and not beside it; the samples are as old as with an engine, but no time is won"
        )
    return Ahead(generator, config.num_samples, world, beside=has_weights, device=inputs.device)


def max_sequence_tokens(inputs: Inputs, config: TrainConfig) -> int:
    """Tokens of the longest prompt, a held-out one included, with its completion."""
    return longest_sequence((*inputs.prompts, *(inputs.evaluator.prompts if inputs.evaluator else ())), config)


def longest_sequence(prompts: Iterable[Prompt], config: TrainConfig) -> int:
    """Tokens of the longest of these prompts with its completion."""
    return max(len(prompt.token_ids) for prompt in prompts) + config.max_new_tokens


def check_same_shape(policy: nn.Module, reference: nn.Module, resumed: checkpoint.Checkpoint | None) -> None:
    """A checkpoint of another model is not resumed."""
    if {n: p.shape for n, p in policy.named_parameters()} != {n: p.shape for n, p in reference.named_parameters()}:
        raise UserError(
            f"resume: the checkpoint {str(resumed.folder) if resumed else ''!r} holds another model than --model; "
            "name the model that the run was started with."
        )


def choose_device(name: str, world: World = ALONE) -> torch.device:
    """The device for policy and reference. UserError where there is none for this process."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda was asked for, but PyTorch sees no GPU; use --device cpu or auto.")
    if name == "cuda" and world.local_rank >= torch.cuda.device_count():
        raise UserError(
            f"device: process {world.rank} has no GPU of its own, since this machine has {torch.cuda.device_count()}; "
            "start one process for each GPU, or use --device cpu."
        )
    return torch.device(name, world.local_rank) if name == "cuda" and world.size > 1 else torch.device(name)


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products; "auto" is bfloat16 where the processor is fast at it."""
    if name == "auto":
        return torch.bfloat16 if models.bfloat16_is_fast(device) else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def keep_freed_memory() -> None:
    """Lets glibc keep freed tensor memory; otherwise every step takes 50,000 page faults, 2 to 5 % of its time."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3
        mallopt(trim_threshold, (1 << 31) - 1)
        mallopt(mmap_threshold, 32 << 20)  # the largest value that glibc accepts


def room_for_prompt(config: TrainConfig, model_config: Any) -> int:
    """Tokens that a prompt may have so that its completion fits the model's context. UserError if none fits."""
    context = models.context_length(model_config)
    if context is None:
        return 1 << 30
    if config.max_new_tokens >= context:
        raise UserError(
            f"max_new_tokens: {config.max_new_tokens} does not fit the model's context of {context} tokens; "
            f"use at most {context - 1}, less the longest prompt."
        )
    return context - config.max_new_tokens


def probe_batch(prompt: Prompt, device: torch.device) -> PackedBatch:
    """Three sequences of different lengths, made of the prompt's own tokens, to try a backbone layout on."""
    ids = (prompt.token_ids * 9)[: max(9, min(64, len(prompt.token_ids)))]
    completions = tuple(Completion(ids[:n], (0.0,) * n, "length", "") for n in (len(ids), 3, 5))
    batch = RolloutBatch((prompt,), (completions,), torch.zeros(1, 3), torch.ones(1, 3, dtype=torch.bool), 0)
    short = dataclasses.replace(batch, prompts=(dataclasses.replace(prompt, token_ids=prompt.token_ids[:64]),))
    return pack(short, [0], 1 << 30, device)[0][1]


def storyteller_checker(name: str, model_config: Any) -> Callable[[list[str]], float] | None:
    """The share of well-formed sentences, where the model speaks the storyteller's language."""
    if name != "storyteller" and not getattr(model_config, "storyteller", False):
        return None
    from fastkl.storyteller import well_formed_share

    return well_formed_share


def seed_everything(seed: int) -> None:
    """Seeds the global generators, for reward functions that draw from them; nothing here does."""
    import random

    import numpy as np

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
