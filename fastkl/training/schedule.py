"""The learning rate's schedule."""

from __future__ import annotations

import math

import torch

from fastkl.config.defaults import lr_of
from fastkl.config.settings import TrainConfig


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up over `warmup_steps`, then "linear" or "cosine" decay to 0 after the last step, or "constant"."""
    if step <= config.warmup_steps:
        return lr_of(config) * step / config.warmup_steps
    progress = (step - 1 - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    decay = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    return lr_of(config) * decay[config.lr_decay]


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
