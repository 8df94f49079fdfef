"""Where each of the policy's tensors lies in the engine, learnt by watching the engine's own loader copy them.

Engines store several tensors in one (query, key and value; gate and up; the experts), turn some round, cut others. No
table of ours says which: the loader's copies are observed once, when the first weights are pushed, and every copy from
a part of a sent tensor into a part of a parameter becomes a `Place`. Where processes share an engine, each has the
places of its own part of the engine, and `covered` says whether all of them together have the whole tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

PADDED_ROWS = 64
"""Vocabularies are padded to a multiple of this, with rows at the end that nothing is copied to."""


@dataclass(frozen=True, slots=True)
class Part:
    """Some of a tensor's elements: those of a strided view, whose offset counts from the tensor's first element."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, view: torch.Tensor, whole: torch.Tensor) -> Part:
        """The part of `whole` that `view` is, which shares its storage."""
        return cls(tuple(view.shape), tuple(view.stride()), int(view.storage_offset()) - int(whole.storage_offset()))

    def __call__(self, whole: torch.Tensor) -> torch.Tensor:
        """The view of another tensor of the same shape and strides."""
        return whole.as_strided(self.shape, self.stride, whole.storage_offset() + self.offset)

    def within(self, whole: torch.Tensor) -> bool:
        """Whether a tensor has all of these elements; the engine may have left an empty one behind."""
        return self.end <= whole.numel()

    @property
    def numel(self) -> int:
        """How many elements these are."""
        return math.prod(self.shape)

    @property
    def end(self) -> int:
        """One more than the place of the last element."""
        return self.offset + 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))

    def coalesced(self) -> Part:
        """The same elements in as few dimensions as can be, whose last one has them side by side (stride 1)."""
        dims: list[tuple[int, int]] = []
        for step, n in sorted(((step, n) for n, step in zip(self.shape, self.stride, strict=True) if n != 1))[::-1]:
            if dims and dims[-1][0] == n * step:
                dims[-1] = step, n * dims[-1][1]
            else:
                dims.append((step, n))
        if not dims or dims[-1][0] != 1:
            dims.append((1, 1))
        return Part(tuple(n for _, n in dims), tuple(step for step, _ in dims), self.offset)


def covered(whole: Part, parts: Iterable[Part]) -> bool:
    """Whether the parts together have every element of `whole`, from whose first element their offsets count.

    They are marked in a mask of the storage, which has one number for as many elements as are always side by side: a
    matrix that is cut into pieces takes a number per piece, or one per row and piece.
    """
    if 0 in whole.shape:
        return True
    found = [part.coalesced() for part in (whole, *parts) if 0 not in part.shape]
    unit = math.gcd(*(x for part in found for x in (part.offset, part.shape[-1], *part.stride[:-1])))
    found = [
        Part(
            (*part.shape[:-1], part.shape[-1] // unit),
            (*(step // unit for step in part.stride[:-1]), 1),
            part.offset // unit,
        )
        for part in found
    ]
    mask = torch.zeros(max(part.end for part in found), dtype=torch.bool)
    for part in found[1:]:
        part(mask).fill_(True)
    return bool(found[0](mask).all())


@dataclass(frozen=True, slots=True)
class Place:
    """A part of a sent tensor and the part of a parameter that it is copied to; both have one shape."""

    sent: str  # name under which the tensor is sent
    source: Part
    parameter: str  # name in the engine
    target: Part
    dtype: torch.dtype  # of the parameter, when it is loaded


@dataclass(slots=True)
class Places:
    """All that was seen."""

    of_parameter: dict[str, list[Place]] = field(default_factory=dict)
    sent: dict[str, torch.Tensor] = field(default_factory=dict)  # while watching; then emptied
    shapes: dict[str, torch.Size] = field(default_factory=dict)  # of each parameter that something was copied to
    altered: set[str] = field(default_factory=set)  # parameters whose loader computes with what it has copied
    shared_by: int = 1  # processes that share the engine: each has 1 / shared_by of the vocabulary's rows

    def add(self, place: Place, parameter: torch.Tensor) -> None:
        """Remembers a copy; the engine may make the same one twice, first to count and then to load."""
        known = self.of_parameter.setdefault(place.parameter, [])
        if place not in known:
            known.append(place)
        self.shapes[place.parameter] = parameter.shape

    def of_sent(self) -> dict[str, list[Place]]:
        """The same, by the name of the tensor that is sent."""
        found: dict[str, list[Place]] = {}
        for places in self.of_parameter.values():
            for place in places:
                found.setdefault(place.sent, []).append(place)
        return found

    def filled(self, name: str) -> bool:
        """Whether something was copied to all of this parameter. Rows that pad a vocabulary are no gap."""
        places = self.of_parameter.get(name, [])
        if not places:
            return False
        missing = self.shapes[name].numel() - sum(torch.Size(place.target.shape).numel() for place in places)
        rows = self.shapes[name][0] if self.shapes[name] else 1
        is_padded = len(places) == 1 and rows * self.shared_by % PADDED_ROWS == 0
        return missing <= 0 or (is_padded and missing < self.shapes[name].numel() // rows * PADDED_ROWS)


class Watch(TorchDispatchMode):
    """Sees every copy while it is entered."""

    def __init__(self, model: nn.Module, places: Places) -> None:
        super().__init__()
        self.model, self.places = model, places
        self.paused = False
        self._sent: dict[int, list[str]] = {}  # by storage
        self._parameters: dict[int, tuple[str, nn.Module, str]] = {}  # by storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation, and looks at it if it is a copy."""
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.copy_.default and not self.paused:
            self._copied(args[0], args[1])
        return result

    def sending(self, name: str, tensor: torch.Tensor) -> None:
        """`tensor` is sent next."""
        self.places.sent[name] = tensor
        self._sent.setdefault(_storage(tensor), []).append(name)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Does not look while the engine packs what it has loaded."""
        self.paused = True
        try:
            yield
        finally:
            self.paused = False

    def _copied(self, target: torch.Tensor, source: torch.Tensor) -> None:
        found = self._parameter(target)
        if found is None or _storage(source) == _storage(target):  # vLLM copies biases to themselves
            return
        name, parameter = found
        sent = self._sender(source)
        if sent is None or target.shape != source.shape:
            self.places.altered.add(name)
            return
        part = Part.of(source, self.places.sent[sent])
        self.places.add(Place(sent, part, name, Part.of(target, parameter), parameter.dtype), parameter)

    def _sender(self, source: torch.Tensor) -> str | None:
        """Of several tensors that share a storage, the one that has the copied elements."""
        for name in self._sent.get(_storage(source), ()):
            whole = self.places.sent[name]
            if 0 <= source.storage_offset() - whole.storage_offset() < max(whole.numel(), 1):
                return name
        return None

    def _parameter(self, target: torch.Tensor) -> tuple[str, torch.Tensor] | None:
        """The engine's parameter of which `target` is a view. The engine makes new ones while it loads."""
        storage = _storage(target)
        for _ in range(2):
            name, module, attribute = self._parameters.get(storage, ("", self.model, ""))
            parameter = getattr(module, attribute, None) if attribute else None
            if parameter is not None and _storage(parameter) == storage:
                return name, parameter
            self._parameters = {
                _storage(parameter): (f"{path}.{attribute}".lstrip("."), module, attribute)
                for path, module in self.model.named_modules()
                for attribute, parameter in module._parameters.items()
                if parameter is not None
            }
        return None


def _storage(tensor: torch.Tensor) -> int:
    """What tells storages apart, those without data too."""
    return int(tensor.untyped_storage()._cdata)
