"""Rewards that hang, for real: each kind ends in time, is named, and leaves the process as it was."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from test_rewards import rollouts

from fastkl.errors import UserError
from fastkl.rewards.call import compute_rewards
from fastkl.rewards.load import RewardFunction


class Sleeping(BaseHTTPRequestHandler):
    """Takes a request and answers nothing."""

    def do_GET(self):
        self.server.asked.append(self.path)
        self.server.released.wait(60)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def sleeping_server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Sleeping)
    server.daemon_threads, server.asked, server.released = True, [], threading.Event()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()


def sleeps(completions):
    time.sleep(60)


def spins(completions):
    while True:
        pass


def catches_all_exceptions(completions):
    for _ in range(60):
        with contextlib.suppress(Exception):
            time.sleep(1)


def backtracks(completions):
    """A regular expression that takes 2^60 steps and keeps the interpreter to itself meanwhile."""
    re.match(r"(a+)+$", "a" * 60 + "b")


def reads_a_socket(completions):
    ours, _theirs = socket.socketpair()
    ours.recv(1)


def waits_for_a_process(completions):
    subprocess.run(["sleep", "60"])


def waits_for_a_lock(completions):
    threading.Event().wait()


def late(function, seconds: float = 0.2) -> str:
    """What is said of a function that hangs."""
    began = time.monotonic()
    with pytest.raises(UserError) as refused:
        compute_rewards([RewardFunction("judge", function)], *rollouts([["a", "b"]]), step=3, timeout=seconds)
    assert seconds <= time.monotonic() - began < seconds + 5
    assert f"judge had not returned after {seconds:g} s at step 3" in str(refused.value)
    assert "--reward-timeout" in str(refused.value) and "\n" not in str(refused.value)
    return str(refused.value)


HANGING = [
    sleeps, spins, catches_all_exceptions, backtracks, reads_a_socket, waits_for_a_process, waits_for_a_lock,
]  # fmt: skip


@pytest.mark.parametrize("function", HANGING, ids=lambda function: function.__name__)
def test_a_function_that_hangs_is_interrupted(function):
    before = signal.getsignal(signal.SIGVTALRM)
    assert "goes on" not in late(function)
    assert signal.getsignal(signal.SIGVTALRM) is before and signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


def test_a_request_to_a_server_that_does_not_answer_is_interrupted(sleeping_server):
    def judge(completions):
        return urllib.request.urlopen(f"http://127.0.0.1:{sleeping_server.server_port}/score").read()

    late(judge)
    assert sleeping_server.asked == ["/score"]


def test_outside_of_the_main_thread_a_late_function_is_left_behind():
    said, released = [], threading.Event()
    worker = threading.Thread(target=lambda: said.append(late(lambda completions: released.wait(60))))
    worker.start()
    worker.join(20)
    released.set()
    assert "Its thread goes on until this process ends." in said[0]


def test_a_late_async_function_is_cancelled_and_the_next_one_runs():
    cancelled = []

    async def judge(completions):
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    async def prompt(completions):
        return [1.0] * len(completions)

    assert "goes on" not in late(judge) and cancelled == [True]
    result = compute_rewards([RewardFunction("f", prompt)], *rollouts([["a", "b"]]), step=1, timeout=5.0)
    assert result.total.tolist() == [[1.0, 1.0]]


def test_an_async_function_that_blocks_the_loop_is_left_behind_and_the_next_one_runs():
    released = threading.Event()

    async def judge(completions):
        released.wait(60)

    async def prompt(completions):
        return [1.0] * len(completions)

    assert "could not be cancelled" in late(judge)
    result = compute_rewards([RewardFunction("f", prompt)], *rollouts([["a", "b"]]), step=1, timeout=5.0)
    released.set()
    assert result.total.tolist() == [[1.0, 1.0]]


def test_sys_exit_in_an_async_function_is_named_and_the_next_one_runs():
    async def judge(completions):
        raise SystemExit(3)

    async def prompt(completions):
        return [1.0] * len(completions)

    with pytest.raises(UserError, match=r"judge failed at step 3 .*SystemExit: 3"):
        compute_rewards([RewardFunction("judge", judge)], *rollouts([["a"]]), step=3)
    assert compute_rewards([RewardFunction("f", prompt)], *rollouts([["a"]]), step=1).total.tolist() == [[1.0]]


def test_a_function_with_an_alarm_of_its_own_keeps_it():
    """What answer checkers do that bound each answer by signal.alarm, which exists in the main thread only."""
    rang = []

    def judge(completions):
        before = signal.signal(signal.SIGALRM, lambda number, frame: rang.append(number))
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        time.sleep(0.3)
        signal.signal(signal.SIGALRM, before)
        return [1.0] * len(completions)

    result = compute_rewards([RewardFunction("judge", judge)], *rollouts([["a", "b"]]), step=1, timeout=5.0)
    assert rang == [signal.SIGALRM] and result.total.tolist() == [[1.0, 1.0]]


def test_functions_that_wait_overlap_with_each_other_and_with_those_that_do_not():
    began, ended = [], []

    async def asks(completions):
        began.append(time.monotonic())
        await asyncio.sleep(0.5)
        ended.append(time.monotonic())
        return [1.0] * len(completions)

    def computes(completions):
        began.append(time.monotonic())
        time.sleep(0.5)
        ended.append(time.monotonic())
        return [2.0] * len(completions)

    functions = [RewardFunction("a", asks), RewardFunction("b", computes), RewardFunction("c", asks)]
    result = compute_rewards(functions, *rollouts([["a", "b"]]), step=1)
    assert len(began) == 3 and max(began) < min(ended)
    assert result.total.tolist() == [[4.0, 4.0]]


def test_os_exit_is_named_and_a_forked_child_ends_as_ever():
    def leaves(completions):
        child = os.fork()
        if not child:
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        os._exit(3)

    ends = os._exit
    with pytest.raises(UserError, match=r"leaves failed at step 3 .*SystemExit: 3"):
        compute_rewards([RewardFunction("leaves", leaves)], *rollouts([["a"]]), step=3)
    assert os._exit is ends


SPINNING = """
from fastkl.rewards.waiting import Call, TookTooLong, run_all
def spins():
    while True:
        pass
late = 0
for _ in range(60):
    try:
        run_all([Call("spins", spins, is_async=False)], 0.02)
    except TookTooLong:
        late += 1
print(late)
"""


@pytest.mark.slow
def test_the_clock_and_the_timer_of_processor_time_may_strike_at_once_and_do_not_kill():
    """A signal that was on its way when the handler had been put back would end the process."""
    done = subprocess.run([sys.executable, "-c", SPINNING], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "60\n"), done.stderr
