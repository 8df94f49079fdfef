"""Advantages: what a sample's penalised reward is compared with."""

from __future__ import annotations

import torch


def leave_one_out_advantages(rewards: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """A_i = R_i - mean of the other valid samples' rewards in the group; 0 where invalid or alone.

    rewards f32 [G, K], valid bool [G, K] -> f32 [G, K].
    """
    rewards = rewards.masked_fill(~valid, 0.0)
    others = valid.sum(dim=1, keepdim=True) - 1
    mean_of_others = (rewards.sum(dim=1, keepdim=True) - rewards) / others.clamp(min=1)
    return (rewards - mean_of_others).masked_fill(~valid | (others < 1), 0.0)


def advantages(penalized_rewards: torch.Tensor, valid: torch.Tensor, baseline: str) -> torch.Tensor:
    """Advantages under the named baseline: "leave_one_out" (RLOO) or "none" (plain REINFORCE). f32 [G, K]."""
    if baseline == "leave_one_out":
        return leave_one_out_advantages(penalized_rewards, valid)
    if baseline == "none":
        return penalized_rewards.masked_fill(~valid, 0.0)
    raise ValueError(f"baseline is {baseline!r}; use 'leave_one_out' or 'none'")
