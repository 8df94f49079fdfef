"""What becomes of a server's engine when the server is killed: it ends, too.

vLLM's server has its engine in a process of its own, whose workers may be processes again. It ends them when it ends;
but after a SIGKILL, of the kernel's for want of memory for example, they stay, with the GPU's memory, and the server
that is started again in its place finds no room. So each worker waits for the server's end.
"""

from __future__ import annotations

import os
import select
import signal
import threading
from contextlib import suppress

SERVER = "FASTKL_SERVER_PROCESS"
"""The environment variable that names the server's process to its engine's ones."""


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
