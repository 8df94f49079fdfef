"""One update() of toy models: its gradient and its outcome."""

from __future__ import annotations

from dataclasses import replace

import torch
from toy import STOP

from fastkl.config.settings import TrainConfig
from fastkl.objective.rloo import Objective
from fastkl.sampling.params import Sampling
from fastkl.scoring import backbone
from fastkl.scoring.scored_model import ScoredModel
from fastkl.training.loop import update
from fastkl.training.setup import limits_of, objective_of
from fastkl.training.stopwatch import Stopwatch
from fastkl.types import RolloutBatch, StepOutcome

CPU = torch.device("cpu")


class Recorder(torch.optim.SGD):
    """Keeps the gradient of the step it is asked to make, and makes none."""

    def step(self, closure=None):
        self.gradients = [p.grad.clone() for p in self.param_groups[0]["params"]]


def toy_objective(config: TrainConfig) -> Objective:
    return objective_of(config, Sampling.of(config, (STOP,)))


def toy_update(
    policy, reference, optimizer, batch: RolloutBatch, config: TrainConfig, *, step: int = 1, **limits
) -> StepOutcome:
    """update() with the objective and the limits that the settings ask for; `limits` replaces some of them."""
    backbone.register_packed_attention()
    models = ScoredModel(policy), ScoredModel(reference)
    bounds = replace(limits_of(config, models[0]), **limits)
    return update(*models, optimizer, batch, toy_objective(config), bounds, Stopwatch(CPU), step=step)


def step_gradient(policy, reference, batch, config) -> tuple[dict[str, torch.Tensor], StepOutcome]:
    """The gradient that update() hands to the optimizer, and its outcome."""
    recorder = Recorder(policy.parameters(), lr=1.0)
    outcome = toy_update(policy, reference, recorder, batch, config)
    assert outcome.applied
    names = [name for name, _ in policy.named_parameters()]
    return dict(zip(names, recorder.gradients, strict=True)), outcome
