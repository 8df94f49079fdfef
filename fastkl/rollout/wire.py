"""Wire: weights as chunks of bytes, as they travel from a trainer to its servers.

The trainer keeps a copy of what it has pushed, in its host's memory: a server that comes back while the policy is being
updated gets the same weights as the others. Both sides cut the same list of tensors into the same chunks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from fastkl.rollout.fingerprint import fingerprint

CHUNK_BYTES = 64 << 20
"""Of one chunk at the most, unless a single tensor is larger."""

ALIGNMENT = 16
"""Bytes: where a tensor in a chunk may begin, whatever its dtype."""

Sums = list[list[int]]
"""Two sums of bits for each tensor (fingerprint.py), in the order in which they are sent."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor that is sent."""

    name: str
    dtype: str  # such as bfloat16
    shape: tuple[int, ...]

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> Entry:
        return cls(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))

    @property
    def num_bytes(self) -> int:
        """Without what follows up to the next tensor."""
        return math.prod(self.shape) * getattr(torch, self.dtype).itemsize

    def within(self, chunk: torch.Tensor, offset: int) -> torch.Tensor:
        """The tensor that lies at this place in a chunk: u8 [bytes] -> a view of it."""
        return chunk[offset : offset + self.num_bytes].view(getattr(torch, self.dtype)).view(self.shape)


@dataclass(slots=True)
class Layout:
    """Where tensors lie: sizes of the chunks so far, in bytes."""

    chunk_bytes: int
    sizes: list[int] = field(default_factory=list)

    def add(self, entry: Entry) -> tuple[int, int]:
        """The number of the chunk of the next tensor, and its offset there."""
        size = -(-entry.num_bytes // ALIGNMENT) * ALIGNMENT
        if not self.sizes or (self.sizes[-1] and self.sizes[-1] + size > self.chunk_bytes):
            self.sizes.append(0)
        self.sizes[-1] += size
        return len(self.sizes) - 1, self.sizes[-1] - size


class Packed:
    """Weights in this process's memory, in chunks; those of the next push take the same place."""

    def __init__(self) -> None:
        self.chunk_bytes = CHUNK_BYTES
        self.entries: list[Entry] = []
        self.sums: Sums = []
        self._layout, self._memory = Layout(CHUNK_BYTES), list[torch.Tensor]()

    @torch.no_grad()
    def take(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copies them, and sums the bits of the originals."""
        self.entries, self._layout, sums = [], Layout(self.chunk_bytes), list[torch.Tensor]()
        for name, tensor in weights:
            entry = Entry.of(name, tensor)
            number, offset = self._layout.add(entry)
            entry.within(self._room(number, entry), offset).copy_(tensor)
            sums.append(fingerprint(tensor))
            self.entries.append(entry)
        self.sums = numbers(sums)

    def chunks(self) -> Iterator[torch.Tensor]:
        """u8 [bytes], on the CPU."""
        for memory, size in zip(self._memory, self._layout.sizes, strict=False):
            yield memory[:size]

    def _room(self, number: int, entry: Entry) -> torch.Tensor:
        """The memory of a chunk whose next, and perhaps only, tensor this is."""
        wanted = max(self.chunk_bytes, entry.num_bytes + ALIGNMENT)
        if number == len(self._memory):
            self._memory.append(torch.empty(wanted, dtype=torch.uint8))
        elif len(self._memory[number]) < wanted:
            self._memory[number] = torch.empty(wanted, dtype=torch.uint8)
        return self._memory[number]


def received(
    entries: Sequence[Entry], chunk_bytes: int, receive: Callable[[torch.Tensor], None], device: torch.device
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of chunks that `receive` fills, in order; on the CPU, where they wait for the engine's loader."""
    layout = Layout(chunk_bytes)
    places = [layout.add(entry) for entry in entries]
    chunk, held = torch.empty(0, dtype=torch.uint8), -1
    for entry, (number, offset) in zip(entries, places, strict=True):
        if number != held:
            buffer = torch.empty(layout.sizes[number], dtype=torch.uint8, device=device)
            receive(buffer)
            chunk, held = buffer.cpu(), number
        yield entry.name, entry.within(chunk, offset)


def numbers(sums: Sequence[torch.Tensor]) -> Sums:
    """i64 [2] each -> Python's integers, with one copy from each device."""
    if len({s.device for s in sums}) > 1:
        sums = [s.cpu() for s in sums]
    return torch.stack(list(sums)).tolist() if sums else []


def unlike(entries: Sequence[Entry], sent: Sums, received: Sums) -> list[str]:
    """Names of the tensors that are not, bit for bit, what was sent."""
    if len(sent) != len(received):
        return [entry.name for entry in entries]
    return [entry.name for entry, ours, theirs in zip(entries, sent, received, strict=True) if ours != theirs]
