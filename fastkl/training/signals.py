"""SIGINT and SIGTERM: the step under way is finished and saved."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any


@dataclass(slots=True)
class StopRequest:
    """Set by SIGINT or SIGTERM: the step under way is finished and saved. A second signal interrupts at once."""

    requested: bool = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Routes SIGINT and SIGTERM to a StopRequest; the former handlers return afterwards."""
    stop = StopRequest()
    previous: Sequence[tuple[int, Any]] = [(n, signal.signal(n, stop)) for n in (signal.SIGINT, signal.SIGTERM)]
    try:
        yield stop
    finally:
        for number, handler in previous:
            signal.signal(number, handler)
