"""A thread that makes this process's collective calls, one after another.

A collective call that is given up in the middle leaves the others out of step: their next call meets the wrong one. A
signal may interrupt the main thread at any line. So the calls are made here, where no signal interrupts them, and the
main thread waits; if it is interrupted, the call goes on to its end, and the next one waits for it.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class Courier:
    """Runs functions in a thread of its own, in the order in which they come."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        # a daemon: one that waits for a lost process must not keep this one from ending
        threading.Thread(target=self._work, name="fastkl-collectives", daemon=True).start()

    def call(self, function: Callable[[], T], timeout: float | None = None) -> T:
        """What the function returns or raises. TimeoutError where that takes longer than `timeout` seconds."""
        result: Future[T] = Future()
        self._calls.put((result, function))
        return result.result(timeout)

    def _work(self) -> None:
        while True:
            result, function = self._calls.get()
            try:
                result.set_result(function())
            except BaseException as failure:  # for the thread that waits
                result.set_exception(failure)
