"""Worlds whose processes are threads of this one: the logic of several processes without their start."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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


def in_threads(size: int, function: Callable[[World], object]) -> list:
    """What the function returns in each of `size` threads."""
    table = Table(size)
    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(function, Threads(rank, size, rank, True, size, table)) for rank in range(size)]
        return [future.result(60) for future in futures]
