"""The state of a run whose weights lie on several processes, put together in the first one, for its checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from fastkl.distributed.world import World
from fastkl.scoring.adapters import is_adapter
from fastkl.scoring.pieces import whole
from fastkl.training.small_adamw import SmallAdamW

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
    if adapters := [(name, tensor) for name, tensor in weights if is_adapter(name)]:
        weights = adapters  # nothing else is saved
    others: Tensors = [] if reference is None else [*reference.named_parameters()]
    moments = _moments(policy, optimizer, world)
    return WholeState(_whole(weights, world), _whole(moments, world), _whole(others, world))


@torch.no_grad()
def _moments(policy: nn.Module, optimizer: torch.optim.Optimizer, world: World) -> Iterator[tuple[str, torch.Tensor]]:
    """KEY/NAME and the value, one at a time."""
    for name, parameter in policy.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(optimizer, SmallAdamW):
                value = optimizer.whole_state(parameter, value, world)
            yield f"{key}/{name}", value


@torch.no_grad()
def _whole(tensors: Iterable[tuple[str, torch.Tensor]], world: World) -> dict[str, torch.Tensor]:
    found = {}
    for name, tensor in tensors:
        together = whole(tensor.detach())
        if world.is_first:
            found[name] = together.cpu().contiguous()
    return found
