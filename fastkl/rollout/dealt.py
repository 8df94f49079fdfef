"""Requests dealt out: each engine draws its part, and every process gets all completions.

In: the requests of a step, the same ones in every process. Out: their completions, in order. A request carries its
place and its seed, so that it draws the same wherever it is drawn: a step's samples are those of one process. Of E
engines each gets every E-th request, so that a prompt whose samples are long keeps none of them longer than the others.
Servers are asked by the first process for all.

An engine that several processes share needs the same requests in all of them, in the same order: with others they would
wait for each other in different calls, for ever. So they compare them first, and what they have drawn afterwards; then
each hands on its share of the completions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TypeVar

import numpy as np

from fastkl.distributed.world import World
from fastkl.rollout.agreement import StaleEngineError
from fastkl.rollout.generator import Generator
from fastkl.rollout.requests import Request
from fastkl.types import Completion

T = TypeVar("T")


def generate(generator: Generator, requests: Sequence[Request], world: World) -> list[Completion]:
    """One completion for each request, in order; every process must come here with the same requests.

    Raises StaleEngineError where processes that share an engine differ in what they are to draw, or in what they drew.
    """
    if world.size == 1:
        return generator.generate(requests)
    engines = Engines.of(generator, world)
    mine = engines.dealt(requests)
    if engines.shared_by > 1:
        asked = digest((generator.sampling, *((r.prompt_index, r.seed, r.prompt.token_ids) for r in mine)))
        engines.check_alike(world.everybodys(asked), "were to draw different completions")
    with world.together():
        drawn = generator.generate(mine)
    seen = digest(c.token_ids for c in drawn) if engines.shared_by > 1 else ""
    parts = world.everybodys((Columns.of(engines.own(drawn)), seen))
    engines.check_alike([theirs for _, theirs in parts], "drew different completions")
    return engines.collected([part.completions() for part, _ in parts])


def collected(drawn: Columns | None, engines: Engines) -> list[Completion] | None:
    """All processes' completions, in the order of the requests, where none shares an engine with another; None where
    one of them has failed to draw its own."""
    parts = engines.world.everybodys(drawn)
    found = [part.completions() for part in parts if part is not None]
    return engines.collected(found) if len(found) == len(parts) else None


@dataclass(frozen=True, slots=True)
class Engines:
    """The engines of a run: one in each process, one for as many neighbours as share it, or the first process's alone,
    which draws for all."""

    world: World
    shared_by: int = 1
    serves_all: bool = False

    @classmethod
    def of(cls, generator: Generator, world: World) -> Engines:
        """Those that this generator is one of."""
        return cls(world, getattr(generator, "shared_by", 1), getattr(generator, "serves_all", False))

    @property
    def count(self) -> int:
        """How many there are: E."""
        return 1 if self.serves_all else self.world.size // self.shared_by

    def dealt(self, items: Sequence[T]) -> Sequence[T]:
        """The part of the items that this process's engine gets: every E-th one, or none where it has no engine."""
        engine = self.world.rank // self.shared_by
        return items[engine :: self.count] if engine < self.count else items[:0]

    def own(self, results: Sequence[T]) -> Sequence[T]:
        """Of the engine's results, which all of its processes have, those that this one hands on."""
        return results[self.world.rank % self.shared_by :: self.shared_by]

    def collected(self, parts: Sequence[Sequence[T]]) -> list[T]:
        """What all processes hand on, [size][...], in the order of the items."""
        results: list[T | None] = [None] * sum(map(len, parts))
        for rank, part in enumerate(parts[: self.count * self.shared_by]):
            engine, place = divmod(rank, self.shared_by)
            results[engine + place * self.count :: self.count * self.shared_by] = part
        return results  # type: ignore[return-value]  # every place has been filled

    def check_alike(self, values: Sequence[str], complaint: str) -> None:
        """StaleEngineError, in every process, unless those that share an engine have the same value; values: [size]."""
        if self.shared_by == 1:
            return
        for first in range(0, self.world.size, self.shared_by):
            group = values[first : first + self.shared_by]
            if len(set(group)) > 1:
                raise StaleEngineError(
                    f"processes {first} to {first + self.shared_by - 1}, which share an engine, {complaint}; nothing "
                    "was trained on these samples, and without --engine-tp each process has an engine of its own."
                )


def digest(items: Iterable[object]) -> str:
    """A few letters that differ where the items do, or their order."""
    return blake2b(repr([*items]).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True)
class Columns:
    """Completions on their way: two arrays of numbers instead of two objects per token."""

    token_ids: np.ndarray  # i32 [tokens]
    logprobs: np.ndarray  # f64 [tokens]
    lengths: list[int]
    words: list[tuple[str, str]]  # finish_reason and text

    @classmethod
    def of(cls, completions: Sequence[Completion]) -> Columns:
        """Packs them."""
        return cls(
            np.array([token for c in completions for token in c.token_ids], dtype=np.int32),
            np.array([value for c in completions for value in c.logprobs], dtype=np.float64),
            [len(c.token_ids) for c in completions],
            [(c.finish_reason, c.text) for c in completions],
        )

    def completions(self) -> list[Completion]:
        """Unpacks them."""
        found, start = [], 0
        for length, (reason, text) in zip(self.lengths, self.words, strict=True):
            ids, values = (column[start : start + length].tolist() for column in (self.token_ids, self.logprobs))
            found.append(Completion(tuple(ids), tuple(values), reason, text))
            start += length
        return found
