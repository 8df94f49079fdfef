"""One update() of a toy run, without files, engines or displays: its gradient and its report."""

from __future__ import annotations

import torch
from toy import STOP, ToyTokenizer

from fastkl.report.step_metrics import StepReport
from fastkl.scoring import backbone
from fastkl.training.loop import update
from fastkl.training.setup import sampling_of
from fastkl.training.state import Run
from fastkl.training.stopwatch import Stopwatch

CPU = torch.device("cpu")


class Recorder(torch.optim.SGD):
    """Keeps the gradient of the step it is asked to make, and makes none."""

    def step(self, closure=None):
        self.gradients = [p.grad.clone() for p in self.param_groups[0]["params"]]


def toy_run(policy, reference, config) -> Run:
    backbone.register_packed_attention()
    unused = dict.fromkeys(("folder", "prompts", "rewards", "generator", "log", "view", "well_formed"))
    return Run(
        config=config,
        device=CPU,
        compute_dtype=torch.float32,
        policy=policy,
        reference=reference,
        layout="packed",
        tokenizer=ToyTokenizer(),
        optimizer=Recorder(policy.parameters(), lr=1.0),
        sampling=sampling_of(config, (STOP,)),
        kl_coef=config.kl_coef,
        **unused,
    )


def step_gradient(policy, reference, batch, config) -> tuple[dict[str, torch.Tensor], StepReport]:
    """The gradient that update() hands to the optimizer, and its report."""
    report, run = StepReport(1, batch, {}, config), toy_run(policy, reference, config)
    assert update(run, batch, report, Stopwatch(CPU))
    names = [name for name, _ in policy.named_parameters()]
    return dict(zip(names, run.optimizer.gradients, strict=True)), report
