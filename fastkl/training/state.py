"""Run: everything that a training run holds while it lives, and what it does at the end of a step and of the run."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastkl.audit.alarm import KlAlarm
from fastkl.config.settings import TrainConfig, penalty_of
from fastkl.data.prompts import PromptSource
from fastkl.objective.penalty import Penalty
from fastkl.report.loggers import RunLog
from fastkl.report.page import write_report
from fastkl.report.step_metrics import StepReport
from fastkl.report.terminal import View
from fastkl.rewards.load import RewardFunction
from fastkl.rollout.generator import Generator
from fastkl.rollout.vllm import VllmGenerator
from fastkl.rollout.weight_sync import push_weights
from fastkl.sampling.params import Sampling
from fastkl.scoring import models
from fastkl.training import checkpoint
from fastkl.training.stopwatch import Stopwatch

# Large tensors are fresh memory every time, and a CPU pays for each page of it: 12,700 tokens through a trunk of 2.6
# million parameters, forward without and forward and backward with gradients, took 2.54 s at once, 2.28 s by the 3,200.
MICRO_BATCH_TOKENS = {"cpu": 4096, "cuda": 16384}


@dataclass(slots=True)
class Run:
    """Everything a training run holds while it lives."""

    config: TrainConfig
    folder: Path
    device: torch.device
    compute_dtype: torch.dtype  # of the trunk's matrix products; weights are float32
    policy: nn.Module
    reference: nn.Module
    layout: str  # how the trunk batches sequences: "packed" or "padded" (trunk.py)
    tokenizer: Any
    optimizer: torch.optim.Optimizer
    prompts: PromptSource
    rewards: tuple[RewardFunction, ...]
    generator: Generator
    sampling: Sampling
    log: RunLog
    view: View
    well_formed: Callable[[list[str]], float] | None  # the checker of the storyteller's language, where it applies
    first_step: int = 1
    skipped_steps: int = 0
    tokens_generated: int = 0
    completed_step: int = 0
    saved_step: int = 0
    prompt_state: dict[str, Any] = field(default_factory=dict)  # after the completed step
    kl_coef: float = 0.0  # beta, as the controller has moved it
    alarm: KlAlarm = field(default_factory=KlAlarm)
    alarm_rang: bool = False

    @property
    def micro_batch_tokens(self) -> int:
        """Packed tokens per forward and backward."""
        return self.config.micro_batch_tokens or MICRO_BATCH_TOKENS[self.device.type]

    @property
    def penalty(self) -> Penalty:
        """The KL penalty at the coefficient of now."""
        return penalty_of(self.config, self.kl_coef)

    @property
    def generator_dtype(self) -> str:
        """The dtype that the generator computes in, for the tolerance of its agreement with the trainer."""
        return str(self.compute_dtype).removeprefix("torch.")

    def autocast(self) -> AbstractContextManager:
        """bfloat16 matrix products over float32 weights, or nothing."""
        if self.compute_dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)

    def push_weights(self) -> None:
        """Brings the generator up to the policy's weights; one that decodes with the policy has them already."""
        if isinstance(self.generator, VllmGenerator):
            push_weights(self.generator.llm, self.policy)

    def record(self, report: StepReport, watch: Stopwatch) -> None:
        """Logs and shows a completed step."""
        lr = self.optimizer.param_groups[0]["lr"]
        metrics = report.metrics(lr, watch.seconds, self.well_formed)
        samples = report.samples()
        self.tokens_generated += sum(sample["num_tokens"] for sample in samples)
        metrics |= {"steps/skipped": self.skipped_steps, "tokens/generated": self.tokens_generated}
        self.completed_step, self.prompt_state = report.step, self.prompts.state()
        warning = self.alarm.add(sample["kl"] for sample in samples)
        metrics["kl/alarm"] = int(warning is not None)
        if warning and not self.alarm_rang:
            self.view.note(warning)
        self.alarm_rang = warning is not None
        self.log.log(metrics, samples)
        self.view.step(metrics)
        if self.config.sample_every and report.step % self.config.sample_every == 0:
            best = max(samples, key=lambda sample: sample["reward"] or 0.0)
            self.view.sample(best["prompt"], best["completion"], best["reward"] or 0.0)

    def save(self) -> None:
        """Saves the completed step; when the disk refuses, says so and lets training go on with the last good one."""
        if self.completed_step == self.saved_step:
            return
        try:
            checkpoint.save_checkpoint(
                self.folder / "checkpoints",
                self.completed_step,
                policy=self.policy,
                tokenizer=self.tokenizer,
                optimizer=self.optimizer,
                state={
                    "prompts": self.prompt_state,
                    "skipped_steps": self.skipped_steps,
                    "tokens_generated": self.tokens_generated,
                    "kl_coef": self.kl_coef,
                },
                reference=self.reference if self.config.reference_every else None,
                config=dataclasses.asdict(self.config),
                keep=self.config.keep_checkpoints,
            )
            self.saved_step = self.completed_step
        except (OSError, RuntimeError) as failure:  # safetensors reports a full disk as its own error
            self.view.note(
                f"The checkpoint of step {self.completed_step} could not be written ({models.first_line(failure)}); "
                "training goes on, the last good checkpoint stays. Free space or mend the folder before the run ends."
            )

    def finish(self) -> None:
        """Saves, writes the report, and says where everything is."""
        self.save()
        report = write_report([self.folder])
        last = self.completed_step
        self.view.note(f"Step {last} of {self.config.steps}. Report: {report}")
        if self.saved_step:
            self.view.note(f"Model: {self.folder / 'checkpoints' / f'step-{self.saved_step}'}")
        if last < self.config.steps:
            self.view.note(f"Go on with: fastkl train --output {self.config.output} --resume")
