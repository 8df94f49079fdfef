"""The workers of one server as one: an engine over several GPUs has a process for each of them.

What is exchanged is (what has failed here, a value), as between trainers (distributed/team.py). So a worker that fails
while it loads tells the others at their next exchange, and no worker is left waiting in one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from fastkl.distributed.world import World

T = TypeVar("T")


class Failed(Exception):
    """What has kept a worker from its part, in its own words."""


@dataclass(frozen=True)
class Workers(World):
    """One worker of several, or of one. gather: every worker's value, in the order of their ranks."""

    gather: Callable[[Any], list[Any]] = lambda value: [value]

    def everybodys(self, value: T) -> list[T]:
        """See World. Failed where one of them has failed."""
        return self._exchange("", value)

    def attempt(self, function: Callable[[], None], in_words: Callable[[Exception], str]) -> str:
        """Calls the function, as every worker has to; what has kept one of them from it, the same text in all, or
        nothing."""
        try:
            self._exchange(self._tried(function, in_words), None)
        except Failed as first:
            return str(first)
        return ""

    @staticmethod
    def _tried(function: Callable[[], None], in_words: Callable[[Exception], str]) -> str:
        """What has kept the function from its end here, or nothing."""
        try:
            function()
        except Failed:
            raise
        except Exception as failure:
            return in_words(failure)
        return ""

    def _exchange(self, failure: str, value: T) -> list[T]:
        found = self.gather((failure, value))
        if said := next((reason for reason, _ in found if reason), ""):
            raise Failed(said)
        return [theirs for _, theirs in found]


def workers_of(worker: Any) -> Workers:
    """Those of a worker of vLLM, which exchange in its own group, over gloo."""
    if worker.parallel_config.world_size == 1:
        return Workers()
    import torch.distributed as dist
    from vllm.distributed.parallel_state import get_tp_group

    group = get_tp_group()

    def gather(value: Any) -> list[Any]:
        found: list[Any] = [None] * group.world_size
        dist.all_gather_object(found, value, group=group.cpu_group)
        return found

    return Workers(group.rank_in_group, group.world_size, gather=gather)
