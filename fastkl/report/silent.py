"""Log and view of a process that neither writes nor speaks, where a run has several."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

from fastkl.distributed.world import World
from fastkl.report.loggers import Metrics, RunLog, Sample
from fastkl.report.terminal import View


class SilentLog(RunLog):
    """Writes nothing."""

    def __init__(self) -> None:
        pass

    def log(self, metrics: Metrics, samples: Iterable[Sample]) -> None:
        """Nothing."""

    def digests(self) -> dict[str, str]:
        """Of no file."""
        return {}

    def log_evaluation(self, step: int, samples: Iterable[Sample]) -> None:
        """Nothing."""

    def flush(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class SilentView(View):
    """Shows nothing."""

    def __init__(self) -> None:
        self.first_step = 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        pass

    def recall(self, earlier: Iterable[Mapping[str, Any]]) -> None:
        """Nothing."""

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Nothing."""

    def samples(self, samples: Sequence[Mapping[str, Any]]) -> None:
        """Nothing."""

    def note(self, message: str) -> None:
        """Nothing."""

    def close_with(self, message: str) -> None:
        """Nothing."""


def log_of(world: World, make: Callable[[], RunLog]) -> RunLog:
    """The first process's log is real."""
    return make() if world.is_first else SilentLog()


def view_of(world: World, make: Callable[[], View]) -> View:
    """The first process's view is real."""
    return make() if world.is_first else SilentView()
