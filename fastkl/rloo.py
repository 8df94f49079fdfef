"""RLOO: from scores and rewards to one loss whose gradient is that of the KL-penalised objective.

Notation, for the K samples y_1..y_K of one prompt x, policy pi, reference q, task reward r, beta = kl_coef:

    KL_i  = sum_t [log pi(y_it) - log q(y_it)]                 k1, the sequence log-ratio (or its mean over t)
    R_i   = r_i - beta * KL_i                                  the penalised ("composite") reward, a constant
    A_i   = R_i - mean_{j != i} R_j                            leave-one-out advantage; the KL is inside the baseline
    loss  = -(1 / normalizer) * sum_i A_i * sum_t log pi(y_it)   linear in the log-probs: `token_coefficients`

With y sampled from pi and normalizer = number of samples, -grad(loss) is an unbiased estimate of
grad E[r - beta * KL(pi, q)]: the pathwise term that k1 omits has mean zero (Kool, van Hoof and Welling 2019, "Buy 4
REINFORCE samples, get a baseline for free!"; Ahmadian et al. 2024, "Back to basics"). With the mean over t the penalty
is a reward like any other: where the length T is random, E[grad log pi(y) / T] need not vanish and is left out. The
normalizer is handed in, so that the losses of micro-batches add up to the loss of the whole batch.

Left out on purpose: whitening of advantages, ratio clipping (one update per batch is on-policy), and any KL term added
after the baseline.
"""

from __future__ import annotations

import torch


def sequence_sums(values: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Sums of consecutive runs: values [N], cu_seqlens i32 [s + 1] -> [s]. An empty run sums to 0. Differentiable."""
    num_sequences = cu_seqlens.numel() - 1
    run_of_value = torch.repeat_interleave(
        torch.arange(num_sequences, device=values.device), cu_seqlens.diff().long(), output_size=values.numel()
    )
    return values.new_zeros(num_sequences).index_add(0, run_of_value, values)


def sequence_kl(
    policy_logprobs: torch.Tensor, ref_logprobs: torch.Tensor, cu_seqlens: torch.Tensor, reduction: str
) -> torch.Tensor:
    """k1 per sequence, in nats: the log-ratio summed ("sum") or averaged ("mean") over its tokens.

    policy_logprobs, ref_logprobs f32 [N]; cu_seqlens i32 [s + 1] -> f32 [s]; 0 for an empty sequence.
    """
    total = sequence_sums(policy_logprobs - ref_logprobs, cu_seqlens)
    if reduction == "sum":
        return total
    if reduction == "mean":
        return total / cu_seqlens.diff().clamp(min=1)
    raise ValueError(f"kl reduction is {reduction!r}; use 'sum' or 'mean'")


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


def penalized_rewards(
    rewards: torch.Tensor,
    policy_logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    cu_seqlens: torch.Tensor,
    kl_coef: float,
    kl_reduction: str,
) -> torch.Tensor:
    """R_i = r_i - beta * KL_i, f32 [G, K].

    rewards f32 [G, K]; log-probs f32 [N], constants; cu_seqlens i32 [G * K + 1].
    """
    kl = sequence_kl(policy_logprobs, ref_logprobs, cu_seqlens, kl_reduction)
    return rewards - kl_coef * kl.view_as(rewards)


def token_coefficients(advantages: torch.Tensor, cu_seqlens: torch.Tensor, normalizer: float) -> torch.Tensor:
    """The factor of every log-prob in the loss, so that loss = sum_n coefficient_n * log pi(y_n): f32 [N].

    advantages f32 [G, K]; cu_seqlens i32 [G * K + 1]; normalizer: the number of valid samples in the whole step, not in
    this micro-batch.
    """
    return (-advantages.flatten() / normalizer).repeat_interleave(cu_seqlens.diff().long())
