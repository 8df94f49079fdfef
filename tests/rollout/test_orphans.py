"""A server that is killed takes its engine's processes along, and one whose engine is killed ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

WORKER = "import time; from fastkl.rollout.orphans import end_with_server; end_with_server(); print(1, flush=True); "
BETWEEN = (
    "import subprocess, sys, os, time; print(os.getpid(), flush=True); subprocess.run([sys.executable, '-c', {!r}]); "
    "time.sleep(60)"
)


def is_over(pid: int) -> bool:
    """A process that has ended, and that nobody may have waited for yet."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize("depth", [1, 2])
def test_an_engine_ends_with_a_server_that_is_killed_and_so_does_a_process_between_the_two(depth):
    worker = f"import os; print(os.getpid(), flush=True); {WORKER} time.sleep(60)"
    for _ in range(depth):
        worker = BETWEEN.format(worker)
    server = subprocess.Popen(
        [sys.executable, "-c", f"import os; os.environ['FASTKL_SERVER_PROCESS'] = str(os.getpid()); {worker}"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    pids = [int(server.stdout.readline()) for _ in range(depth + 1)]
    assert server.stdout.readline() == "1\n" and pids[0] == server.pid
    os.kill(server.pid, signal.SIGKILL)
    server.wait()
    deadline = time.monotonic() + 20
    while not all(map(is_over, pids)):
        assert time.monotonic() < deadline, "a process outlives the server"
        time.sleep(0.02)


SERVER = """
import multiprocessing, os, threading, time
from fastkl.rollout import orphans

orphans.GRACE_SECONDS = {grace}
engine = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True)
engine.start()
orphans.EndWithEngine(None)
print(engine.pid, flush=True)
threading.Event().wait({answered})
"""


@pytest.mark.parametrize(("answered", "code"), [(60, 1), (1, 0)])
def test_a_server_that_waits_for_its_dead_engine_ends_and_one_that_does_not_ends_by_itself(answered, code):
    """Of the latter the engine is dead, too, and it has more time than it needs."""
    source = SERVER.format(grace=0.2 if code else 30, answered=answered)
    server = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    os.kill(int(server.stdout.readline()), signal.SIGKILL)
    assert server.wait(20) == code
    assert ("the engine has ended, and so does its server" in server.stderr.read()) is bool(code)
