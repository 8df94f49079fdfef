"""Set-up: from a TrainConfig to a Run that is ready for its first step.

The order is that of cost: the inputs are checked before a weight is read, the models before an engine starts. Every
user's mistake ends in one UserError.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from fastkl.config.defaults import lr_of, lr_warnings, resolved
from fastkl.config.held_out import best_by
from fastkl.config.settings import TrainConfig, advantage_of, penalty_of, reuse_of
from fastkl.data.prompts import PromptSource
from fastkl.distributed.start import launched
from fastkl.distributed.world import ALONE, World
from fastkl.objective.kl_control import KlController
from fastkl.objective.rloo import Objective
from fastkl.report.loggers import RunLog
from fastkl.report.silent import log_of, view_of
from fastkl.report.terminal import View
from fastkl.rewards.load import prepare_rewards
from fastkl.rollout.agreement import AGREEMENT_NATS
from fastkl.rollout.ahead import Ahead
from fastkl.rollout.generator import GENERATORS, Generator
from fastkl.rollout.requests import EngineOptions
from fastkl.sampling.params import Sampling
from fastkl.scoring.memory import micro_batch_tokens
from fastkl.scoring.scored_model import ScoredModel
from fastkl.scoring.shard import gathered
from fastkl.scoring.source import snapshot
from fastkl.training.best import Best
from fastkl.training.callbacks import check_callbacks, speaking
from fastkl.training.environment import record_environment
from fastkl.training.fork import begin, copy_lines
from fastkl.training.given import Given
from fastkl.training.inputs import Inputs, check_inputs, closed_on_failure, max_sequence_tokens
from fastkl.training.memory_plan import (
    MemoryPlan,
    num_adapter_parameters,
    num_in_head,
    num_in_matrices,
    num_parameters,
    plan_of,
)
from fastkl.training.places import check_storage, compute_dtype, is_apart, keep_freed_memory, reference_place
from fastkl.training.ready_models import compile_layers, ready_models, store_frozen
from fastkl.training.resume import fingerprints, resume
from fastkl.training.sharding import settled_shard
from fastkl.training.small_adamw import SmallAdamW
from fastkl.training.state import Run, StepLimits

CPU = torch.device("cpu")


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
    compile_layers(config, inputs, scored, referred, view)
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
            engine_weights=config.engine_weights,
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


def optimizer_of(config: TrainConfig, policy: nn.Module) -> torch.optim.Optimizer:
    """torch's AdamW, or the one in little memory where the settings ask for what torch's does not do."""
    trained = [p for p in policy.parameters() if p.requires_grad]
    lr, decay = lr_of(config), config.weight_decay
    home = CPU if "optimizer" in config.offload else None
    if (config.optimizer, config.param_dtype, home) == ("adamw", "float32", None):
        return torch.optim.AdamW(trained, lr=lr, weight_decay=decay, fused=True)
    eight_bit = config.optimizer == "adamw8bit"
    return SmallAdamW(trained, lr=lr, weight_decay=decay, eight_bit=eight_bit, home=home, seed=config.seed)


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
