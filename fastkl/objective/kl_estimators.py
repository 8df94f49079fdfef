"""The KL penalty: how it is estimated per token, where it enters the update, and which pairs of the two are refused.

Notation, at one token of a completion drawn from the policy pi (on the support S that the sampler allowed; q is the
reference on the same S), with k = log pi(y) - log q(y):

    k1 = k        k2 = k^2 / 2        k3 = exp(-k) - 1 + k        exact = sum_v pi(v) (log pi(v) - log q(v))

(Schulman 2020, "Approximating KL divergence"). `exact` is summed over S, `exact_full` over the whole vocabulary: it
also sees mass that drifts off S. In the reward, beta times the completion's sum is taken from its reward; in the loss,
it is added to the loss and differentiated. What that does to the expected gradient decides what is allowed:

    k1     reward: the gradient of the sequence KL (the missing pathwise term has mean zero)
    k2     loss:   the token-level gradient of KL(pi, q)
    k3     loss:   the token-level gradient of KL(q, pi), the other direction: GRPO's form
    exact  reward: the gradient of the sequence KL; needs the pathwise term beta * sum_t grad KL_t, which is added
    exact  loss:   the token-level gradient of KL(pi, q)

"Token-level" holds the texts before each token fixed: it ignores that today's token leads to tomorrow's KL.
"""

from __future__ import annotations

import torch

from fastkl.kernels.types import TokenScores


def sampled_logprobs(scores: TokenScores) -> torch.Tensor:
    """log pi(y) under the distribution that was sampled from, f32 [N]: on the support where there is one."""
    on_support = scores.policy_logprobs_support
    return scores.policy_logprobs if on_support is None else on_support


def sampled_ref_logprobs(scores: TokenScores) -> torch.Tensor:
    """log q(y) on the same ids, f32 [N]."""
    on_support = scores.ref_logprobs_support
    return scores.ref_logprobs if on_support is None else on_support


def support_kl(scores: TokenScores) -> torch.Tensor:
    """The exact KL on the support, f32 [N]: over all ids where there is no support."""
    return scores.kl if scores.kl_support is None else scores.kl_support


def token_kl(scores: TokenScores, estimator: str) -> torch.Tensor:
    """The estimator's value at every token, f32 [N], in nats."""
    if estimator == "exact":
        return support_kl(scores)
    if estimator == "exact_full":
        return scores.kl
    log_ratio = sampled_logprobs(scores) - sampled_ref_logprobs(scores)
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio.square()
    if estimator == "k3":
        return torch.expm1(-log_ratio) + log_ratio
    raise ValueError(f"kl estimator is {estimator!r}; use 'k1', 'k2', 'k3', 'exact' or 'exact_full'")


def token_kl_slope(scores: TokenScores, estimator: str) -> torch.Tensor:
    """d estimate / d log pi(y) at every token, f32 [N]: what k1, k2 or k3 in the loss multiplies the log-prob with."""
    log_ratio = sampled_logprobs(scores) - sampled_ref_logprobs(scores)
    if estimator == "k1":
        return torch.ones_like(log_ratio)
    if estimator == "k2":
        return log_ratio
    if estimator == "k3":
        return -torch.expm1(-log_ratio)
    raise ValueError(f"kl estimator is {estimator!r}; use 'k1', 'k2' or 'k3'")
