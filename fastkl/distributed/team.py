"""Team: one process of several, joined by torch.distributed over gloo and, where there are GPUs, NCCL.

What is exchanged is (what has failed here, a value): so a process that fails anywhere between two exchanges tells all
others at the next one, whatever that was meant for, and all of them raise the same and end together. A process that
cannot even do that (killed, or waited for by others that wait for it in another call) is noticed by the lifelines
(lifeline.py): Python is interrupted, and what cannot be interrupted is ended after GRACE_SECONDS.
"""

from __future__ import annotations

import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from os import _exit as end_at_once  # whatever stands in its place while a reward function runs
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from fastkl.distributed.courier import Courier
from fastkl.distributed.lifeline import Lifeline
from fastkl.distributed.world import AGREED, ALONE, LostProcess, OtherFailed, World

T = TypeVar("T")

GRACE_SECONDS = 8.0
"""What a process has to notice, after the loss of another one, before it is ended. With what the system takes to tell,
a run ends within 15 seconds."""

PATIENCE = timedelta(hours=2)
"""For one exchange: the longest time that one process may take more than another, for a checkpoint or a reward. That a
process has ended is noticed otherwise, at once."""

FIND_EACH_OTHER = timedelta(minutes=10)
"""For all processes to be started."""

LOSS_SIGNAL = signal.SIGUSR2
"""By which the thread that notices a loss interrupts the main thread's Python code."""


@dataclass
class State:
    """What changes while the processes run."""

    lost: str = ""  # the sentence about the process that was lost
    first_is_left: bool = True  # and says so
    noticed: bool = False  # the main thread knows, and is about to end
    is_undisturbed: bool = False
    is_closed: bool = False


@dataclass(frozen=True)
class Team(World):
    """One process of several."""

    courier: Courier = field(default_factory=Courier)
    state: State = field(default_factory=State)
    lines: list[Lifeline] = field(default_factory=list)  # one, once it is connected

    def everybodys(self, value: T) -> list[T]:
        """See World. Raises what has failed in another process, and LostProcess."""
        return self._exchange(None, value)

    def once(self, function: Callable[[], T]) -> T:
        """See World."""
        with self.together():
            result: Any = function() if self.is_first else None
        return self.everybodys(result)[0]

    def add_up(self, tensors: Iterable[torch.Tensor]) -> None:
        """See World. One after another, so that there is no copy."""
        for tensor in tensors:
            self._call(partial(dist.all_reduce, tensor))

    @contextmanager
    def together(self) -> Iterator[None]:
        """See World. What fails here is told at the exchange that the others come to next."""
        try:
            yield
        except LostProcess:
            raise
        except BaseException as failure:
            if not getattr(failure, AGREED, False):
                self._tell(failure)
            raise

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """See World."""
        self.state.is_undisturbed = True
        try:
            yield
        finally:
            self.state.is_undisturbed = False

    def remaining(self) -> World:
        """See World."""
        return ALONE if self.state.lost else self

    def close(self) -> None:
        """See World."""
        if self.state.is_closed or self.state.lost:
            return
        self.state.is_closed = True
        for line in self.lines:
            line.close()
        if dist.is_initialized():  # vLLM's end takes it along
            dist.destroy_process_group()

    def _tell(self, failure: BaseException) -> None:
        """Lets the others know what has failed here. Marks it as known where they do."""
        for line in self.lines:
            line.say_why(_sentence(failure))
        try:
            self._exchange(failure, None, timeout=GRACE_SECONDS)
        except (LostProcess, TimeoutError):  # they wait elsewhere, for this process, and will notice its end
            self.state.lost = self.state.lost or "the other processes do not answer, and so this run ends."
            self.state.noticed = True
        except BaseException as other:
            if other is not failure:
                raise
        setattr(failure, AGREED, True)

    def _exchange(self, failure: BaseException | None, value: T, timeout: float | None = None) -> list[T]:
        mine = (_portable(failure), value)
        found: list[Any] = [None] * self.size
        self._call(lambda: dist.all_gather_object(found, mine, group=_control()), timeout)
        if failure is not None:
            raise failure
        for rank, (reason, _) in enumerate(found):
            if reason is not None:
                raise _raised_by(rank, self.size, reason)
        return [value for _, value in found]

    def _call(self, function: Callable[[], Any], timeout: float | None = None) -> None:
        """Makes a collective call. LostProcess where it cannot be finished."""
        self._raise_if_lost()
        try:
            self.courier.call(function, timeout)
        except (RuntimeError, ValueError) as failure:  # gloo and NCCL: a connection is closed
            time.sleep(1.0)  # the lifeline names the process that is gone
            self._raise_if_lost()
            self.state.noticed = True
            raise LostProcess(f"the processes have lost each other ({str(failure).splitlines()[0][:200]})") from failure

    def _raise_if_lost(self) -> None:
        if self.state.lost:
            self.state.noticed = True
            loss = LostProcess(self.state.lost)
            setattr(loss, AGREED, self.state.first_is_left)
            raise loss

    def on_loss(self, rank: int, why: str) -> None:
        """In a lifeline's thread: process `rank` is gone. Ends this process, politely if the main thread can."""
        if self.state.is_closed:
            return
        self.state.lost = f"process {rank} of {self.size} has ended{f' ({why})' if why else ''}, and so this run ends."
        self.state.first_is_left = rank != 0
        main = threading.main_thread().ident
        if main is not None and signal.getsignal(LOSS_SIGNAL) == self.interrupt:
            signal.pthread_kill(main, LOSS_SIGNAL)
        deadline = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < deadline or self.state.is_undisturbed:
            if self.state.noticed:
                return
            time.sleep(0.1)
        print(f"fastkl: process {self.rank}: {self.state.lost}", file=sys.stderr, flush=True)
        end_at_once(1)  # the main thread waits in a call that nothing interrupts

    def interrupt(self, number: int, frame: FrameType | None) -> None:
        """The handler of LOSS_SIGNAL, in the main thread."""
        if not self.state.is_undisturbed and not self.state.noticed:
            self._raise_if_lost()


def _control() -> Any:
    """The group of the exchanges, over gloo: no GPU takes part, and no GPU's queue is waited for."""
    return _GROUPS.setdefault("control", dist.group.WORLD)


_GROUPS: dict[str, Any] = {}


def join(world: World, backend: str, address: str, attempt: int) -> Team:
    """Joins the processes; every one of them must come here. Raises RuntimeError where they do not find each other.

    attempt: how often they have been started before. torchrun keeps its store, and what the former processes have left
    in it would be taken for these ones' addresses.
    """
    store, *_ = next(rendezvous("env://", world.rank, world.size, timeout=FIND_EACH_OTHER))
    store = dist.PrefixStore(f"fastkl/{attempt}", store)
    dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=PATIENCE)
    _GROUPS["control"] = dist.new_group(backend="gloo", timeout=PATIENCE)
    team = Team(world.rank, world.size, world.local_rank, world.one_machine, world.local_size)
    line = Lifeline(world.rank, world.size, store, address, team.on_loss, local=world.one_machine)
    team.lines.append(line)
    if threading.current_thread() is threading.main_thread():
        signal.signal(LOSS_SIGNAL, team.interrupt)
    return team


def _sentence(failure: BaseException) -> str:
    text = str(failure).strip().splitlines()
    return f"{type(failure).__name__}: {text[0][:300]}" if text else type(failure).__name__


def _portable(failure: BaseException | None) -> Any:
    """The failure as something that another process can read: itself, or a sentence."""
    if failure is None:
        return None
    try:
        pickle.loads(pickle.dumps(failure))
    except Exception:
        return _sentence(failure)
    return failure


def _raised_by(rank: int, size: int, reason: Any) -> BaseException:
    """What this process raises for what has failed in another one: the same, where a person has a sentence to read."""
    failure = reason if isinstance(reason, BaseException) else RuntimeError(reason)
    if not isinstance(failure, KeyboardInterrupt) and type(failure).__module__.partition(".")[0] != "fastkl":
        failure = OtherFailed(f"process {rank} of {size} has failed ({_sentence(failure)}); its own output says more.")
    setattr(failure, AGREED, True)
    return failure
