"""Advantages: what a sample's penalised reward is compared with.

Notation: R_i, i = 1..K, the penalised rewards of one prompt's samples, of which only the valid ones count.

    rloo          R_i - mean_{j != i} R_j                       Ahmadian et al. 2024, "Back to basics"
    none          R_i                                           Williams 1992, REINFORCE
    dr_grpo       R_i - mean_j R_j                              Liu et al. 2025, "Understanding R1-Zero-like training"
    grpo          (R_i - mean_j R_j) / (std_j R_j + EPSILON)    Shao et al. 2024, "DeepSeekMath"
    reinforce_pp  (R_i - mean) / sqrt(var), over all tokens of the step's completions, each with its completion's
                  reward                                        Hu 2025, "REINFORCE++"

`rloo` and `none` have the gradient of the mean reward in expectation. dr_grpo's is (K - 1) / K times that. A division
by a spread (grpo, reinforce_pp, and `advantage_scale`) changes the objective: prompts weigh by their spread.

Another one is an entry of ADVANTAGES, or a function in a file of your own: f(rewards, valid) -> advantages, with the
penalised rewards R f32 [G, K], valid bool [G, K] and a result f32 [G, K]. Its attribute `min_samples` (default 2) says
how many valid samples a group needs. With the attribute `whole_step` true, it gets all groups of the step at once, and
their lengths: f(rewards, valid, lengths), i64 [B, K]. torch is imported for type checking only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

from fastkl.errors import UserError
from fastkl.plugins import find_function

if TYPE_CHECKING:
    from torch import Tensor


EPSILON = 1e-4
"""Added to a spread before it divides, as in TRL."""


@dataclass(frozen=True, slots=True)
class Advantage:
    """A function of penalised rewards; groups with fewer than `min_samples` valid samples are not trained on."""

    function: Callable[..., Tensor]  # (rewards [G, K], valid [G, K]), or (rewards, valid, lengths) of the whole step
    min_samples: int
    help: str
    whole_step: bool = False  # whether it needs all groups of the step
    is_unbiased: bool = True  # whether the expected gradient is that of the mean reward
    is_scaled: bool = False  # whether it divides by a spread


def leave_one_out(rewards: Tensor, valid: Tensor) -> Tensor:
    """A_i = R_i - mean of the other valid samples' rewards in the group; 0 where invalid or alone (RLOO)."""
    rewards = rewards.masked_fill(~valid, 0.0)
    others = valid.sum(dim=1, keepdim=True) - 1
    mean_of_others = (rewards.sum(dim=1, keepdim=True) - rewards) / others.clamp(min=1)
    return (rewards - mean_of_others).masked_fill(~valid | (others < 1), 0.0)


def no_baseline(rewards: Tensor, valid: Tensor) -> Tensor:
    """A_i = R_i (plain REINFORCE); 0 where invalid."""
    return rewards.masked_fill(~valid, 0.0)


def group_mean(rewards: Tensor, valid: Tensor) -> Tensor:
    """A_i = R_i - mean of the group's valid rewards, its own included; 0 where invalid (Dr. GRPO)."""
    rewards = rewards.masked_fill(~valid, 0.0)
    mean = rewards.sum(dim=1, keepdim=True) / valid.sum(dim=1, keepdim=True).clamp(min=1)
    return (rewards - mean).masked_fill(~valid, 0.0)


def group_normalised(rewards: Tensor, valid: Tensor) -> Tensor:
    """A_i = (R_i - mean) / (std + EPSILON) of the group's valid rewards; 0 where invalid (GRPO)."""
    return group_mean(rewards, valid) / (group_spread(rewards, valid) + EPSILON)


def group_spread(rewards: Tensor, valid: Tensor) -> Tensor:
    """Standard deviation of each group's valid rewards, divided by their number less one: f32 [G, 1]; 0 for one."""
    others = (valid.sum(dim=1, keepdim=True) - 1).clamp(min=1)
    return (group_mean(rewards, valid).square().sum(dim=1, keepdim=True) / others).sqrt()


def step_normalised(rewards: Tensor, valid: Tensor, lengths: Tensor) -> Tensor:
    """A_i = (R_i - mean) / sqrt(var + 1e-8), over the tokens of all valid samples; 0 where invalid (REINFORCE++)."""
    weights = lengths.to(rewards.dtype).masked_fill(~valid, 0.0)
    num_tokens = weights.sum()
    rewards = rewards.masked_fill(~valid, 0.0)
    difference = rewards - (weights * rewards).sum() / num_tokens.clamp(min=1)
    variance = (weights * difference.square()).sum() / (num_tokens - 1).clamp(min=1)
    return (difference * (variance + 1e-8).rsqrt()).masked_fill(~valid, 0.0)


ADVANTAGES: dict[str, Advantage] = {
    "rloo": Advantage(leave_one_out, 2, "each sample against the mean of its group's others"),
    "grpo": Advantage(
        group_normalised, 2, "the distance from the group's mean, in its spreads", is_unbiased=False, is_scaled=True
    ),
    "dr_grpo": Advantage(group_mean, 2, "the distance from the group's mean", is_unbiased=False),
    "reinforce_pp": Advantage(
        *(step_normalised, 1, "the distance from the step's mean, in its spreads"),
        whole_step=True,
        is_unbiased=False,
        is_scaled=True,
    ),
    "none": Advantage(no_baseline, 1, "plain REINFORCE, without a baseline"),
}


def scaled(advantage: Advantage, scale: str) -> Advantage:
    """The advantage over the spread of the rewards in its "group", or in the whole "batch" of a step; as it is where
    the scale is "none". TRL's scale_rewards.
    """
    function = advantage.function
    if scale == "none":
        return advantage
    if scale == "group":

        def by_group(rewards: Tensor, valid: Tensor, *lengths: Tensor) -> Tensor:
            return function(rewards, valid, *lengths) / (group_spread(rewards, valid) + EPSILON)

        least = max(2, advantage.min_samples)
        return replace(advantage, function=by_group, min_samples=least, is_unbiased=False, is_scaled=True)

    def by_step(rewards: Tensor, valid: Tensor, lengths: Tensor) -> Tensor:
        spread = group_spread(rewards.reshape(1, -1), valid.reshape(1, -1))
        return function(rewards, valid, *([lengths] if advantage.whole_step else [])) / (spread + EPSILON)

    return replace(advantage, function=by_step, whole_step=True, is_unbiased=False, is_scaled=True)


@cache
def find_advantage(name: str) -> Advantage:
    """The entry of ADVANTAGES, or the user's own function behind place:function. UserError where there is none."""
    if name in ADVANTAGES:
        return ADVANTAGES[name]
    function = find_function("advantage", name, ADVANTAGES)
    min_samples = getattr(function, "min_samples", 2)
    if not isinstance(min_samples, int) or min_samples < 1:
        raise UserError(f"advantage: {name} has min_samples {min_samples!r}; it must be a whole number, 1 or more.")
    help_text = (function.__doc__ or name).partition("\n")[0]
    return Advantage(function, min_samples, help_text, whole_step=bool(getattr(function, "whole_step", False)))
