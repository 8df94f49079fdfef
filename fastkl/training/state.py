"""Run: everything that a training run holds while it lives, and what it does at the end of a step and of the run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastkl.audit.alarm import KlAlarm
from fastkl.config.settings import TrainConfig
from fastkl.data.prompts import PromptSource
from fastkl.objective.kl_control import KlController
from fastkl.objective.rloo import Objective
from fastkl.report.loggers import RunLog
from fastkl.report.metrics import metrics_of
from fastkl.report.page.write import write_report
from fastkl.report.step_metrics import FinishedStep, StepReport
from fastkl.report.terminal import View
from fastkl.rewards.load import RewardFunction
from fastkl.rollout.generator import Generator
from fastkl.scoring import models
from fastkl.scoring.scored_model import ScoredModel
from fastkl.training import checkpoint
from fastkl.training.callbacks import notify
from fastkl.training.stopwatch import Stopwatch


@dataclass(frozen=True, slots=True)
class StepLimits:
    """The numbers that bound an update."""

    micro_batch_tokens: int  # packed tokens per forward and backward
    max_grad_norm: float  # 0: no clipping
    agreement_nats: float  # mean |engine - trainer| log-prob above which a step is refused


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a run has left."""

    folder: Path  # the run's folder: metrics.jsonl, checkpoints/, report.html, ...
    metrics: dict[str, Any]  # the last step's line of metrics.jsonl; empty if no step was left to run
    policy: nn.Module  # the trained model, a causal language model of transformers


@dataclass(slots=True)
class Run:
    """Everything a training run holds while it lives."""

    config: TrainConfig
    folder: Path
    policy: ScoredModel
    reference: ScoredModel
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
    callbacks: tuple[object, ...] = ()
    first_step: int = 1
    skipped_steps: int = 0
    tokens_generated: int = 0
    completed_step: int = 0
    saved_step: int = 0
    prompt_state: dict[str, Any] = field(default_factory=dict)  # after the completed step
    last_metrics: dict[str, Any] = field(default_factory=dict)  # of the completed step
    alarm: KlAlarm = field(default_factory=KlAlarm)
    alarm_rang: bool = False

    @property
    def device(self) -> torch.device:
        """Where policy and reference are."""
        return self.policy.device

    def record(self, report: StepReport, watch: Stopwatch) -> None:
        """Logs and shows a completed step."""
        lr = self.optimizer.param_groups[0]["lr"]
        samples = report.samples()
        self.tokens_generated += sum(sample["num_tokens"] for sample in samples)
        self.skipped_steps += not report.outcome.applied
        self.completed_step, self.prompt_state = report.step, self.prompts.state()
        warning = self.alarm.add(sample["kl"] for sample in samples)
        metrics = metrics_of(
            FinishedStep(
                report,
                lr,
                watch.seconds,
                checker=self.well_formed,
                skipped_steps=self.skipped_steps,
                tokens_generated=self.tokens_generated,
                kl_alarm=warning is not None,
            )
        )
        if warning and not self.alarm_rang:
            self.view.note(warning)
        self.alarm_rang = warning is not None
        self.last_metrics = metrics
        self.log.log(metrics, samples)
        self.view.step(metrics)
        if self.config.sample_every and report.step % self.config.sample_every == 0:
            best = max(samples, key=lambda sample: sample["reward"] or 0.0)
            self.view.sample(best["prompt"], best["completion"], best["reward"] or 0.0)
        notify(self.callbacks, "on_step_end", metrics, samples)

    def save(self) -> None:
        """Saves the completed step; when the disk refuses, says so and lets training go on with the last good one."""
        if self.completed_step == self.saved_step:
            return
        try:
            folder = checkpoint.save_checkpoint(
                self.folder / "checkpoints",
                self.completed_step,
                policy=self.policy.model,
                tokenizer=self.tokenizer,
                optimizer=self.optimizer,
                state={
                    "prompts": self.prompt_state,
                    "skipped_steps": self.skipped_steps,
                    "tokens_generated": self.tokens_generated,
                    "kl_coef": self.controller.coef,
                },
                reference=self.reference.model if self.config.reference_every else None,
                config=dataclasses.asdict(self.config),
                keep=self.config.keep_checkpoints,
            )
            self.saved_step = self.completed_step
            notify(self.callbacks, "on_checkpoint", self.completed_step, folder)
        except (OSError, RuntimeError) as failure:  # safetensors reports a full disk with an error of its own
            self.view.note(
                f"The checkpoint of step {self.completed_step} could not be written ({models.first_line(failure)}); "
                "training goes on, the last good checkpoint stays. Free space or mend the folder before the run ends."
            )

    def finish(self) -> TrainResult:
        """Saves, writes the report, and says where everything is."""
        self.save()
        report = write_report([self.folder])
        last = self.completed_step
        self.view.note(f"Step {last} of {self.config.steps}. Report: {report}")
        if self.saved_step:
            self.view.note(f"Model: {self.folder / 'checkpoints' / f'step-{self.saved_step}'}")
        if last < self.config.steps:
            self.view.note(f"Go on with: fastkl train --output {self.config.output} --resume")
        return TrainResult(self.folder, self.last_metrics, self.policy.model)
