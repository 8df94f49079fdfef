"""Where a model is that is not trained: on a device of its own, or in the host's memory until it scores.

The operator runs on the policy's device. A reference elsewhere forwards the tokens where it is, and sends its hidden
states [N, H]; its head [V, H] is copied once. One that waits in the host's memory is copied to its device for as long
as it scores, and the copy is dropped: nothing has to be written back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import torch
from torch import nn

from fastkl.kernels.types import Head
from fastkl.types import Distinct, PackedBatch, PrefixTree


@contextmanager
def fetched(model: nn.Module, device: torch.device | None) -> Iterator[None]:
    """Copies on `device` stand in the place of the model's tensors for as long as this lasts. None: it stays."""
    places = [] if device is None else [(m, name, x) for m in model.modules() for name, x in held_by(m)]
    copies = {id(tensor): copied(tensor, device) for _, _, tensor in places}  # one of each: tied weights stay tied
    for module, name, tensor in places:
        setattr(module, name, copies[id(tensor)])
    try:
        yield
    finally:
        for module, name, tensor in places:
            setattr(module, name, tensor)


def held_by(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """The module's own parameters and buffers."""
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]


def copied(tensor: torch.Tensor, device: torch.device | None) -> torch.Tensor:
    """The tensor on `device`; a parameter, if it is one."""
    there = tensor.detach().to(device, non_blocking=True)
    return nn.Parameter(there, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else there


def put_away(model: nn.Module) -> None:
    """Moves the model into the host's memory, into pages that a GPU reads directly where there is one."""
    for tensor in (*model.parameters(), *model.buffers()):
        away = tensor.data.cpu()
        tensor.data = away.pin_memory() if torch.cuda.is_available() else away


def moved(batch: PackedBatch, device: torch.device) -> PackedBatch:
    """The batch on `device`: itself, if it is there."""
    if batch.input_ids.device == device:
        return batch
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    tensors = torch.Tensor, PrefixTree, Distinct
    there: dict[str, Any] = {name: x.to(device) for name, x in values.items() if isinstance(x, tensors)}
    return replace(batch, **there)


class HeadCopy:
    """A head on another device, copied again where its weight has been changed in place (a renewed reference)."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._version, self._copy = device, -1, Head(torch.empty(0))

    def of(self, head: Head) -> Head:
        """The head, on `device`."""
        if self._version != head.weight._version:
            bias = None if head.bias is None else head.bias.detach().to(self.device)
            self._copy = replace(head, weight=head.weight.detach().to(self.device), bias=bias)
            self._version = head.weight._version
        return self._copy
