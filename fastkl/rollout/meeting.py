"""Meeting: a trainer and the workers of its servers form a group, in which the trainer sends to all of them at once.

Over gloo on CPUs, over NCCL on GPUs. The trainer is rank 0 and has the store in which the others find it; it listens on
the one address that leads to its servers, the loopback interface where they are on this machine. A group lives as long
as all of its members: where one is lost, whatever it was sending fails within SILENCE_SECONDS, and a new group is made.
"""

from __future__ import annotations

import base64
import contextlib
import socket
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from fastkl.address import LOOPBACK

SILENCE_SECONDS = 30.0
"""How long a group waits for one of its members: to come, and to take or give a chunk."""

BEACON_SECONDS = 3.0
"""How long a worker looks for the trainer that it has weights from."""


@dataclass(frozen=True, slots=True)
class Meeting:
    """What a worker has to know to join; all of it goes through JSON."""

    transport: str  # a name of GROUPS
    address: str  # of the trainer's store
    port: int
    size: int  # the trainer and all workers
    seconds: float
    unique_id: str = ""  # NCCL's, in base 64


class Group(Protocol):
    """Members that take part in broadcasts."""

    device: torch.device

    def broadcast(self, buffer: torch.Tensor) -> None:
        """Rank 0's bytes to all others: u8 [bytes], on `device`. RuntimeError where a member is lost."""
        ...

    def close(self) -> None:
        """Leaves; may be called twice."""
        ...


class Store:
    """The trainer's side of a meeting's store."""

    def __init__(self, address: str) -> None:
        listening = socket.create_server((address, 0), family=family_of(address))
        self.port = listening.getsockname()[1]
        self.store: Any = dist.TCPStore(
            address, self.port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach(),
            timeout=timedelta(seconds=SILENCE_SECONDS),
        )  # fmt: skip

    def missing(self, size: int) -> list[int]:
        """Ranks that have not come."""
        return [rank for rank in range(1, size) if not self.store.check([f"here/{rank}"])]

    def close(self) -> None:
        """Ends the store, and with it whatever waits in it."""
        self.store = None


def join(meeting: Meeting, rank: int, device: torch.device, store: Any = None) -> Group:
    """Comes to a meeting, and returns when all have come. RuntimeError where that takes too long.

    store: the trainer's own. device: where a GPU takes part, its.
    """
    if store is None:
        patience = timedelta(seconds=meeting.seconds)
        store = dist.TCPStore(meeting.address, meeting.port, wait_for_workers=False, timeout=patience)
    store.set(f"here/{rank}", "")
    store.wait([f"here/{other}" for other in range(meeting.size)], timedelta(seconds=meeting.seconds))
    return GROUPS[meeting.transport](meeting, rank, store, device)


class GlooGroup:
    """Over TCP, between CPUs."""

    def __init__(self, meeting: Meeting, rank: int, store: Any, device: torch.device) -> None:
        self.device = torch.device("cpu")
        own = meeting.address if rank == 0 else own_address([(meeting.address, meeting.port)])
        gloo: Any = dist.ProcessGroupGloo
        options = gloo._Options()
        options._timeout = timedelta(seconds=meeting.seconds)
        options._devices = [gloo.create_device(hostname=own)]
        self._group: Any = gloo(dist.PrefixStore("gloo", store), rank, meeting.size, options)
        self._store = store  # the connection stays open as long as the group

    def broadcast(self, buffer: torch.Tensor) -> None:
        """See Group."""
        options: Any = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        self._group.broadcast([buffer], options).wait()

    def close(self) -> None:
        """See Group."""
        self._group = self._store = None


class NcclGroup:
    """Between GPUs, by vLLM's communicator, which leaves torch's process groups alone."""

    def __init__(self, meeting: Meeting, rank: int, store: Any, device: torch.device) -> None:
        from vllm.distributed.weight_transfer.nccl_common import uid_init_process_group

        number = torch.cuda.current_device() if device.index is None else device.index
        self.device, self.seconds = torch.device("cuda", number), meeting.seconds
        unique_id = base64.b64decode(meeting.unique_id)
        self._communicator: Any = uid_init_process_group(unique_id, rank, meeting.size, number)

    def broadcast(self, buffer: torch.Tensor) -> None:
        """See Group. NCCL would wait for a lost member for ever: the group is given up then."""
        with torch.cuda.device(self.device):
            stream, done = torch.cuda.current_stream(), torch.cuda.Event()
            self._communicator.broadcast(buffer, src=0, stream=stream)
            done.record(stream)
            deadline = time.monotonic() + self.seconds
            while not done.query():
                if time.monotonic() > deadline:
                    self.close()
                    raise RuntimeError(f"a member of the group did not take or give a chunk in {self.seconds:g} s")
                time.sleep(0.0005)

    def close(self) -> None:
        """See Group."""
        if self._communicator is not None:
            self._communicator.destroy()
            self._communicator = None


GROUPS: dict[str, type[GlooGroup] | type[NcclGroup]] = {"gloo": GlooGroup, "nccl": NcclGroup}


def gpu_of(device: torch.device) -> str:
    """A GPU's name among all GPUs of the world; empty for a CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def new_unique_id(transport: str) -> str:
    """What NCCL's members know each other by; empty for gloo."""
    if transport != "nccl":
        return ""
    from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary

    return base64.b64encode(bytes(NCCLLibrary().ncclGetUniqueId().internal)).decode()


def own_address(others: Iterable[tuple[str, int]]) -> str:
    """This machine's address as those hosts see it; one that all of them can reach, if some are on other machines."""
    found = ["127.0.0.1" if host in LOOPBACK else _towards(host, port) for host, port in others]
    return next((address for address in found if address not in LOOPBACK), found[0])


def host_and_port(url: str) -> tuple[str, int]:
    """Of an address of a server."""
    parts = urlsplit(url)
    return parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)


def family_of(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _towards(host: str, port: int) -> str:
    """The address that packets to a host leave from; none is sent."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


class Beacon:
    """Says a trainer's name to whoever connects, as long as its process lives: a second one shall not take its
    servers."""

    def __init__(self, name: str, address: str) -> None:
        self.name = name
        self._listening = socket.create_server((address, 0), family=family_of(address))
        self.address = f"{address} {self._listening.getsockname()[1]}"
        threading.Thread(target=self._say, name="fastkl-beacon", daemon=True).start()

    def close(self) -> None:
        """It is gone; may be called twice."""
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._listening.close()

    def _say(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
                with connection:
                    connection.sendall(self.name.encode())
            except OSError:
                if self._listening.fileno() < 0:
                    return


def is_seen(name: str, address: str) -> bool:
    """Whether the beacon of this name answers at its address."""
    host, port = address.split()
    try:
        with socket.create_connection((host, int(port)), BEACON_SECONDS) as connection:
            return connection.makefile("rb").read(len(name) + 1) == name.encode()
    except OSError:
        return False
