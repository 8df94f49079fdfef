"""Who holds which weights (--shard), once settings, machine and processes are known.

auto   none, where the run fits each process's device by the memory plan's arithmetic; else full
none   every process holds all
full   every process holds a piece
hybrid every machine holds all, in pieces on its processes
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from fastkl.config.settings import TrainConfig, uncut
from fastkl.distributed.world import World
from fastkl.errors import UserError
from fastkl.training.memory_plan import MemoryPlan


def settled_shard(config: TrainConfig, plan: Callable[[TrainConfig], MemoryPlan | None], world: World) -> TrainConfig:
    """The settings with `shard` none, full or hybrid, the same in every process; all must come here. UserError for a
    hybrid without machines.

    plan: what a run with these settings takes; None where that is not known, and then weights are not sharded.
    """
    if world.size == 1:
        return replace(config, shard="none")
    if config.shard == "hybrid":
        check_machines(world)
    if config.shard != "auto":
        return config
    found = plan(replace(config, shard="none"))
    too_large = world.any(found is not None and not found.fits)
    return replace(config, shard="full" if too_large and not uncut(config) else "none")


def check_machines(world: World) -> None:
    """UserError unless there are several machines with as many processes each."""
    sizes = world.everybodys(world.local_size)
    if len(set(sizes)) > 1:
        raise UserError(
            f"shard: hybrid needs as many processes on every machine, and they have {min(sizes)} to {max(sizes)}; use "
            "full."
        )
    if sizes[0] == world.size:
        raise UserError(
            f"shard: hybrid keeps a copy of the weights on each machine, and all {world.size} processes are on one; "
            "use full."
        )


def is_sharded(config: TrainConfig) -> bool:
    """Whether every process holds a piece of every weight."""
    return config.shard in ("full", "hybrid")


def mesh_of(config: TrainConfig, world: World) -> tuple[int, ...]:
    """How the processes of a sharded run are laid out: (pieces,), or (copies, pieces of each)."""
    if config.shard == "hybrid":
        return world.size // world.local_size, world.local_size
    return (world.size,)
