"""Reward functions by name: the built-in ones and the user's own, each under the name that metrics use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastkl.plugins import find_function
from fastkl.rewards.built_in import BUILT_IN

METRICS_OF_THE_TRAINER = ("raw", "std", "penalized")  # reward/raw and so on: no function may write over them


@dataclass(frozen=True, slots=True)
class RewardFunction:
    """A reward function with the name that metrics and messages use."""

    name: str
    function: Callable[..., Any]
    weight: float = 1.0


def load_rewards(names: Sequence[str], weights: Sequence[float] | None) -> tuple[RewardFunction, ...]:
    """The functions behind `--reward`, each under a name of its own. UserError where one cannot be found."""
    taken = list(METRICS_OF_THE_TRAINER)
    loaded = []
    for name, weight in zip(names, weights or [1.0] * len(names), strict=True):
        function = BUILT_IN[name] if name in BUILT_IN else find_function("reward", name, BUILT_IN)
        label = getattr(function, "__name__", type(function).__name__)
        taken.append(label)
        count = taken.count(label)
        loaded.append(RewardFunction(f"{label}-{count}" if count > 1 else label, function, float(weight)))
    return tuple(loaded)
