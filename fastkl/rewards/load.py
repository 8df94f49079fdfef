"""Reward functions by name: the built-in ones, those made from options, and the user's own, each under the name that
metrics use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastkl.plugins import find_function
from fastkl.rewards.built_in import BUILT_IN, NONE, no_reward
from fastkl.rewards.prepared import PreparedReward
from fastkl.rewards.remote import RemoteReward
from fastkl.rewards.with_options import MAKERS, make

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class RewardFunction:
    """A reward function with the name that metrics and messages use."""

    name: str
    function: Callable[..., Any]
    weight: float = 1.0


def load_rewards(
    names: Sequence[str | Callable[..., Any]], weights: Sequence[float] | None, taken: Iterable[str] = ()
) -> tuple[RewardFunction, ...]:
    """The functions behind `--reward`, or the functions themselves, each under a name of its own. UserError where one
    cannot be found.

    taken: names that no function may have, since the trainer's own metrics have them.
    """
    taken = list(taken)
    loaded = []
    for name, weight in zip(names, weights or [1.0] * len(names), strict=True):
        function = name if callable(name) else find_reward(name)
        label = getattr(function, "__name__", type(function).__name__)
        taken.append(label)
        count = taken.count(label)
        loaded.append(RewardFunction(f"{label}-{count}" if count > 1 else label, function, float(weight)))
    return tuple(loaded)


def find_reward(name: str) -> Callable[..., Any]:
    """The function that one of `--reward`'s names means. UserError where there is none."""
    if name == NONE:
        return no_reward
    if name in BUILT_IN:
        return BUILT_IN[name]
    if name.partition("?")[0] in MAKERS:
        return make(name)
    if name.startswith("model:"):
        from fastkl.rewards.reward_model import ModelReward  # which needs torch: other names are answered at once

        return ModelReward(name)
    if "://" in name:
        return RemoteReward(name)
    if "?" in name and ":" not in name:
        name = name.partition("?")[0]
    return find_function("reward", name, [*BUILT_IN, *MAKERS])


def prepare_rewards(rewards: Iterable[RewardFunction], device: torch.device) -> None:
    """Reaches or loads what the rewards need, once the cheap checks have passed. Raises UserError."""
    for reward in rewards:
        if isinstance(reward.function, PreparedReward):
            reward.function.prepare(device)
