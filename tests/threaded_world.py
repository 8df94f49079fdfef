"""Worlds whose processes are threads of this one: the logic of several processes without their start."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from fastkl.distributed.world import World


@dataclass
class Table:
    """Where threads lay down what they exchange."""

    size: int
    values: list = field(default_factory=list)

    def __post_init__(self):
        self.values = [None] * self.size
        self.barrier = threading.Barrier(self.size)


@dataclass(frozen=True)
class Threads(World):
    """One of several threads."""

    table: Table = None

    def everybodys(self, value):
        self.table.values[self.rank] = value
        self.table.barrier.wait(20)
        found = list(self.table.values)
        self.table.barrier.wait(20)
        return found

    def once(self, function):
        return self.everybodys(function() if self.is_first else None)[0]

    def add_up(self, tensors):
        for tensor in tensors:
            total = sum(self.everybodys(tensor.clone()))
            tensor.copy_(total)

    @contextmanager
    def together(self):
        try:
            yield
        except BaseException:
            self.table.barrier.abort()
            raise


class Agreeing(Threads):
    """One that exchanges failures, too, as a `Team` does: what one raises, all raise at their next exchange."""

    def everybodys(self, value):
        return self._exchange(None, value)

    def once(self, function):
        with self.together():
            result = function() if self.is_first else None
        return self.everybodys(result)[0]

    @contextmanager
    def together(self):
        try:
            yield
        except Exception as failure:
            if not hasattr(failure, "is_told"):
                failure.is_told = True
                with suppress(type(failure)):
                    self._exchange(failure, None)
            raise

    def _exchange(self, failure, value):
        found = super().everybodys((failure, value))
        for theirs, _ in found:
            if theirs is not None:
                raise theirs
        return [theirs for _, theirs in found]


def in_threads(size: int, function: Callable[[World], object], kind: type[Threads] = Threads) -> list:
    """What the function returns in each of `size` threads."""
    table = Table(size)
    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(function, kind(rank, size, rank, True, size, table)) for rank in range(size)]
        return [future.result(60) for future in futures]
