"""The processes of this run, from the environment that torchrun, or whoever started them, has left."""

from __future__ import annotations

import atexit
import os
import socket
from functools import cache

from fastkl.distributed.world import ALONE, World
from fastkl.errors import UserError

NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def processes() -> World:
    """What the environment says of this process and the others; nothing is started.

    UserError where it is incomplete.
    """
    if _number("WORLD_SIZE", 1) <= 1:
        return ALONE
    if missing := [name for name in NEEDED if name not in os.environ]:
        raise UserError(
            f"WORLD_SIZE: {os.environ['WORLD_SIZE']} processes, but {', '.join(missing)} is not set; start them with "
            "torchrun or `fastkl train --nproc`, or unset WORLD_SIZE."
        )
    size = _number("WORLD_SIZE", 1)
    rank = _number("RANK", 0)
    local_size = _number("LOCAL_WORLD_SIZE", size)
    return World(rank, size, _number("LOCAL_RANK", rank), local_size == size, local_size)


def _number(name: str, default: int) -> int:
    """A variable of the environment."""
    value = os.environ.get(name, default)
    try:
        return int(value)
    except ValueError:
        raise UserError(
            f"{name}: {value!r} is no number; start the processes with torchrun or `fastkl train --nproc`, or unset it."
        ) from None


def num_restarts() -> int:
    """How often torchrun has started these processes again, after a failure, with the same command line."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


@cache
def launched() -> World:
    """The world of this process, joined with the others where there are any; the same object in every call."""
    found = processes()
    if found.size == 1:
        return found
    import torch
    import torch.distributed as dist

    from fastkl.distributed.team import join

    if dist.is_initialized():
        raise UserError(
            "torch.distributed: a process group is there already; call fastkl.train before it is made, or start one "
            "process."
        )
    if torch.cuda.is_available() and found.local_rank < torch.cuda.device_count():
        torch.cuda.set_device(found.local_rank)
    if found.one_machine and (loopback := loopback_name()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)  # else on the address that the host name resolves to
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        world = join(found, backend, os.environ["MASTER_ADDR"], num_restarts())
    except (RuntimeError, OSError) as failure:
        raise UserError(
            f"MASTER_ADDR: the {found.size} processes did not find each other at {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']} ({str(failure).splitlines()[0][:200]}); start all of them, on machines that "
            "reach this address and port."
        ) from failure
    atexit.register(world.close)
    return world


def loopback_name() -> str | None:
    """The loopback interface's name, if there is one."""
    return next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
