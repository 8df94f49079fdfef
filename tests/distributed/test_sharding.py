"""Who holds which weights: what --shard means on given machines."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_processes import story
from threaded_world import in_threads

from fastkl.distributed.world import World
from fastkl.errors import UserError
from fastkl.training.memory_plan import MemoryPlan
from fastkl.training.sharding import mesh_of, settled_shard


def plan(total: float, available: float) -> MemoryPlan:
    return MemoryPlan({"policy": total}, available, "GPU memory", ())


@pytest.mark.parametrize(
    ("totals", "options", "found"),
    [
        ((5.0, 5.0), {}, "none"),
        ((5.0, 50.0), {}, "full"),  # one GPU is too small, or has less free: all of them shard
        ((50.0, 50.0), {"shard": "none"}, "none"),
        ((5.0, 5.0), {"shard": "full"}, "full"),
        ((50.0, 50.0), {"qlora": True, "lora_rank": 4}, "none"),  # cannot be cut
    ],
)
def test_weights_are_sharded_where_a_process_cannot_hold_them_all(totals, options, found):
    asked = []

    def settle(world: World) -> str:
        def plan_of(settings):
            asked.append(settings.shard)
            return plan(totals[world.rank], 10.0)

        return settled_shard(story(Path("x"), **options), plan_of, world).shard

    assert in_threads(2, settle) == [found] * 2
    assert set(asked) <= {"none"}  # of a run that is not sharded


def test_a_model_of_unknown_size_is_not_sharded_and_one_process_has_nothing_to_shard():
    config = story(Path("x"))
    assert config.shard == "auto"
    assert settled_shard(config, lambda settings: None, World(0, 2)).shard == "none"
    assert settled_shard(config, lambda settings: plan(2.0, 1.0), World()).shard == "none"
    assert settled_shard(story(Path("x"), shard="full"), lambda settings: None, World()).shard == "none"


def test_hybrid_has_all_pieces_on_each_machine_and_is_refused_where_there_is_one():
    config = story(Path("x"), shard="hybrid")
    machines = World(0, 16, 0, one_machine=False, local_size=8)
    assert mesh_of(settled_shard(config, lambda settings: None, machines), machines) == (2, 8)
    assert mesh_of(story(Path("x"), shard="full"), machines) == (16,)
    with pytest.raises(UserError, match="shard: hybrid keeps .* on each machine, and all 8 processes are on one; use"):
        settled_shard(config, lambda settings: None, World(0, 8, 0, local_size=8))


def test_machines_of_different_sizes_hold_no_copies():
    def settle(world: World):
        object.__setattr__(world, "local_size", 1 + (world.rank > 0))
        with pytest.raises(UserError, match="hybrid needs as many processes on every machine, and they have 1 to 2"):
            settled_shard(story(Path("x"), shard="hybrid"), lambda settings: None, world)

    in_threads(3, settle)
