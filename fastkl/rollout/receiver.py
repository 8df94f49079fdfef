"""Receiver: one worker's side of weights that come over the network.

What comes is kept in the host's memory until all of it is there; only then does the engine's loader get it, as from a
file (engine_worker.py). So a push that breaks off leaves the engine as it was, and the first push, at which the
loader's choices are watched, is like any other.

What fails is kept, and raised nowhere: of an engine's workers vLLM reads the answers to a call up to the first failure,
and takes those that are left for answers to the next call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from fastkl.rollout.meeting import Group, Meeting, is_seen, join
from fastkl.rollout.wire import Entry, received

TAKEN = "another run gives this server its weights"


@dataclass
class Invitation:
    """What vLLM's route for the start of transfers is given."""

    meeting: dict[str, Any]  # see Meeting
    rank_offset: int  # what lies before this server's workers in the group
    sender: str  # the run's name
    beacon: str  # where its trainer says that it lives


@dataclass
class Update:
    """What vLLM's route for new weights is given: the tensors that come."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    chunk_bytes: int


class Receiver:
    """device: where the engine computes. rank: of this worker among those of its server."""

    def __init__(self, device: torch.device, rank: int = 0) -> None:
        self.device, self.rank, self.transport = device, rank, "nccl" if device.type == "cuda" else "gloo"
        self.sender, self.beacon = "", ""  # of the trainer that this worker has joined
        self.failed = ""  # why the last call did not do what it was to do
        self._group: Group | None = None
        self._tensors: dict[str, torch.Tensor] = {}
        self._is_whole = False

    def join(self, invitation: Invitation) -> None:
        """Joins a trainer's group, instead of the one before, unless that is another run's that still lives."""
        with self._keeping_why():
            if self.is_anothers(invitation.sender):
                raise RuntimeError(TAKEN)
            self.leave()
            meeting = Meeting(**invitation.meeting)
            self._group = join(meeting, invitation.rank_offset + self.rank, self.device)
            self.sender, self.beacon = invitation.sender, invitation.beacon

    def is_anothers(self, sender: str) -> bool:
        """Whether another run than this one has this worker, and its trainer lives."""
        return self.sender not in ("", sender) and is_seen(self.sender, self.beacon)

    def begin(self) -> None:
        """New weights are to come; what has come of others is forgotten."""
        self._tensors, self._is_whole = {}, False

    def receive(self, update: Update) -> None:
        """Takes part in the broadcasts. The group is left where one of them fails."""
        with self._keeping_why():
            if self._group is None:
                raise RuntimeError("this server is in no group; its trainer has to make a new one")
            given = zip(update.names, update.dtype_names, update.shapes, strict=True)
            entries = [Entry(name, dtype, tuple(shape)) for name, dtype, shape in given]
            self._tensors = dict(received(entries, update.chunk_bytes, self._group.broadcast, self._group.device))
            self._is_whole = True

    def take(self) -> dict[str, torch.Tensor]:
        """What has come, which is its taker's then. RuntimeError where that is not all of it."""
        if not self._is_whole:
            raise RuntimeError("no weights have come as a whole")
        tensors, self._tensors, self._is_whole = self._tensors, {}, False
        return tensors

    def leave(self) -> None:
        """Leaves the group; another trainer may come."""
        group, self._group = self._group, None
        if group is not None:
            group.close()
        self.sender, self.beacon = "", ""
        self.begin()

    @contextmanager
    def _keeping_why(self) -> Iterator[None]:
        """Keeps what is raised inside."""
        self.failed = ""
        try:
            yield
        except Exception as failure:
            self.failed = (str(failure) or type(failure).__name__).splitlines()[0][:300]
            if self.failed != TAKEN:
                self.leave()
