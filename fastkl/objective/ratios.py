"""Ratios of the policy that is updated to the one that sampled, cut as PPO cuts them; reuse.py says when and why."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fastkl.objective.reuse import Reuse
from fastkl.objective.sequences import per_token, sequence_sums


@dataclass(frozen=True, slots=True)
class Ratios:
    """What the terms of a token are multiplied with, f32 [N] each, constants."""

    policy: Tensor  # of its advantage: the ratio, 0 where it is cut
    token: Tensor  # of a KL that was estimated from the drawn token: pi(y) / pi_0(y)
    num_cut: int


def clipped_ratios(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, cu_seqlens: Tensor, reuse: Reuse
) -> Ratios:
    """The derivative of min(ratio * A, clip(ratio) * A) by log pi(y), over A. All f32 [N]; cu_seqlens i32 [s + 1]."""
    log_ratio = (logprobs - old_logprobs).detach()
    token = log_ratio.exp()
    ratio = token
    if reuse.level == "sequence":
        lengths = cu_seqlens.diff().clamp(min=1).to(log_ratio.dtype)
        ratio = per_token(sequence_sums(log_ratio, cu_seqlens) / lengths, cu_seqlens).exp()
    low, high = reuse.clip
    cut = ((advantages > 0) & (ratio > 1 + high)) | ((advantages < 0) & (ratio < 1 - low))
    return Ratios(ratio.masked_fill(cut, 0.0), token, int(cut.sum()))
