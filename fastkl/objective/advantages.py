"""Advantages: what a sample's penalised reward is compared with.

Another one is an entry of ADVANTAGES, or a function in a file of your own: f(rewards, valid) -> advantages, with the
penalised rewards R f32 [G, K], valid bool [G, K] and a result f32 [G, K]. Its attribute `min_samples` (default 2) says
how many valid samples a group needs. torch is imported for type checking only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from fastkl.errors import UserError
from fastkl.plugins import find_function

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Advantage:
    """A function of penalised rewards; groups with fewer than `min_samples` valid samples are not trained on."""

    function: Callable[[Tensor, Tensor], Tensor]
    min_samples: int
    help: str


def leave_one_out(rewards: Tensor, valid: Tensor) -> Tensor:
    """A_i = R_i - mean of the other valid samples' rewards in the group; 0 where invalid or alone (RLOO)."""
    rewards = rewards.masked_fill(~valid, 0.0)
    others = valid.sum(dim=1, keepdim=True) - 1
    mean_of_others = (rewards.sum(dim=1, keepdim=True) - rewards) / others.clamp(min=1)
    return (rewards - mean_of_others).masked_fill(~valid | (others < 1), 0.0)


def no_baseline(rewards: Tensor, valid: Tensor) -> Tensor:
    """A_i = R_i (plain REINFORCE); 0 where invalid."""
    return rewards.masked_fill(~valid, 0.0)


ADVANTAGES: dict[str, Advantage] = {
    "rloo": Advantage(leave_one_out, 2, "each sample against the mean of its group's others"),
    "none": Advantage(no_baseline, 1, "plain REINFORCE, without a baseline"),
}


@cache
def find_advantage(name: str) -> Advantage:
    """The entry of ADVANTAGES, or the user's own function behind place:function. UserError where there is none."""
    if name in ADVANTAGES:
        return ADVANTAGES[name]
    function = find_function("advantage", name, ADVANTAGES)
    min_samples = getattr(function, "min_samples", 2)
    if not isinstance(min_samples, int) or min_samples < 1:
        raise UserError(f"advantage: {name} has min_samples {min_samples!r}; it must be a whole number, 1 or more.")
    return Advantage(function, min_samples, (function.__doc__ or name).partition("\n")[0])
