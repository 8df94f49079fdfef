"""World: the processes of a run, as its stages see them.

`World()` is a process alone: it has no process group, and every method gives back what it got. `Team` (team.py) is one
of several. So no stage asks how many there are: it exchanges, and goes on with what came back.

Every process runs the same code on the same settings and draws the same prompts. Work is divided by `share`, and every
process gets everybody's results in the same order, so that all of them decide alike. The process of rank 0 is the only
one that writes files and speaks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


AGREED = "fastkl_agreed"
"""The attribute of an exception that all processes know of; the first one tells the user."""


class LostProcess(RuntimeError):
    """Another process of the run has ended, or cannot be reached."""


class OtherFailed(RuntimeError):
    """Another process has raised what is no message for users."""


@dataclass(frozen=True)
class World:
    """One process alone; also what all of them have in common."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among the processes of this machine: the number of its GPU
    one_machine: bool = True
    local_size: int = 1  # processes of this machine, where there are several

    @property
    def is_first(self) -> bool:
        """Whether this process writes and speaks."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part of the items: a run of them, as long as the others' or one longer."""
        first, end = (rank * len(items) // self.size for rank in (self.rank, self.rank + 1))
        return items[first:end]

    def everybodys(self, value: T) -> list[T]:
        """The values of all processes, in the order of their ranks. Every process must come here."""
        return [value]

    def gathered(self, items: Sequence[T]) -> list[T]:
        """The items of all processes, one process's after another's."""
        return [item for part in self.everybodys(items) for item in part]

    def once(self, function: Callable[[], T]) -> T:
        """What the function returns, or raises, in the first process; the others do not call it."""
        return function()

    def any(self, flag: bool) -> bool:
        """Whether it is so in any process."""
        return any(self.everybodys(flag))

    def add_up(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replaces each tensor by the sum of all processes' ones, in place."""

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is raised inside, in whatever process, is raised in all of them."""
        yield

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """The loss of another process does not interrupt what is done inside."""
        yield

    def remaining(self) -> World:
        """The processes that can still be spoken to: all, or after a loss this one alone."""
        return self

    def close(self) -> None:
        """Says goodbye; may be called twice."""


ALONE = World()
