"""Where a step's time goes, the same way for every trainer: functions are wrapped, and on a GPU timed by its events.

`StageClock.wrap(owner, name, stage)` puts a timed function in the place of owner.name. Events cost no waiting, so a
step is as fast as without them; what lies between two events is the GPU's time, its idle moments included.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

ANNOTATION = "stage:"  # begins the name of a stage in a profile


class StageClock:
    """Seconds per stage of the step that is running. A stage inside of another one is not counted again."""

    def __init__(self) -> None:
        self.on_gpu = torch.cuda.is_available()
        self.profiling = False  # then stages wait for the GPU, so that its work lies within them
        self._spans: list[tuple[str, Any, Any]] = []
        self._inside = False

    def wrap(self, owner: Any, name: str, stage: str | Callable[[], str]) -> None:
        """owner.name is timed from now on, as `stage`, or as what stage() says at each call."""
        original = getattr(owner, name)

        @wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return original(*args, **kwargs)
            called = stage if isinstance(stage, str) else stage()
            self._inside = True
            start = self._mark()
            try:
                with torch.profiler.record_function(ANNOTATION + called):
                    return original(*args, **kwargs)
            finally:
                self._spans.append((called, start, self._mark()))
                self._inside = False

        setattr(owner, name, timed)

    def take(self) -> dict[str, float]:
        """The seconds per stage since the last call. Waits for the GPU."""
        synchronize()
        spans, self._spans = self._spans, []
        seconds: dict[str, float] = {}
        for stage, start, end in spans:
            took = start.elapsed_time(end) / 1000 if self.on_gpu else end - start
            seconds[stage] = seconds.get(stage, 0.0) + took
        return seconds

    def _mark(self) -> Any:
        if self.profiling:
            synchronize()
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def synchronize() -> None:
    """Waits for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
