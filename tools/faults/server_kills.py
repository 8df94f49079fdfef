"""Servers of vLLM that are killed under a run, and started again at the same address.

A run has two servers. One of them is killed, or its engine, or its engine's worker, which are processes of their own:
while it draws, while weights are on their way to it, or between two steps. The other one goes on; the trainer waits at
the end of a later step until the one that was killed is there again, so that it has to be given the weights, to be
compared, and to draw, before the run ends. The run has to end by itself, bit for bit as one that nothing has happened
to (servers.py says why it can).

The moments are those of an undisturbed run, as the trainer's process sees them (`Witness`): one of them is drawn, and
the kill follows it after a random time. `make faults` says what was really under way then.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tools.faults import runs
from tools.faults.fault import Bench, Row
from tools.faults.servers import MAX_RUN_S, VICTIMS, Server, Whole, asking_for_one, job, served, skipped

KINDS = {"asked": 0.15, "sent": 0.02, "ended": 0.1}
"""What the trainer does at a moment (it asks for a completion, sends weights, ends a step), and how many seconds later
the kill comes at the latest."""

WAYS = ("network", "folder", "network")
CHUNK_BYTES = 1 << 18  # of weights over the network: some thirty for the embedded model
LAST_STEP = runs.STEPS - 5  # a server is killed within this many: one later step is without it, two have it back
ANEW = 5  # every so many times a server is started by the command itself
WIDE_TOKENS = 3  # of a completion by two workers, which wait for each other in turns where they share a core
PATIENCE_S = 900.0  # of a run without a server: a busy core takes minutes to start one
ALONE_S = 60.0  # how long a server may outlive its engine


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to happen to a run."""

    kind: str  # of KINDS
    step: int  # how many steps have ended before
    number: int  # of the moment among those of this kind in this step
    later_s: float
    url: str  # of the server
    pid: int  # of the process that is killed
    is_back: str  # a file that is there once the server is there again


class Witness:
    """In a run's process: writes down what it does, kills at the planned moment, and waits for the server's return."""

    def __init__(self, log: Path, plan: Plan | None) -> None:
        self.log, self.plan, self.step, self.killed_in = log.open("a"), plan, 0, runs.STEPS
        self.seen: Counter[tuple[str, int]] = Counter()
        self.under_way: Counter[str] = Counter()  # by server: completions; "": pushes

    def saw(self, kind: str, url: str = "") -> None:
        """A moment. url: of the server that is asked; weights go to all of them."""
        self.say(kind, url)
        plan = self.plan
        if plan is None or kind != plan.kind or url not in ("", plan.url):
            return
        if (kind, self.step, self.seen[kind, self.step]) == (plan.kind, plan.step, plan.number):
            threading.Timer(plan.later_s, self.kill).start()
        self.seen[kind, self.step] += 1

    def say(self, kind: str, url: str = "") -> None:
        self.log.write(json.dumps([kind, self.step, url]) + "\n")
        self.log.flush()

    def kill(self) -> None:
        """Now."""
        assert self.plan is not None
        doing = (
            "weights are sent" if self.under_way[""] else "it draws" if self.under_way[self.plan.url] else "it waits"
        )
        os.kill(self.plan.pid, signal.SIGKILL)
        self.killed_in = self.step
        self.say(f"killed while {doing}", self.plan.url)

    def ended(self) -> None:
        """A step. The one after that of the kill waits for the server."""
        self.saw("ended")
        self.step += 1
        while self.plan and self.step > self.killed_in + 1 and not os.path.exists(self.plan.is_back):
            time.sleep(0.05)

    @contextmanager
    def busy(self, with_what: str = ""):
        """Something takes its time."""
        self.under_way[with_what] += 1
        try:
            yield
        finally:
            self.under_way[with_what] -= 1


def watched(log: Path, plan: Plan | None) -> None:
    """In a run's process, before it begins: a witness sees what it does."""
    from fastkl.rollout import meeting, server, transfer, wire
    from fastkl.training.state import Run

    asking_for_one()
    server.PATIENCE_SECONDS = PATIENCE_S
    wire.CHUNK_BYTES = CHUNK_BYTES
    witness = Witness(log, plan)

    def around(owner: type, name: str, make: Callable[[Any], Any]) -> None:
        setattr(owner, name, make(getattr(owner, name)))

    def asked(post: Any) -> Any:
        async def after(self: Any, client: Any, there: Any, request: Any) -> Any:
            witness.saw("asked", there.url)
            with witness.busy(there.url):
                return await post(self, client, there, request)

        return after

    def sent(call: Any) -> Any:
        def after(*arguments: Any) -> Any:
            witness.saw("sent")
            return call(*arguments)

        return after

    def posted(post: Any) -> Any:
        async def after(*arguments: Any) -> Any:
            witness.saw("sent")
            return await post(*arguments)

        return after

    def pushed(push: Any) -> Any:
        def beside(*arguments: Any, **options: Any) -> Any:
            with witness.busy():
                return push(*arguments, **options)

        return beside

    def ended(record: Any) -> Any:
        def before(*arguments: Any) -> Any:
            record(*arguments)
            witness.ended()

        return before

    around(server.ServerGenerator, "post", asked)
    around(server.ServerGenerator, "fill", pushed)
    around(server.ServerGenerator, "fill_from_folder", sent)
    around(transfer.Transfer, "_post", posted)
    around(meeting.GlooGroup, "broadcast", sent)
    around(Run, "record", ended)


@dataclass(slots=True)
class Cast:
    """Who takes part in the runs of a row, and what these have shown."""

    servers: list[Server]
    ways: tuple[str, ...]  # of the weights
    processes: int = 1  # of the trainer
    moments: dict[str, Counter[tuple[str, int, str]]] = field(default_factory=dict)  # of an undisturbed run, by the way
    killed: Counter[str] = field(default_factory=Counter)  # processes, and while what

    def undisturbed(self, output: Path) -> runs.Child:
        """A run to the end; each takes another way."""
        way = self.ways[len(self.moments) % len(self.ways)]
        children = self.run(way, output, None)
        for child in children:
            child.wait(MAX_RUN_S)
        self.moments[way] = Counter(told(output))
        return next((child for child in children if child.code), children[0])

    def run(self, way: str, output: Path, plan: Plan | None) -> list[runs.Child]:
        """A run with a witness, under way: its processes."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        sizes = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(self.processes))

        def before(rank: int) -> None:
            if self.processes > 1:
                os.environ |= place | sizes | dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))
            watched(Path(os.devnull) if rank else events(output), None if rank else plan)

        words = job(self.servers, way)
        if self.processes > 1:
            words = (*job(self.servers, way, WIDE_TOKENS), "--shard", "full")
        return [runs.train(output, before=partial(before, rank), job=words) for rank in range(self.processes)]


def server_kills(bench: Bench) -> Row:
    """SIGKILL to one of two servers, or to a process of its engine; it is started again at once."""
    row = Row(
        "SIGKILL of a vLLM server under a run",
        "kill -9 of one of two servers, of its engine or of its worker, under a run that draws ahead: at a random "
        "moment of a random answer, push or end of a step; then `fastkl serve` again",
    )
    return killed(bench, row, WAYS, bench.times(20, 1), served(bench, 2)) if not skipped(row, bench) else row


def wide_server_kills(bench: Bench) -> Row:
    """The same with one server, which two workers share, and two processes that train."""
    row = Row(
        "SIGKILL of a vLLM server of two workers under a run of two processes",
        "the same for the only server of a run, of which two processes have the weights in pieces; they go over the "
        "network to both workers",
    )
    servers = served(bench, tensor_parallel_size=2)
    return killed(bench, row, WAYS[:1], bench.times(3, 1), servers, 2) if not skipped(row, bench) else row


def killed(
    bench: Bench,
    row: Row,
    ways: tuple[str, ...],
    times: int,
    opened: AbstractContextManager[list[Server]],
    processes: int = 1,
) -> Row:
    """The row, after so many runs each of which loses a server."""
    with opened as servers:
        cast = Cast(servers, ways, processes)
        whole = Whole.of(bench, cast.undisturbed)
        for trial in bench.trials():
            if row.runs >= times:
                break
            server_killed(bench, row, trial, cast, whole)
        bench.clear(whole.output)
    row.outcome = "ends by itself and bit for bit like an undisturbed run, with the server back; killed " + ", ".join(
        f"{count} × the {what}" for what, count in sorted(cast.killed.items())
    )
    return row


def events(output: Path) -> Path:
    """Where the run's witness writes."""
    return output.with_name(f"{output.name}.events")


def told(output: Path) -> list[tuple[str, int, str]]:
    """What it has written: (kind, steps that had ended, address)."""
    return [tuple(json.loads(line)) for line in events(output).read_text().splitlines()]


def was_killed(output: Path) -> str:
    """What its witness says of the kill, or nothing yet."""
    log = events(output).read_text() if events(output).exists() else ""
    return next((line.split('"')[1] for line in log.splitlines() if '"killed while ' in line), "")


def planned(
    rng: random.Random, kind: str, moments: Counter[tuple[str, int, str]], server: Server, pid: int, is_back: Path
) -> Plan:
    """A moment of this kind that an undisturbed run has."""
    step = rng.randrange(LAST_STEP + 1)
    many = sum(moments[kind, step, url] for url in ("", server.url))
    return Plan(kind, step, rng.randrange(many), rng.random() * KINDS[kind], server.url, pid, str(is_back))


def server_killed(bench: Bench, row: Row, trial: int, cast: Cast, whole: Whole) -> None:
    """One run, one of whose servers is killed."""
    rng, output = bench.random("server kills", trial), bench.output(f"server-kill-of-{len(cast.servers)}", trial)
    kind, way, server = list(KINDS)[trial % len(KINDS)], rng.choice(cast.ways), rng.choice(cast.servers)
    victim, begin = rng.choice(list(VICTIMS)), time.monotonic()
    is_back = output.with_name(f"{output.name}.back")
    if len(cast.servers) == 1:
        is_back.touch()  # without it the trainer waits anyway
    pids = server.pids_of(victim)
    plan = planned(rng, kind, cast.moments[way], server, pids[trial % len(pids)], is_back)
    children = cast.run(way, output, plan)
    wrong = watched_until_it_ends(server, children[0], output)
    server.start(by_fork=trial % ANEW != ANEW - 1)
    server.wait()
    is_back.touch()
    for child in children:
        wrong += [] if child.wait(MAX_RUN_S) else ["it does not end"]
        child.send(signal.SIGKILL)
        child.wait()
        wrong += runs.damaged_beyond_one_line(child, (0,))
    wrong += missing_in(children[0], told(output), server) or runs.differences(output, whole.output)
    row.runs += 1
    doing = was_killed(output)
    cast.killed[f"{victim} {doing.removeprefix('killed ')}"] += 1
    moment = f"{way}, step {plan.step}, {kind} {plan.number} and {plan.later_s:.3f} s, {server.url}"
    row.failed(trial, f"{victim} {doing or 'not killed'} ({moment})", wrong)
    took = f"{time.monotonic() - begin:.0f} s"
    bench.tell(f"trial {trial}: {victim} {doing} ({moment}), {took}: {'; '.join(wrong) or 'green'}")
    if not wrong:
        bench.clear(output)
        for path in (events(output), is_back):
            path.unlink()


def watched_until_it_ends(server: Server, child: runs.Child, output: Path) -> list[str]:
    """Waits until the server that is to be killed has ended; what is wrong with how it does."""
    since = None
    while not server.has_ended() and not child.wait(0.02) and (since is None or time.monotonic() < since + ALONE_S):
        since = since or (time.monotonic() if was_killed(output) else None)
    if server.has_ended():
        return server.buried()
    server.kill()
    return [f"the server is there {ALONE_S:.0f} s after its engine" if since else "nobody was killed"]


def missing_in(child: runs.Child, seen: Sequence[tuple[str, int, str]], server: Server) -> list[str]:
    """What should have happened to the server, by what the run says and its witness, and has not."""
    said = " ".join(child.text.split())
    wrong = [] if f"{server.url} is lost (" in said else ["nobody is told that the server is lost"]
    wrong += [] if f"{server.url} is back, and has the weights after" in said else ["it does not say that it is back"]
    killed = next((n for n, (what, *_) in enumerate(seen) if what.startswith("killed ")), len(seen))
    later = {step for what, step, url in seen[killed:] if (what, url) == ("asked", server.url)}
    return wrong + ([] if max(later, default=0) >= runs.STEPS - 2 else ["it is not asked again"])
