"""Run: everything that a training run holds while it lives, and what it does at the end of a step and of the run."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import nn

from fastkl.audit.alarm import KlAlarm
from fastkl.config.settings import TrainConfig
from fastkl.data.prompts import PromptSource
from fastkl.distributed.world import ALONE, World
from fastkl.evaluation.evaluate import Evaluator, evaluate
from fastkl.evaluation.plan import due
from fastkl.objective.kl_control import KlController, renew_reference
from fastkl.objective.rloo import Objective
from fastkl.report.loggers import RunLog
from fastkl.report.metrics import metrics_of
from fastkl.report.numbers import percent
from fastkl.report.page.write import write_report
from fastkl.report.step_metrics import FinishedStep, StepReport
from fastkl.report.terminal import View
from fastkl.rewards.load import RewardFunction
from fastkl.rollout.agreement import CALIBRATION_STEPS, agreement_limit, check_agreement
from fastkl.rollout.ahead import Ahead, Rollout
from fastkl.rollout.generator import Generator
from fastkl.scoring import models
from fastkl.scoring.scored_model import ScoredModel
from fastkl.training import checkpoint
from fastkl.training.best import Best
from fastkl.training.callbacks import notify
from fastkl.training.canary import compare
from fastkl.training.memory import peak_gpu_bytes, peak_rss_bytes
from fastkl.training.run_folder import way_on
from fastkl.training.stopwatch import Stopwatch
from fastkl.training.whole_state import WholeState, put_together
from fastkl.types import Breakdown, RolloutBatch, StepOutcome

OFF_SUPPORT_NATS = 2.0
"""KL off the support, nats per completion, from which a run speaks of it."""

OUTSIDE_SHARE = 0.01
"""Share of sampled tokens outside of the support from which a run speaks of it; rounding explains fewer."""


@dataclass(frozen=True, slots=True)
class StepLimits:
    """The numbers that bound an update."""

    micro_batch_tokens: int  # packed tokens per forward and backward
    max_grad_norm: float  # 0: no clipping
    agreement_nats: float  # mean |engine - trainer| log-prob above which a step is refused, before it is calibrated


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a run has left."""

    folder: Path  # the run's folder: metrics.jsonl, checkpoints/, report.html, ...
    metrics: dict[str, Any]  # the last step's line of metrics.jsonl; empty if no step was left to run
    policy: nn.Module  # the trained model, a causal language model of transformers
    step: int  # the last completed step
    saved_step: int  # the newest step with a checkpoint; below `step` where the last one could not be written
    stopped: bool  # by a signal, before the last step


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Where a run stood when a step was complete: all that a checkpoint holds beside weights and moments."""

    step: int = 0
    prompts: dict[str, Any] = field(default_factory=dict)  # the position in the prompts
    skipped_steps: int = 0
    tokens_generated: int = 0
    kl_coef: float = 0.0  # beta of the next step
    first_gaps: tuple[float, ...] = ()  # mean |engine - trainer| log-prob, nats, of the first steps that had any
    ahead: Rollout | None = None  # the next step's, drawn while this one trained
    random: checkpoint.RandomState = field(default_factory=checkpoint.RandomState.now)


@dataclass(slots=True)
class Run:
    """Everything a training run holds while it lives."""

    config: TrainConfig
    folder: Path
    policy: ScoredModel
    reference: ScoredModel | None  # None with --no-reference
    tokenizer: Any
    optimizer: torch.optim.Optimizer
    prompts: PromptSource
    rewards: tuple[RewardFunction, ...]
    generator: Generator
    objective: Objective
    controller: KlController  # the only place where beta is kept
    limits: StepLimits
    log: RunLog
    view: View
    well_formed: Callable[[list[str]], float] | None  # the checker of the storyteller's language, where it applies
    evaluator: Evaluator | None = None  # None: nothing is held out
    best: Best | None = None
    callbacks: tuple[object, ...] = ()
    ahead: Ahead | None = None  # None: each step draws its own rollout
    canary: Breakdown | None = None  # with `ahead`, what was compared after the last push
    world: World = ALONE
    lock: TextIO | None = None  # keeps other processes out of the folder while it is open
    inputs: dict[str, str] = field(default_factory=dict)  # hashes of what the run reads from outside
    completed: Snapshot = field(default_factory=Snapshot)
    saved_step: int = 0
    between_steps: bool = False  # the weights have left the completed step and not reached the next
    last_metrics: dict[str, Any] = field(default_factory=dict)  # of the completed step
    evaluation: dict[str, float] = field(default_factory=dict)  # of the completed step, until its line is written
    alarm: KlAlarm = field(default_factory=KlAlarm)
    alarm_rang: bool = False
    noted: set[str] = field(default_factory=set)  # what has been said once

    @property
    def device(self) -> torch.device:
        """Where policy and reference are."""
        return self.policy.device

    @property
    def both_sides(self) -> str:
        """Whose log-probs are compared; gaps that were measured with other ones say nothing here."""
        return f"{type(self.generator).__name__}, {self.policy.dtype} on {self.device.type}"

    @property
    def limits_now(self) -> StepLimits:
        """The limits of the next step: that of the agreement follows the run's own first steps."""
        nats = agreement_limit(self.limits.agreement_nats, self.completed.first_gaps)
        return dataclasses.replace(self.limits, agreement_nats=nats)

    def limits_for(self, batch: RolloutBatch) -> StepLimits:
        """The same for a step on this batch: what earlier weights have drawn is not compared with those of now."""
        limits = self.limits_now
        return dataclasses.replace(limits, agreement_nats=math.inf) if self.is_stale(batch) else limits

    def is_stale(self, batch: RolloutBatch) -> bool:
        """Whether the batch of the next step was drawn by earlier weights than the policy's."""
        return batch.is_stale(self.completed.step + 1)

    def wait_for_rollout(self) -> None:
        """Nothing is being drawn afterwards: the generator may get new weights."""
        if self.ahead:
            self.ahead.wait()

    def sync(self, batch: RolloutBatch, step: int) -> None:
        """The weights after this step into the generator. With rollouts ahead, whose samples are compared with later
        weights, a few completions of the step's prompts are drawn at once and compared with these."""
        self.generator.sync(self.policy.model, step)
        if self.ahead is None:
            return
        tokens, limit = self.limits.micro_batch_tokens, self.limits_now.agreement_nats
        self.canary = compare(
            self.generator,
            self.policy,
            batch.prompts,
            seed=self.config.seed,
            step=step,
            tokens=tokens,
            world=self.world,
        )
        check_agreement(self.canary.mean_gap, self.canary.gap_max, limit, step + 1)
        gaps = (*self.completed.first_gaps, self.canary.mean_gap)[:CALIBRATION_STEPS]
        self.completed = dataclasses.replace(self.completed, first_gaps=gaps)

    def commit(self, step: int, batch: RolloutBatch, num_tokens: int, outcome: StepOutcome) -> None:
        """The step is complete: beta follows the KL if it has a target, the reference is renewed if it is time, and
        the snapshot is taken that a checkpoint of this step will hold. num_tokens: of all completions drawn for it.
        """
        before, config, ahead = self.completed, self.config, self.ahead.wait() if self.ahead else None
        gaps = before.first_gaps
        if outcome.total.num_tokens:
            gaps = gaps if self.is_stale(batch) else (*gaps, outcome.total.mean_gap)[:CALIBRATION_STEPS]
            over_all = self.objective.penalty.found.over_all
            self.controller.follow(outcome.total.mean("kl_exact" if over_all else "kl_support"))
        if self.reference and config.reference_every and step % config.reference_every == 0:
            renew_reference(self.reference.model, self.policy.model, config.reference_share)
        self.completed = Snapshot(
            step=step,
            prompts=ahead.position if ahead else self.prompts.state(),
            skipped_steps=before.skipped_steps + (not outcome.applied),
            tokens_generated=before.tokens_generated + num_tokens,
            kl_coef=self.controller.coef,
            first_gaps=gaps,
            ahead=ahead if ahead and ahead.completions else None,
        )
        self.between_steps = False

    def evaluate(self, step: int) -> None:
        """Measures the held-out data after `step`, if it is time. To the training nothing has happened."""
        if self.evaluator is None or step != self.completed.step or not due(self.config, step):
            return
        random, start = checkpoint.RandomState.now(), time.perf_counter()
        tokens = self.limits.micro_batch_tokens
        found = evaluate(
            self.evaluator,
            self.generator,
            self.policy,
            self.reference,
            step=step,
            micro_batch_tokens=tokens,
            world=self.world,
        )
        random.restore()  # a reward function may draw from the global generators
        self.evaluation = found.metrics | {"time/eval_s": time.perf_counter() - start}
        self.log.log_evaluation(step, found.samples)
        self.view.note(f"held out, step {step}: {found.in_words()}")
        if not step:
            line = {"step": step, **self.evaluation}
            self.log.log(line, [])
            self.view.recall([line])
            self.keep_if_best(step)
        notify(self.callbacks, "on_eval", {"step": step, **found.metrics})

    def keep_if_best(self, step: int) -> None:
        """Keeps the model of `step` as checkpoints/best, if its evaluation is the best so far."""
        evaluation, self.evaluation = self.evaluation, {}
        if self.best is None or not evaluation or not self.best.beaten_by(evaluation):
            return
        before = self.best.step, self.best.value
        self.best.step, self.best.value = step, evaluation[self.best.by.key]
        if not step:
            return  # it is the model that the run starts from
        self.save()
        if not self.world.once(self.best_is_kept):
            self.best.step, self.best.value = before

    def best_is_kept(self) -> bool:
        """Makes checkpoints/best that of the best step. False where it, or the checkpoint, could not be written."""
        assert self.best is not None
        try:
            self.best.keep(self.folder / "checkpoints")
        except OSError as failure:  # that of the checkpoint has been said
            self.view.note(f"checkpoints/best stays as it was ({models.first_line(failure)}).")
            return False
        return True

    def record(self, report: StepReport, watch: Stopwatch) -> None:
        """Logs and shows a completed step."""
        lr = self.optimizer.param_groups[0]["lr"]
        samples = report.samples()
        warning = self.alarm.add(sample["kl"] for sample in samples if "kl" in sample)
        metrics = metrics_of(
            FinishedStep(
                report,
                lr,
                watch.seconds,
                checker=self.well_formed,
                skipped_steps=self.completed.skipped_steps,
                tokens_generated=self.completed.tokens_generated,
                kl_alarm=warning is not None,
                peak_rss_bytes=sum(self.world.everybodys(peak_rss_bytes())),
                peak_gpu_bytes=peak_gpu_bytes(),
                evaluation=self.evaluation,
            )
        )
        if warning and not self.alarm_rang:
            self.view.note(warning)
        self.alarm_rang = warning is not None
        self.warn_outside(report.outcome.total)
        if self.reference:
            self.warn_off_support(report.outcome.total)
            self.warn_infinite_kl(report.outcome.total)
        self.last_metrics = metrics
        self.log.log(metrics, samples)
        self.view.step(metrics)
        if self.config.sample_every and report.step % self.config.sample_every == 0:
            self.view.samples(samples)
        notify(self.callbacks, "on_step_end", metrics, samples)
        self.keep_if_best(report.step)

    def warn_off_support(self, total: Breakdown) -> None:
        """Says once that the policy moves where its sampler cannot follow and the penalty charges nothing."""
        off, on = total.mean("kl_off_support"), total.mean("kl_support")
        charged = self.objective.penalty.found.over_all
        if charged or not off > max(OFF_SUPPORT_NATS, 2 * on):
            return
        self.note_once(
            "kl/off_support",
            f"{off:.3g} nats per completion lie on ids that cannot be drawn, where kl_estimator "
            f"{self.config.kl_estimator} charges nothing; --kl-estimator exact_full --kl-placement loss charges them.",
        )

    def warn_outside(self, total: Breakdown) -> None:
        """Says once that what was sampled is not what the sampling settings allow."""
        share = total.num_outside / max(1, total.num_tokens)
        if share > OUTSIDE_SHARE:
            self.note_once(
                "support/outside",
                f"{percent(share)} of the sampled tokens are not among the ids that the sampling settings allow by the "
                "trainer's logits. They are scored as if they were; the generator samples by other settings or logits.",
            )

    def warn_infinite_kl(self, total: Breakdown) -> None:
        """Says once that a KL is not finite, which a coefficient of zero, or another estimator, keeps from the loss."""
        for key, name in (("kl/exact", "kl_exact"), ("kl/support", "kl_support")):
            if total.num_tokens and not math.isfinite(value := total.mean(name)):
                self.note_once(
                    key,
                    f"{value:g} in this step. The reference excludes ids that the policy can draw (their logits are "
                    "-inf there), or a model computes NaN; no penalty can hold the policy near such a reference.",
                )

    def note_once(self, about: str, message: str) -> None:
        """A note that the run does not repeat."""
        if about not in self.noted:
            self.noted.add(about)
            self.view.note(f"{about}: {message}")

    def save(self) -> None:
        """Saves the completed step; when the disk refuses, says so and lets training go on with the last good one."""
        done = self.completed
        world = self.world.remaining()
        some_are_lost, renewed = world is not self.world, bool(self.config.reference_every)
        if some_are_lost and (self.policy.is_sharded or not self.world.is_first):
            return  # their pieces of the weights are lost, or it is another process's to save
        if not self.can_save(world):
            return
        self.log.flush()  # the lines of the steps that the checkpoint claims
        random, state = world.everybodys(done.random), None
        if self.policy.is_sharded:
            reference = self.reference.model if self.reference and renewed else None
            state = put_together(self.policy.model, self.optimizer, reference, world)
        with world.undisturbed():
            self.saved_step = world.once(lambda: self.write_checkpoint(random, state)) or self.saved_step
        if self.saved_step == done.step:
            notify(self.callbacks, "on_checkpoint", done.step, self.folder / "checkpoints" / f"step-{done.step}")

    def can_save(self, world: World) -> bool:
        """Whether there is a completed step that is not saved: the same one in every process."""
        step = 0 if self.between_steps or self.completed.step == self.saved_step else self.completed.step
        return step > 0 and len(set(world.everybodys(step))) == 1

    def write_checkpoint(self, random: Sequence[checkpoint.RandomState], whole: WholeState | None = None) -> int:
        """Writes the completed step; returns its number, 0 where the disk refuses. random: of every process. whole:
        the tensors, where this process has pieces of them only."""
        done = self.completed
        try:
            checkpoint.save_checkpoint(
                self.folder / "checkpoints",
                done.step,
                policy=self.policy.model,
                tokenizer=self.tokenizer,
                optimizer=self.optimizer,
                state={
                    "prompts": done.prompts,
                    "skipped_steps": done.skipped_steps,
                    "tokens_generated": done.tokens_generated,
                    "kl_coef": done.kl_coef,
                    "first_gaps": {"between": self.both_sides, "nats": list(done.first_gaps)},
                    "inputs": self.inputs,
                    "logs": self.log.digests(),
                    **({"ahead": done.ahead.in_words()} if done.ahead else {}),
                    **({"best": self.best.state()} if self.best else {}),
                },
                random=random[0],
                others=random[1:],
                state_of=whole,
                ahead=done.ahead.tensors() if done.ahead else None,
                reference=self.reference.model if self.reference and self.config.reference_every else None,
                config=dataclasses.asdict(self.config),
                keep=self.config.keep_checkpoints,
            )
        except Exception as failure:  # the libraries report a full disk with errors of their own
            self.view.note(
                f"The checkpoint of step {done.step} could not be written ({models.first_line(failure)}); "
                "training goes on, the last good checkpoint stays. Free space or mend the folder before the run ends."
            )
            return 0
        return done.step

    def close(self) -> None:
        """Lets other runs into the folder, once nothing is being drawn any more."""
        if self.ahead:
            self.ahead.close()
        if self.lock is not None:
            self.lock.close()

    def say_what_is_left(self) -> None:
        """The last words: which step the run ends at, where its model is, how to go on."""
        last, steps = self.completed.step, self.config.steps
        where = self.folder / "checkpoints" / f"step-{self.saved_step}" if self.saved_step else "none is saved"
        self.view.close_with(f"Step {last} of {steps}. Model: {where}")
        if self.best:
            self.view.close_with(self.best.in_words(self.folder / "checkpoints"))
        if last < steps:
            self.view.close_with(f"Go on with: {way_on(self.config.output)}")

    def write_page(self) -> None:
        """Writes the report."""
        try:
            self.view.close_with(f"Report: {self.folder / write_report([self.folder]).name}")
        except Exception as failure:  # a page is not worth a finished run
            self.view.close_with(f"No report ({models.first_line(failure)}).")

    def finish(self, *, stopped: bool = False) -> TrainResult:
        """Saves, writes the report, and says where everything is."""
        self.save()
        last = self.completed.step
        self.world.once(self.write_page)
        self.say_what_is_left()
        return TrainResult(self.folder, self.last_metrics, self.policy.model, last, self.saved_step, stopped)
