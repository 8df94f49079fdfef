"""Runs reward functions and waits for them, no longer than they may take.

In: the calls of one step. Out: what each returned, and its wall time. Async functions start first and run together in
an event loop that lives as long as the process, so that clients can be kept open; the others run one after another
meanwhile. An async function that is late is cancelled. A plain one runs in the main thread and is interrupted by a
signal of its own (SIGVTALRM), which ends whatever Ctrl-C would end: sleeps, sockets, processes, loops, regular
expressions. Elsewhere Python has no signals: there it gets a thread, and a late one is left behind.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import queue
import signal
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from time import monotonic
from types import FrameType
from typing import Any, NoReturn

GRACE_SECONDS = 2.0
"""What a cancelled async function may take to end."""


@dataclass(frozen=True, slots=True)
class Call:
    """One function with its arguments bound. It raises what its caller should see."""

    name: str
    function: Callable[[], Any]
    is_async: bool


@dataclass(frozen=True, slots=True)
class Returned:
    """What a call returned."""

    value: Any
    seconds: float  # wall time


class TookTooLong(BaseException):
    """A call exceeded its time; no Exception, which the called function might catch."""

    def __init__(self, name: str = "", aftermath: str = "") -> None:
        super().__init__(name)
        self.name, self.aftermath = name, aftermath  # what has become of the call, in a sentence; empty if it ended


def run_all(calls: Sequence[Call], timeout: float) -> list[Returned]:
    """What the calls returned, in their order. Raises what the first failing one raises, TookTooLong for a late one.

    timeout: seconds for each; 0 waits as long as it takes.
    """
    waiting: dict[int, Future[Returned]] = {}
    returned: dict[int, Returned] = {}
    try:
        for i in sorted(range(len(calls)), key=lambda i: not calls[i].is_async):
            began = monotonic()
            value = calls[i].function() if calls[i].is_async else run(calls[i], timeout)
            if inspect.isawaitable(value):
                waiting[i] = asyncio.run_coroutine_threadsafe(awaited(value, calls[i], began, timeout), event_loop())
            else:
                returned[i] = Returned(value, monotonic() - began)
        for i, future in waiting.items():
            returned[i] = result_of(future, calls[i], timeout)
    finally:
        for future in waiting.values():
            future.cancel()
    return [returned[i] for i in range(len(calls))]


@contextmanager
def exits_raised() -> Iterator[None]:
    """os._exit raises SystemExit meanwhile, so that a function that ends the process is named and nothing is lost.

    A child process that was forked from here ends as ever.
    """
    ends, process = os._exit, os.getpid()

    def raises(status: int) -> NoReturn:
        if os.getpid() != process:
            ends(status)
        raise SystemExit(status)

    os._exit = raises
    try:
        yield
    finally:
        os._exit = ends


def run(call: Call, timeout: float) -> Any:
    """What a plain function returns. Raises TookTooLong."""
    if not timeout:
        return call.function()
    if threading.current_thread() is not threading.main_thread():
        return run_in_thread(call, timeout)
    with interrupted_after(timeout, call.name):
        return call.function()


@contextmanager
def interrupted_after(seconds: float, name: str) -> Iterator[None]:
    """Raises TookTooLong in the main thread's code once `seconds` have passed, and again while it is caught there.

    A thread sends the signal. It cannot while C code keeps the interpreter to itself, as a regular expression does;
    that takes processor time, so a timer of processor time sends it, too.
    """
    deadline, done = monotonic() + seconds, threading.Event()

    def strike(number: int, frame: FrameType | None) -> None:
        if monotonic() >= deadline and not done.is_set():
            raise TookTooLong(name)

    def watch() -> None:
        pause = seconds
        while not done.wait(pause):
            signal.pthread_kill(main, signal.SIGVTALRM)
            pause = 1.0

    main = threading.get_ident()
    watcher = threading.Thread(target=watch, name="fastkl-reward-timeout", daemon=True)
    before = signal.signal(signal.SIGVTALRM, strike)
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 1.0)
        watcher.start()
        try:
            yield
        finally:
            done.set()
    finally:  # though a strike came before the line above
        done.set()
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        if watcher.ident is not None:
            watcher.join()
        signal.signal(signal.SIGVTALRM, signal.SIG_IGN)  # takes back one that is on its way: by default it would kill
        signal.signal(signal.SIGVTALRM, before or signal.SIG_DFL)


def run_in_thread(call: Call, timeout: float) -> Any:
    """What a plain function returns from a thread of its own. Raises TookTooLong; the thread goes on then."""
    results: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            results.put((call.function(), None))
        except BaseException as failure:  # for the thread that waits
            results.put((None, failure))

    threading.Thread(target=work, name=f"fastkl-reward-{call.name}", daemon=True).start()
    try:
        value, failure = results.get(timeout=timeout)
    except queue.Empty:
        raise TookTooLong(call.name, "Its thread goes on until this process ends.") from None
    if failure is not None:
        raise failure
    return value


async def awaited(value: Awaitable[Any], call: Call, began: float, timeout: float) -> Returned:
    """The result of an async function that began at `began`, cancelled after `timeout` seconds."""
    try:
        async with asyncio.timeout(timeout or None):
            return Returned(await value, monotonic() - began)
    except TimeoutError:  # the calls' own ones have become other errors
        raise TookTooLong(call.name) from None


def result_of(future: Future[Returned], call: Call, timeout: float) -> Returned:
    """The result of `awaited`. Raises TookTooLong, also where the function does not heed its cancellation."""
    try:
        return future.result(timeout + GRACE_SECONDS if timeout else None)
    except TimeoutError:
        event_loop.cache_clear()  # it may be blocked for good
        raise TookTooLong(call.name, "It could not be cancelled and goes on until this process ends.") from None


@cache
def event_loop() -> asyncio.AbstractEventLoop:
    """The loop of all async functions, in a thread of its own."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="fastkl-async-rewards", daemon=True).start()
    return loop
