"""What becomes of a server's engine when the server is killed, and of the server when its engine is: it ends, too.

vLLM's server has its engine in a process of its own, whose workers may be processes again. It ends them when it ends;
but after a SIGKILL, of the kernel's for want of memory for example, they stay, with the GPU's memory, and the server
that is started again in its place finds no room. So each worker waits for the server's end.

The other way round, the server ends once all that it has been asked for is answered. What an engine was doing when it
was killed, taking weights for example, is never answered: the server stays, without an engine, and nobody starts
another one in its place. So the server waits for its engine's end, and a little longer.
"""

from __future__ import annotations

import multiprocessing
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from multiprocessing.connection import wait
from typing import Any

SERVER = "FASTKL_SERVER_PROCESS"
"""The environment variable that names the server's process to its engine's ones."""

GRACE_SECONDS = 10.0
"""How long a server may take to end after its engine: vLLM says why it does."""


def end_with_server() -> None:
    """From now on this process ends when the server does, and so does one between the two."""
    if SERVER not in os.environ:  # vLLM was not started by `fastkl serve`
        return
    pid, parent = int(os.environ[SERVER]), os.getppid()
    server = os.pidfd_open(pid)

    def wait() -> None:
        select.select([server], [], [])
        if pid != parent == os.getppid():  # else it has ended already, and its number may be another's
            with suppress(ProcessLookupError):
                os.kill(parent, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=wait, name="fastkl-server", daemon=True).start()


def end_with_engine() -> None:
    """From now on this process ends when one of those that it has started by multiprocessing has ended."""
    engines = [process.sentinel for process in multiprocessing.active_children()]

    def ended() -> None:
        wait(engines)
        time.sleep(GRACE_SECONDS)
        print("fastkl: the engine has ended, and so does its server.", file=sys.stderr, flush=True)
        os._exit(1)

    if engines:
        threading.Thread(target=ended, name="fastkl-engine", daemon=True).start()


class EndWithEngine:
    """What vLLM's server takes along as a layer of its application, which it makes when its engine is there."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app
        end_with_engine()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.app(scope, receive, send)
