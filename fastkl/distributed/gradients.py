"""Gradients of replicated weights, added up over the processes.

Sums, not means: the loss is divided by the number of samples of the whole step, so the processes' gradients add up to
that of one process.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from fastkl.distributed.world import World


def add_up_gradients(parameters: Iterable[nn.Parameter], world: World) -> None:
    """Replaces every gradient by the sum of all processes' ones. A parameter that has none in any process keeps none,
    since the optimizer passes over it then; one that has none in this process counts as zero. Those of sharded
    parameters have been added up where they were made."""
    if world.size == 1:
        return
    trained = [p for p in parameters if p.requires_grad and not hasattr(p, "full_tensor")]
    if not trained:
        return
    holders = torch.tensor([parameter.grad is not None for parameter in trained], dtype=torch.float32)
    world.add_up([holders])
    for parameter, number in zip(trained, holders.tolist(), strict=True):
        if number and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    world.add_up(parameter.grad for parameter in trained if parameter.grad is not None)
