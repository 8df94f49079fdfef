"""RLOO: from scores and rewards to one loss whose gradient is that of the KL-penalised objective.

Notation, for the K samples y_1..y_K of one prompt x, policy pi, reference q, task reward r, beta = kl_coef:

    KL_i  = sum_t KL_it                                        by default k1: log pi(y_it) - log q(y_it)
    R_i   = r_i - beta * KL_i                                  the penalised ("composite") reward, a constant
    A_i   = R_i - mean_{j != i} R_j                            leave-one-out advantage; the KL is inside the baseline
    loss  = -(1 / normalizer) * sum_i A_i * sum_t log pi(y_it)

With y sampled from pi and normalizer = number of samples, -grad(loss) is an unbiased estimate of
grad E[r - beta * KL(pi, q)]: the pathwise term that k1 omits has mean zero (Kool, van Hoof and Welling 2019, "Buy 4
REINFORCE samples, get a baseline for free!"; Ahmadian et al. 2024, "Back to basics"). Other estimators, and the KL in
the loss instead of the reward: estimators.py. With the mean over t the penalty is a reward like any other: where the
length T is random, E[grad log pi(y) / T] need not vanish and is left out. The normalizer is handed in, so that the
losses of micro-batches add up to the loss of the whole batch.

The KL of token t depends on the tokens up to t only, so it may be credited to them alone: with credit "caused", token
s has the advantage A_i + beta * (KL of the tokens that s did not cause), the same in expectation, with less noise.

Left out on purpose: whitening of advantages, ratio clipping (one update per batch is on-policy), and any KL term added
after the baseline.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastkl.estimators import sampled_logprobs, token_kl
from fastkl.kernels.types import TokenScores
from fastkl.penalty import EXACT, Penalty


def sequence_sums(values: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Sums of consecutive runs: values [N], cu_seqlens i32 [s + 1] -> [s]. An empty run sums to 0. Differentiable."""
    owners = sequence_of_token(cu_seqlens, values.numel())
    return values.new_zeros(cu_seqlens.numel() - 1).index_add(0, owners, values)


def sequence_of_token(cu_seqlens: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """The sequence that owns each packed token: cu_seqlens i32 [s + 1] -> i64 [N]."""
    sequences = torch.arange(cu_seqlens.numel() - 1, device=cu_seqlens.device)
    return torch.repeat_interleave(sequences, cu_seqlens.diff().long(), output_size=num_tokens)


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


@dataclass(frozen=True, slots=True)
class Objective:
    """What one micro-batch contributes to the update."""

    loss: torch.Tensor  # scalar, differentiable
    kl: torch.Tensor  # f32 [s], the penalty of each sequence before beta, in nats
    penalized_rewards: torch.Tensor  # f32 [G, K]; the rewards themselves where the KL is in the loss


def rloo_loss(
    scores: TokenScores,
    rewards: torch.Tensor,
    valid: torch.Tensor,
    cu_seqlens: torch.Tensor,
    penalty: Penalty,
    *,
    baseline: str,
    normalizer: float,
    weights: torch.Tensor | None = None,
) -> Objective:
    """The loss of a micro-batch of whole prompt groups, its gradient flowing through the policy's scores.

    scores [N]; rewards f32 [G, K], valid bool [G, K]; cu_seqlens i32 [G * K + 1] (a sequence that is not valid has no
    tokens); normalizer: the number of valid samples in the whole step, not in this micro-batch; weights f32 [N] or
    None: importance weights of the tokens, constants (mismatch.py).
    """
    logprobs = sampled_logprobs(scores)
    owners = sequence_of_token(cu_seqlens, logprobs.numel())
    kl_tokens = token_kl(scores, penalty.estimator)
    if penalty.reduction == "mean":
        kl_tokens = kl_tokens / cu_seqlens.diff()[owners]
    kl = sequence_sums(kl_tokens.detach(), cu_seqlens)
    in_reward = penalty.placement == "reward"
    penalized = rewards - penalty.coef * kl.view_as(rewards) if in_reward else rewards
    token_advantages = advantages(penalized, valid, baseline).detach().flatten()[owners]
    if penalty.credit == "caused":
        token_advantages = token_advantages + penalty.coef * not_caused(kl_tokens.detach(), cu_seqlens, penalty)
    terms = -token_advantages * logprobs
    if penalty.estimator in EXACT or not in_reward:
        terms = terms + penalty.coef * kl_tokens
    if weights is not None:
        terms = terms * weights
    return Objective(terms.sum() / normalizer, kl, penalized)


def not_caused(kl_tokens: torch.Tensor, cu_seqlens: torch.Tensor, penalty: Penalty) -> torch.Tensor:
    """The KL in each token's sequence that the token had no part in: f32 [N] -> f32 [N].

    The exact KL_t is settled before token t is drawn, so token s has no part in KL_1..KL_s; the sampled k_t is settled
    by token t, so it has none in k_1..k_(s-1).
    """
    up_to_here = kl_tokens.double().cumsum(0)  # float64: the difference of two long sums
    before_sequence = torch.cat([up_to_here.new_zeros(1), up_to_here])[cu_seqlens[:-1].long()]
    settled = up_to_here - before_sequence[sequence_of_token(cu_seqlens, kl_tokens.numel())]
    return (settled if penalty.estimator in EXACT else settled - kl_tokens).to(kl_tokens.dtype)
