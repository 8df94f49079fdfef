"""RLOO: from scores and rewards to one loss whose gradient is that of the KL-penalised objective.

Notation, for the K samples y_1..y_K of one prompt x, policy pi, reference q, task reward r, beta = kl_coef:

    KL_i  = sum_t KL_it                                        by default k1: log pi(y_it) - log q(y_it)
    R_i   = r_i - beta * KL_i                                  the penalised ("composite") reward, a constant
    A_i   = R_i - mean_{j != i} R_j                            leave-one-out advantage; the KL is inside the baseline
    loss  = -(1 / normalizer) * sum_i A_i * sum_t log pi(y_it)   linear in the log-probs: `token_coefficients`

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

import torch

from fastkl.kernels.types import TokenCoefficients, TokenScores
from fastkl.objective.advantages import advantages
from fastkl.objective.kl_estimators import token_kl, token_kl_slope
from fastkl.objective.penalty import EXACT, Penalty


def sequence_sums(values: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Sums of consecutive runs: values [N], cu_seqlens i32 [s + 1] -> [s]. An empty run sums to 0. Differentiable."""
    num_sequences = cu_seqlens.numel() - 1
    run_of_value = torch.repeat_interleave(
        torch.arange(num_sequences, device=values.device), cu_seqlens.diff().long(), output_size=values.numel()
    )
    return values.new_zeros(num_sequences).index_add(0, run_of_value, values)


def sequence_penalty(scores: TokenScores, cu_seqlens: torch.Tensor, penalty: Penalty) -> torch.Tensor:
    """KL_i before beta, nats, f32 [s]: the estimates summed or averaged over each sequence; 0 for an empty one.

    scores [N], constants; cu_seqlens i32 [s + 1].
    """
    return sequence_sums(_reduced(token_kl(scores, penalty.estimator), cu_seqlens, penalty), cu_seqlens)


def penalized_rewards(rewards: torch.Tensor, kl: torch.Tensor, penalty: Penalty) -> torch.Tensor:
    """R_i = r_i - beta * KL_i; the rewards themselves where the KL is in the loss. f32 [G, K]; kl f32 [G * K]."""
    return rewards - penalty.coef * kl.view_as(rewards) if penalty.placement == "reward" else rewards


def token_coefficients(
    scores: TokenScores,
    rewards: torch.Tensor,
    valid: torch.Tensor,
    cu_seqlens: torch.Tensor,
    penalty: Penalty,
    *,
    baseline: str,
    normalizer: float,
    weights: torch.Tensor | None = None,
) -> TokenCoefficients:
    """The factor of every score in the loss: the gradient of sum over tokens of factor * score is the update's.

    scores [N], constants, of whole prompt groups; rewards f32 [G, K], valid bool [G, K]; cu_seqlens i32 [G * K + 1] (a
    sequence that is not valid has no tokens); normalizer: the number of valid samples in the whole step, not in this
    micro-batch; weights f32 [N] or None: importance weights of the tokens (mismatch.py).
    """
    kl_tokens = _reduced(token_kl(scores, penalty.estimator), cu_seqlens, penalty)
    penalized = penalized_rewards(rewards, sequence_sums(kl_tokens, cu_seqlens), penalty)
    factor = -per_token(advantages(penalized, valid, baseline).flatten(), cu_seqlens)
    if penalty.credit == "caused":
        factor = factor - penalty.coef * not_caused(kl_tokens, cu_seqlens, penalty)
    slope = _reduced(torch.full_like(factor, penalty.coef), cu_seqlens, penalty)
    if penalty.placement == "loss" and penalty.estimator not in EXACT:
        factor = factor + slope * token_kl_slope(scores, penalty.estimator)
    scale = 1.0 / normalizer if weights is None else weights / normalizer
    slope = slope * scale if penalty.estimator in EXACT else None
    on_support, full = scores.policy_logprobs_support is not None, penalty.estimator == "exact_full"
    return TokenCoefficients(
        policy_logprobs=None if on_support else factor * scale,
        policy_logprobs_support=factor * scale if on_support else None,
        kl=slope if full or not on_support else None,
        kl_support=slope if on_support and not full else None,
    )


def per_token(values: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Each sequence's value at each of its tokens: values [s], cu_seqlens i32 [s + 1] -> [N]."""
    return values.repeat_interleave(cu_seqlens.diff().long())


def _reduced(kl_tokens: torch.Tensor, cu_seqlens: torch.Tensor, penalty: Penalty) -> torch.Tensor:
    """Each token's share in its sequence's KL, f32 [N]."""
    if penalty.reduction == "sum":
        return kl_tokens
    return kl_tokens / per_token(cu_seqlens.diff().to(kl_tokens.dtype), cu_seqlens)


def not_caused(kl_tokens: torch.Tensor, cu_seqlens: torch.Tensor, penalty: Penalty) -> torch.Tensor:
    """The KL in each token's sequence that the token had no part in: f32 [N] -> f32 [N].

    The exact KL_t is settled before token t is drawn, so token s has no part in KL_1..KL_s; the sampled k_t is settled
    by token t, so it has none in k_1..k_(s-1).
    """
    up_to_here = kl_tokens.double().cumsum(0)  # float64: the difference of two long sums
    before_sequence = torch.cat([up_to_here.new_zeros(1), up_to_here])[cu_seqlens[:-1].long()]
    settled = up_to_here - per_token(before_sequence, cu_seqlens)
    return (settled if penalty.estimator in EXACT else settled - kl_tokens).to(kl_tokens.dtype)
