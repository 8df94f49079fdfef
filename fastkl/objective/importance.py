"""Importance weights: how far the engine that sampled and the trainer that scores are apart, and what corrects for it.

Both compute log-probs of the same tokens under the same distribution. Their difference g = log pi_engine(y) - log
pi_trainer(y) is mere rounding, unless the engine is stale or the two replay different settings. In bfloat16 the
rounding is large enough to bias the gradient; truncated importance weights w = min(exp(-g), cap) correct the mean up to
the cap (Ionides 2008, "Truncated importance sampling"), per token, or for the whole completion with the sum of its g.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastkl.objective.sequences import per_token, sequence_sums


@dataclass(frozen=True, slots=True)
class Weights:
    """Importance weights of some tokens, and how many of them the cap has cut."""

    values: torch.Tensor | None  # f32 [N], constants; None: all one
    num_cut: int


def importance_weights(
    engine_logprobs: torch.Tensor, policy_logprobs: torch.Tensor, cu_seqlens: torch.Tensor, level: str, cap: float
) -> Weights:
    """Truncated importance weights; both log-probs f32 [N], cu_seqlens i32 [s + 1], level "none", "token", "sequence".

    Each weight is that of one token, or of its whole completion, whose tokens then share it.
    """
    if level == "none":
        return Weights(None, 0)
    log_ratio = policy_logprobs.detach() - engine_logprobs
    if level == "sequence":
        log_ratio = per_token(sequence_sums(log_ratio, cu_seqlens), cu_seqlens)
    ratio = log_ratio.exp()
    return Weights(ratio.clamp(max=cap), int((ratio > cap).sum()))


def weighted_k1(
    engine_logprobs: torch.Tensor, policy_logprobs: torch.Tensor, ref_logprobs: torch.Tensor
) -> torch.Tensor:
    """w k1 of each token, nats, with w = pi(y) / e(y), uncut: f32 [N] each.

    Its mean over what the engine e draws after a text is KL(pi, q) at that text, so that the sum over a completion has
    a mean that is never below zero, whichever policy has drawn. That of k1 alone is KL(e, q) - KL(e, pi).
    """
    policy_logprobs = policy_logprobs.detach()
    return (policy_logprobs - engine_logprobs).exp() * (policy_logprobs - ref_logprobs)


def engine_kl_sum(engine_logprobs: torch.Tensor, policy_logprobs: torch.Tensor) -> float:
    """Sum over tokens of the k3 estimate of KL(engine, trainer), nats; each term is >= 0. Both f32 [N]."""
    log_ratio = policy_logprobs.detach() - engine_logprobs
    return float((torch.expm1(log_ratio) - log_ratio).sum())


def logprob_gaps(engine_logprobs: torch.Tensor, policy_logprobs: torch.Tensor) -> tuple[float, float, int]:
    """(sum, max, count) of |engine - trainer| over tokens, nats. Both f32 [N]."""
    if engine_logprobs.numel() == 0:
        return 0.0, 0.0, 0
    gaps = (engine_logprobs - policy_logprobs).abs()
    return float(gaps.sum()), float(gaps.max()), gaps.numel()
