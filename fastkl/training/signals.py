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
    """Set by SIGINT or SIGTERM: the step under way is finished and saved. A second signal interrupts at once."""

    requested: bool = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


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
