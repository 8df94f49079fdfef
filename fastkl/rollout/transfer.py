"""Transfer: the trainer's side of weights over the network, by vLLM's own routes for their transfer.

    fastkl_leave                         whatever a trainer that was killed has left is forgotten
    init_weight_transfer_engine          all servers join a group with the trainer (meeting.py)
    pause, start_weight_update,          for each push: chunks go to all of them at once (wire.py)
    update_weights, finish_weight_update
    fastkl_load                          loaded, and compared bit by bit (engine_worker.py)
    resume

A group that has lost a member is of no use to the others: it is left, and a new one made of those that are there. None
of these calls fails in one worker and not in another: vLLM would take the answers to one call for those to the next.
Left out: sending from several trainer processes; the first one sends what all of them gather.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

import torch

from fastkl.errors import UserError
from fastkl.rollout import meeting
from fastkl.rollout.agreement import StaleEngineError
from fastkl.rollout.asking import Failed, Unreached, ask, in_thread
from fastkl.rollout.meeting import (
    Beacon,
    Group,
    Meeting,
    Store,
    gpu_of,
    host_and_port,
    join,
    new_unique_id,
    own_address,
)
from fastkl.rollout.wire import Packed, unlike

SLACK_SECONDS, LOAD_SECONDS = 5.0, 600.0

NAMED = 4
"""Tensors that an error names; it counts the others."""


@dataclass(frozen=True, slots=True)
class Member:
    """A server, as it joins a group: the same address with another instance is another one."""

    url: str
    instance: str
    num_ranks: int = 1  # workers, each of which takes part


class Broken(Exception):
    """Weights that did not reach all servers. By address: which of them are lost, and which say that something has
    failed."""

    def __init__(self, lost: Mapping[str, str], failed: Mapping[str, str]) -> None:
        super().__init__("; ".join(f"{url}: {reason}" for url, reason in {**failed, **lost}.items()))
        self.lost, self.failed = dict(lost), dict(failed)


class Transfer:
    """Sends one run's weights. transport: gloo or nccl. name: the run's. device: where its policy is."""

    def __init__(self, transport: str, name: str, device: torch.device) -> None:
        self.transport, self.name, self.device = transport, name, device
        self.packed = Packed()
        self._members: tuple[Member, ...] = ()  # of the group
        self._group: Group | None = None
        self._beacon: Beacon | None = None
        self._moved = 0.0  # when the last chunk began to be sent, or the last meeting

    def keep(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copies the weights that are sent from now on; every process of the trainer has to go through them."""
        self.packed.take(weights)

    def send(self, members: Sequence[Member], version: str, step: int, *, tied: bool) -> None:
        """Gives these servers the weights that are kept. Broken where they did not reach all of them,
        StaleEngineError where one of them holds others now."""
        try:
            if self._group is None or self._members != tuple(members):
                self.leave()
                in_thread(self._meet, tuple(members))
            in_thread(self._push, version, step, tied)
        except Broken as failure:
            self.leave(besides=failure.lost)
            raise

    def leave(self, besides: Iterable[str] = ()) -> None:
        """Gives up the group; those of its members that are there do the same, but for some."""
        group, self._group = self._group, None
        members, self._members = [m for m in self._members if m.url not in besides], ()
        if group is not None:
            group.close()
        if members:
            in_thread(self._dismiss, members)

    def close(self) -> None:
        """Leaves the servers to others; may be called twice."""
        self.leave()
        if self._beacon is not None:
            self._beacon.close()
            self._beacon = None

    async def _meet(self, members: tuple[Member, ...]) -> None:
        """Makes a group of these. Ranks: the trainer, the workers of the first server, of the second, ..."""
        await self._leave_servers(members)
        address = own_address([host_and_port(member.url) for member in members])
        store = Store(address)
        if self._beacon is None:
            self._beacon = Beacon(self.name, address)
        self._moved = time.monotonic()
        size = 1 + sum(member.num_ranks for member in members)
        patience = meeting.SILENCE_SECONDS
        place = Meeting(self.transport, address, store.port, size, patience, new_unique_id(self.transport))
        store.store.set("here/0", "")
        bodies, offset = [], 1
        for member in members:
            invitation = {"meeting": asdict(place), "rank_offset": offset, "sender": self.name}
            bodies.append({"init_info": invitation | {"beacon": self._beacon.address}})
            offset += member.num_ranks

        async def joined(tasks: Sequence[asyncio.Task[Any]]) -> None:
            loop = asyncio.get_running_loop()
            deadline = loop.time() + patience
            while store.missing(size) and loop.time() < deadline and not any(task.done() for task in tasks):
                await asyncio.sleep(0.005)
            if missing := store.missing(size):
                store.close()  # then those that have come go at once
                raise RuntimeError(f"{len(missing)} of {size - 1} workers did not come to {address}:{store.port}")
            self._group = await asyncio.to_thread(join, place, 0, self.device, store.store)

        await self._each(members, "init_weight_transfer_engine", bodies, joined)
        self._members = members

    async def _push(self, version: str, step: int, tied: bool) -> None:
        """Sends, has loaded, and compares what has been loaded with what was sent."""
        members, entries = self._members, self.packed.entries
        update = {
            "names": [entry.name for entry in entries],
            "dtype_names": [entry.dtype for entry in entries],
            "shapes": [entry.shape for entry in entries],
            "chunk_bytes": self.packed.chunk_bytes,
        }
        kwargs = {"path": "", "version": version, "step": str(step), "tied": str(tied)}
        paused = list(members)
        try:
            await self._each(members, "pause?mode=abort")  # nothing of this run is being drawn
            await self._each(members, "start_weight_update")
            await self._each(members, "update_weights", [{"update_info": update}] * len(members), self._broadcast)
            await self._each(members, "finish_weight_update", [{"weight_version": version}] * len(members))
            asked = {"method": "fastkl_load", "kwargs": kwargs}
            answers = await self._each(members, "collective_rpc", [asked] * len(members), seconds=LOAD_SECONDS)
            pairs = zip(members, answers, strict=True)
            if failed := {m.url: r["failed"] for m, answer in pairs for r in answer["results"] if r["failed"]}:
                raise Broken({}, failed)
            for member, answer in zip(members, answers, strict=True):
                for result in answer["results"]:
                    self._compare(member, result, step)
        except Broken as failure:
            paused = [member for member in members if member.url not in failure.lost]
            raise
        finally:
            if paused:
                with suppress(Broken):
                    await self._each(paused, "resume")

    def _compare(self, member: Member, result: Mapping[str, Any], step: int) -> None:
        """StaleEngineError where a worker does not hold what was sent."""
        if result["error"]:
            raise StaleEngineError(f"{member.url}: {result['error']}")
        if names := unlike(self.packed.entries, self.packed.sums, result["sums"]):
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            raise StaleEngineError(
                f"{member.url}: step {step}: other weights came over the network than were sent: "
                f"{', '.join(names[:NAMED])}{more}; no completion was drawn with them, and --engine-weights folder "
                "takes another way."
            )

    async def _broadcast(self, tasks: Sequence[asyncio.Task[Any]]) -> None:
        """All chunks, to all members, while they wait for them."""
        group = self._group
        assert group is not None

        def send() -> None:
            for chunk in self.packed.chunks():
                self._moved = time.monotonic()
                group.broadcast(chunk.to(group.device))

        await asyncio.to_thread(send)

    async def _dismiss(self, members: Sequence[Member]) -> None:
        """The same for servers some of which may be lost."""
        with suppress(Broken):
            await self._leave_servers(members)

    async def _leave_servers(self, members: Sequence[Member]) -> None:
        """Has servers leave the group, and end an update that has been broken off."""
        asked = {"method": "fastkl_leave", "kwargs": {"sender": self.name}}
        await self._each(members, "collective_rpc", [asked] * len(members))

    async def _each(
        self,
        members: Sequence[Member],
        path: str,
        bodies: Sequence[Mapping[str, Any]] | None = None,
        beside: Callable[[Sequence[asyncio.Task[Any]]], Any] | None = None,
        seconds: float = 0.0,
    ) -> list[Any]:
        """The servers' answers. beside: what is done while they have not answered yet. Broken where it fails, or one
        of them does, or takes longer than so many seconds (0: as long as they may be silent) after it."""
        seconds = seconds or meeting.SILENCE_SECONDS + SLACK_SECONDS
        given = bodies or [{}] * len(members)
        tasks = [asyncio.create_task(self._post(m, path, body)) for m, body in zip(members, given, strict=True)]
        lost, failed = dict[str, str](), dict[str, str]()
        if beside is not None:
            try:
                await beside(tasks)
            except RuntimeError as failure:  # of gloo, NCCL, the store
                failed["the trainer"] = str(failure).splitlines()[0][:300]
                seconds = max(SLACK_SECONDS, seconds - (time.monotonic() - self._moved))
                if self._group is not None:
                    self._group.close()  # then those that are there notice at once
        await asyncio.wait(tasks, timeout=seconds)
        for member, task in zip(members, tasks, strict=True):
            if not task.done():
                task.cancel()
                lost[member.url] = f"no answer to {path} in time"
            elif (why := task.exception()) is not None:
                (lost if isinstance(why, Unreached) else failed)[member.url] = str(why)
        await asyncio.gather(*tasks, return_exceptions=True)
        if lost or failed:
            raise Broken(lost, failed)
        return [task.result() for task in tasks]

    async def _post(self, member: Member, path: str, body: Mapping[str, Any]) -> Any:
        """A server's answer; how long that takes is watched elsewhere."""
        answer = await ask(member.url, path, body)
        if answer.status_code != 200:
            raise Failed(f"{path.partition('?')[0]} answered with status {answer.status_code}")
        return answer.json()


def transport_of(abouts: Mapping[str, Mapping[str, Any]], wanted: str, device: torch.device) -> tuple[str, str]:
    """The transport of weights over the network, or "": through the folder, and why.

    abouts: what each server says of itself, by address. wanted: auto, network, folder. UserError where the network is
    asked for and cannot be had.
    """
    if wanted == "folder":
        return "", "asked for"
    obstacle = obstacle_to_network(abouts, device)
    if obstacle is None:
        return next(iter(abouts.values()))["transport"], ""
    if wanted == "network":
        raise UserError(f"engine_weights: network was asked for, but {obstacle}; use --engine-weights folder.")
    return "", obstacle


def obstacle_to_network(abouts: Mapping[str, Mapping[str, Any]], device: torch.device) -> str | None:
    """Why weights cannot go over the network from this device to these servers; None: they can."""
    transports = {url: about.get("transport", "") for url, about in abouts.items()}
    for url, transport in transports.items():
        if not transport:
            return f"{url} takes no weights over the network (it needs vLLM 0.32 or newer, and this fastkl)"
        if transport == "nccl" and device.type != "cuda":
            return f"{url} takes weights from a GPU only, and the policy is on the {device.type.upper()}"
        if transport == "nccl" and abouts[url].get("gpu") == gpu_of(device):
            return f"{url} has the policy's GPU, and NCCL goes from one to another"
    if len(set(transports.values())) > 1:
        said = ", ".join(f"{url} over {transport}" for url, transport in transports.items())
        return f"the servers do not take weights in the same way ({said})"
    if "nccl" in transports.values() and find_spec("vllm") is None:
        return "vLLM, by whose NCCL they would go, is not installed beside the trainer"
    return None
