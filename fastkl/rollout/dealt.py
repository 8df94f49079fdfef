"""Requests dealt out: each process's engine draws its part, and every process gets all completions.

In: the requests of a step, the same ones in every process. Out: their completions, in order. A request carries its
place and its seed, so that it draws the same wherever it is drawn: a step's samples are those of one process. Every
size-th request goes to one engine, so that a prompt whose samples are long keeps none of them longer than the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastkl.distributed.world import World
from fastkl.rollout.generator import Generator
from fastkl.rollout.requests import Request
from fastkl.types import Completion


def generate(generator: Generator, requests: Sequence[Request], world: World) -> list[Completion]:
    """One completion for each request, in order; every process must come here with the same requests."""
    if world.size == 1:
        return generator.generate(requests)
    with world.together():
        drawn = generator.generate(world.dealt(requests))
    return collected(Columns.of(drawn), world) or []


def collected(drawn: Columns | None, world: World) -> list[Completion] | None:
    """All processes' completions, in the order of the requests; None where one of the processes has drawn none."""
    parts = world.everybodys(drawn)
    found = [part.completions() for part in parts if part is not None]
    return world.collected(found) if len(found) == len(parts) else None


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
