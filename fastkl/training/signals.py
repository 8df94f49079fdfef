"""SIGINT and SIGTERM: the step under way is finished and saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any


@dataclass(slots=True)
class StopRequest:
    """Set by SIGINT or SIGTERM: the step under way is finished and saved. A second signal interrupts at once, but not
    between `hold` and `release`, while weights, counters and random states change from one step's to the next's.
    """

    requested: bool = False
    held: bool = False
    waiting: bool = False  # an interruption that came while held

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.requested and not self.held:
            raise KeyboardInterrupt
        self.waiting = self.requested
        self.requested = True

    def hold(self) -> None:
        """From here on nothing is interrupted."""
        self.held = True

    def release(self) -> None:
        """Interrupts if that was asked for in the meantime."""
        self.held = False
        if self.waiting:
            raise KeyboardInterrupt


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Routes SIGINT and SIGTERM to a StopRequest; the former handlers return afterwards.

    Outside of the main thread, where Python has no signal handlers, nothing is routed.
    """
    stop = StopRequest()
    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    previous: Sequence[tuple[int, Any]] = [(number, signal.signal(number, stop)) for number in numbers]
    try:
        yield stop
    finally:
        for number, handler in previous:
            signal.signal(number, handler)
