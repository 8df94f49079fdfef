"""The state of a run whose weights lie on several processes, put together in the first one, for its checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from fastkl.distributed.world import World
from fastkl.scoring.shard import whole

Tensors = list[tuple[str, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class WholeState:
    """Whole tensors by name, on the CPU; none of them in processes that do not write."""

    weights: dict[str, torch.Tensor]  # what from_pretrained reads
    moments: dict[str, torch.Tensor]  # KEY/NAME of the optimizer's state
    reference: dict[str, torch.Tensor]  # where it changes


def put_together(
    policy: nn.Module, optimizer: torch.optim.Optimizer, reference: nn.Module | None, world: World
) -> WholeState:
    """The state, tensor by tensor; every process must come here. reference: None where it need not be saved."""
    kept = set(policy.state_dict())
    weights: Tensors = [*policy.named_parameters(), *((n, b) for n, b in policy.named_buffers() if n in kept)]
    moments: Tensors = [
        (f"{key}/{name}", value)
        for name, parameter in policy.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    ]
    others: Tensors = [] if reference is None else [*reference.named_parameters()]
    return WholeState(*(_whole(tensors, world) for tensors in (weights, moments, others)))


@torch.no_grad()
def _whole(tensors: Tensors, world: World) -> dict[str, torch.Tensor]:
    found = {}
    for name, tensor in tensors:
        together = whole(tensor.detach())
        if world.is_first:
            found[name] = together.cpu().contiguous()
    return found
