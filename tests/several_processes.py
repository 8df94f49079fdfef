"""Starts a function in several processes that find each other as torchrun's do; for the tests of fastkl/distributed.

The processes are forked from one server that has imported everything (warm.py) and computed nothing, so that a start
takes a tenth of a second.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["warm"])


@dataclass
class Ended:
    """What became of one process."""

    code: int | None  # minus the signal's number for one that was killed; None: it did not end
    result: Any = None
    error: str = ""  # "Type: message" of what it raised
    seconds: float = 0.0  # from the start of all
    output: str = ""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def begin(process: Any) -> None:
    """Starts a process; the first one starts the server, which has to find warm.py."""
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, [before])])
    try:
        process.start()
    finally:
        os.environ["PYTHONPATH"] = before
    if not before:
        del os.environ["PYTHONPATH"]


def _work(function: Callable, arguments: tuple, environment: dict[str, str], output: str, pipe) -> None:
    assert "warm" in sys.modules
    os.environ |= environment
    file = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    import torch

    torch.set_num_threads(1)
    code, result, error = 0, None, ""
    try:
        result = function(*arguments)
    except BaseException as failure:
        traceback.print_exc()
        error, code = f"{type(failure).__name__}: {failure}", 1
    pipe.send_bytes(pickle.dumps((result, error)))  # tensors by value: this process is about to end
    sys.stdout.flush()
    from fastkl.distributed.start import launched

    launched().close()
    os._exit(code)


class Processes:
    """Some processes under way."""

    def __init__(self, size: int, folder: Path, function: Callable, *arguments: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        port, self.began = free_port(), time.monotonic()
        self.outputs = [folder / f"output-{rank}.txt" for rank in range(size)]
        self.started = []
        for rank in range(size):
            environment = {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
            }  # fmt: skip
            here, there = CONTEXT.Pipe()
            work = (function, arguments, environment, str(self.outputs[rank]), there)
            process = CONTEXT.Process(target=_work, args=work)
            begin(process)
            there.close()
            self.started.append((process, here))

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        os.kill(self.started[rank][0].pid, number)

    def ended(self, timeout: float = 240.0) -> list[Ended]:
        """Waits for all of them; those that do not end in time are killed and have no exit code."""
        found: dict[int, Ended] = {}
        said: dict[int, tuple[Any, str]] = {}
        while len(found) < len(self.started):
            for rank, (process, pipe) in enumerate(self.started):
                if rank in found:
                    continue
                is_over = process.exitcode is not None or time.monotonic() - self.began > timeout
                if rank not in said and pipe.poll():  # at once: a process waits until much has been read
                    with suppress(EOFError):
                        said[rank] = pickle.loads(pipe.recv_bytes())
                if is_over:
                    result, error = said.get(rank, (None, ""))
                    code, seconds = process.exitcode, time.monotonic() - self.began
                    process.kill()
                    output = self.outputs[rank].read_text() if self.outputs[rank].exists() else ""
                    found[rank] = Ended(code, result, error, seconds, output)
            time.sleep(0.02)
        return [found[rank] for rank in range(len(self.started))]


def run_in(size: int, folder: Path, function: Callable, *arguments: Any) -> list[Any]:
    """What the function returns in each of `size` processes, all of which must succeed."""
    ended = Processes(size, folder, function, *arguments).ended()
    for rank, process in enumerate(ended):
        assert process.code == 0, f"process {rank}: {process.error or process.code}\n{process.output[-3000:]}"
    return [process.result for process in ended]
