"""Signals that end a run politely: the step under way is finished and saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Ctrl-C, a polite kill, a lost terminal, and a batch system's warning."""


@dataclass(slots=True)
class StopRequest:
    """Set by one of SIGNALS: the step under way is finished and saved. A second signal interrupts at once, but not
    between `hold` and `release`, while weights, counters, random states and logs change from one step's to the next's;
    a third one interrupts there, too, should an engine or a callback hang.
    """

    say: Callable[[str], None] = lambda message: None
    requested: bool = False
    held: bool = False
    waiting: bool = False  # an interruption that came while held

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.requested and not self.held or self.waiting:
            raise KeyboardInterrupt
        self.waiting = self.requested
        if not self.requested:
            self.requested = True  # before it is said: the next signal may come at once
            name = signal.Signals(number).name
            self.say(f"{name}: this step is finished and saved, then the run ends; a second signal ends it at once.")

    def hold(self) -> None:
        """From here on nothing is interrupted."""
        self.held = True

    def release(self) -> None:
        """Interrupts if that was asked for in the meantime."""
        self.held = False
        if self.waiting:
            raise KeyboardInterrupt


@contextmanager
def stop_request(say: Callable[[str], None]) -> Iterator[StopRequest]:
    """Routes SIGNALS to a StopRequest; the former handlers return afterwards. say: shows a person what will happen.

    Outside of the main thread, where Python has no signal handlers, nothing is routed.
    """
    stop = StopRequest(say)
    numbers = SIGNALS if threading.current_thread() is threading.main_thread() else ()
    previous: Sequence[tuple[int, Any]] = [(number, signal.signal(number, stop)) for number in numbers]
    try:
        yield stop
    finally:
        for number, handler in previous:
            signal.signal(number, handler)
