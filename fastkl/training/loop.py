"""The training loop: prompts -> completions -> rewards -> scores -> RLOO update -> weights back into the generator.

`train(config)` is the whole run; `learn` takes a rollout's updates, one by default, and `update` is the whole
optimisation step. inputs.py has checked everything that can be checked cheaply before the loop begins. One policy
forward per update: its detached log-probs are the KL in the reward, its differentiable ones carry the gradient, so a
step costs two forwards and one backward per token.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from fastkl.config.defaults import lr_of
from fastkl.config.settings import TrainConfig
from fastkl.distributed.gradients import add_up_gradients
from fastkl.distributed.start import launched
from fastkl.distributed.world import ALONE, World
from fastkl.errors import UserError
from fastkl.objective.rloo import BatchObjective, Objective, whole_step
from fastkl.report.step_metrics import StepReport
from fastkl.rollout.agreement import check_agreement
from fastkl.scoring.pack import pack, scorable_groups
from fastkl.scoring.pieces import whole
from fastkl.scoring.scored_model import ScoredModel
from fastkl.training.draw import draw_batch
from fastkl.training.first_forward import first_forward, settled_for_updates, with_advantages
from fastkl.training.given import Reward, taken
from fastkl.training.minibatches import joined, minibatches
from fastkl.training.schedule import learning_rate, set_learning_rate
from fastkl.training.setup import set_up
from fastkl.training.signals import StopRequest, stop_request
from fastkl.training.state import Run, StepLimits, TrainResult
from fastkl.training.stopwatch import Stopwatch
from fastkl.types import RolloutBatch, StepOutcome

MAX_SKIPPED_IN_A_ROW = 3


class Diverged(RuntimeError):
    """Loss or gradient was not finite for MAX_SKIPPED_IN_A_ROW steps in a row."""


def train(
    config: TrainConfig | None = None,
    *,
    reward: Reward | Sequence[Reward] | None = None,
    prompts: Any = None,
    model: Any = None,
    tokenizer: Any = None,
    callbacks: Iterable[object] = (),
) -> TrainResult:
    """Runs the training that `config` describes; the files of the run are in its `output`.

    What is given besides takes the place of the setting of that name:

    reward: a function, a name, or a list of these. prompts: an address, or rows (texts, lists of messages, columns by
    name) as a list or a data set. model: a folder, a hub id, or a model of transformers in float32, which is trained in
    place; the reference is a copy of it as it is now. tokenizer: that of such a model, where its folder has none.
    callbacks: objects with some of on_step_end, on_checkpoint, on_eval (callbacks.py).

    Raises UserError for a user's mistake before anything expensive starts, Diverged and StaleEngineError for a run that
    had to stop, with its state saved.
    """
    world = launched()
    with world.together():
        if world.size > 1 and not isinstance(model, str | os.PathLike | None):
            raise UserError("model: one in memory is trained by one process; give its folder to several.")
        config, given = taken(config or TrainConfig(), reward, prompts, model, tokenizer)
    return run_steps(set_up(config, callbacks=callbacks, given=given))


def run_steps(run: Run) -> TrainResult:
    """The loop over the steps that are left of a run that has been set up."""
    config, skipped_in_a_row = run.config, 0
    with (
        run.log,
        run.view,
        closing(run.generator),
        closing(run),
        stop_request(run.view.note) as stop,
        saved_on_failure(run),
        run.world.together(),
        updates_whole(run, stop),
    ):
        run.evaluate(0)
        for step in range(run.completed.step + 1, config.steps + 1):
            watch = Stopwatch(run.device)
            drawn = draw_batch(run, step, watch)
            batch, rewards = drawn.batch, drawn.rewards
            with watch("generate"):
                run.generator.rest()
            set_learning_rate(run.optimizer, learning_rate(step, config))
            objective, limits = run.objective.at(run.controller.coef), run.limits_for(batch)
            outcome = learn(
                run.policy, run.reference, run.optimizer, batch, objective, limits, watch, step=step, world=run.world
            )
            with watch("generate"):
                run.wait_for_rollout()
            run.commit(step, batch, drawn.num_tokens, outcome)
            with watch("sync"):
                run.sync(batch, step)
            run.evaluate(step)
            skipped_in_a_row = 0 if outcome.applied else skipped_in_a_row + 1
            report = StepReport(
                step,
                batch,
                rewards.by_function,
                objective.penalty.coef,
                outcome,
                rewards.notes,
                drawn.redraws,
                run.reference is not None,
                objective.penalty.direction,
                run.canary,
            )
            run.record(report, watch)
            stop.release()
            if skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
                raise Diverged(diagnosis(config, step))
            if run.world.any(stop.requested):
                return run.finish(stopped=step < config.steps)
            if config.save_every and step % config.save_every == 0:
                run.save()
        return run.finish()


def learn(
    policy: ScoredModel,
    reference: ScoredModel | None,
    optimizer: torch.optim.Optimizer,
    batch: RolloutBatch,
    objective: Objective,
    limits: StepLimits,
    watch: Stopwatch,
    *,
    step: int,
    world: World = ALONE,
) -> StepOutcome:
    """The updates of one rollout: one, or several after a forward under the policy that sampled it (reuse.py).

    Raises as `update`, before the first of them.
    """
    if not objective.reuse.repeats:
        return update(policy, reference, optimizer, batch, objective, limits, watch, step=step, world=world)
    first = first_forward(policy, reference, batch, objective, limits.micro_batch_tokens, watch, world=world)
    if not first.total.num_tokens:
        return StepOutcome(first.total)
    check_agreement(first.total.mean_gap, first.total.gap_max, limits.agreement_nats, step)
    batch, moved_on = settled_for_updates(batch, objective, first), replace(limits, agreement_nats=math.inf)
    return joined(
        first.total,
        [
            update(policy, reference, optimizer, part, objective, moved_on, watch, step=step, world=world)
            for part in minibatches(batch, objective)
        ],
    )


def update(
    policy: ScoredModel,
    reference: ScoredModel | None,
    optimizer: torch.optim.Optimizer,
    batch: RolloutBatch,
    objective: Objective,
    limits: StepLimits,
    watch: Stopwatch,
    *,
    step: int,
    world: World = ALONE,
) -> StepOutcome:
    """One optimizer step on one batch; not applied where loss or gradient is not finite.

    reference: None where the objective asks for no KL (--no-reference).

    Raises StaleEngineError when generator and trainer disagree about the sampled tokens' log-probs.
    """
    groups = scorable_groups(batch.valid, objective.advantage.min_samples)
    normalizer = objective.normalizer(batch, groups)  # of the whole step: micro-batches add up to it
    batch = with_advantages(policy, reference, batch, objective, limits.micro_batch_tokens, watch, world)
    parts = []
    with policy.scoring(), reference.scoring() if reference else nullcontext():
        once, equally = policy.layout == "shared", policy.is_sharded
        for members, micro in pack(
            batch,
            groups,
            limits.micro_batch_tokens,
            policy.device,
            once=once,
            cut=True,
            world=world,
            equally=equally,
        ):
            with watch("score"), torch.no_grad():
                ref_hidden = reference.hidden(micro) if reference else None
            with watch("update"):
                part = BatchObjective(objective, micro, normalizer)
                loss, scores = policy(
                    micro,
                    ref_hidden,
                    sampling=objective.sampling,
                    coefficients=part,
                    row_splits=part.row_splits,
                    outputs=objective.penalty.outputs,
                )
                loss.backward()
            parts += [(members, part.breakdown(scores, loss))] if members else []
    with watch("update"):  # the others' micro-batches are waited for
        total = whole_step(batch.valid.shape, world.gathered(parts))
    if not total.num_tokens:
        return StepOutcome(total)  # no group had an advantage: nothing to learn from, and no error
    check_agreement(total.mean_gap, total.gap_max, limits.agreement_nats, step)
    with watch("update"):
        add_up_gradients(policy.parameters(), world)
        grad_norm = clip_gradients(policy, limits.max_grad_norm)
        finite = math.isfinite(total.loss) and math.isfinite(grad_norm)
        if finite:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return StepOutcome(total, grad_norm, applied=finite)


def clip_gradients(policy: torch.nn.Module, max_norm: float) -> float:
    """Scales the gradients down to the global norm `max_norm` (0: leaves them); returns the norm before, taken in
    float32."""
    norms = [torch.linalg.vector_norm(p.grad, dtype=_norm_dtype(p)) for p in policy.parameters() if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    torch.nn.utils.clip_grads_with_norm_(policy.parameters(), max_norm or math.inf, norm)
    return float(whole(norm))


def _norm_dtype(parameter: torch.Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)


@contextmanager
def updates_whole(run: Run, stop: StopRequest) -> Iterator[None]:
    """From the optimizer's step until the step is logged nothing is interrupted; until its commit nothing is saved."""

    def begin(*_: Any) -> None:
        stop.hold()
        run.between_steps = True

    hook = run.optimizer.register_step_pre_hook(begin)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def saved_on_failure(run: Run) -> Iterator[None]:
    """Whatever ends the loop (a failing reward, a stale engine, divergence), the completed steps are saved."""
    try:
        yield
    except BaseException:
        run.save()
        run.say_what_is_left()
        raise


def diagnosis(config: TrainConfig, step: int) -> str:
    """What to try after divergence."""
    remedies = [f"a smaller --lr (now {lr_of(config):g})"]
    if not config.max_grad_norm:
        remedies.append("--max-grad-norm 1 (gradients are not clipped now)")
    if config.kl_coef == 0:
        remedies.append("--kl-coef above 0 (without it nothing holds the policy near the reference)")
    if config.dtype != "float32":
        remedies.append("--dtype float32")
    return (
        f"steps {step - MAX_SKIPPED_IN_A_ROW + 1} to {step}: loss or gradient was not finite. Their updates were "
        f"skipped, and the run has stopped with its state saved. Try {', '.join(remedies)}."
    )
