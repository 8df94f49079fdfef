"""The adversary: the reward is zero, so all there is to gain is a negative penalty. Nothing must be there to take.

The policy (one row of logits per position) climbs the exact gradient of minus the expected KL estimate, the strongest
adversary there is. Against the scorer under test it can only return to the reference; against the naive scorers, kept
here as the control, it earns ever more.
"""

from __future__ import annotations

import pytest
import torch
from fastkl.kernels.operators import token_scores
from fastkl.kernels.support import keep_mask

from fastkl.contract import Sampling, support_of
from fastkl.rollout import sample

VOCAB, LENGTH, STOP, PAD = 24, 4, 23, 0
CASES = {
    "top_k": {"top_k": 4},
    "top_p": {"top_p": 0.6},
    "min_p": {"min_p": 0.3},
    "min_tokens": {"min_tokens": 3},
    "padding": {},
    "truncated rows": {},
}


def tables(case: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Policy and reference logits [T, V]: the policy starts near the reference, which likes to stop."""
    g = torch.Generator().manual_seed(0)
    ref = 1.5 * torch.randn(LENGTH, VOCAB, generator=g, dtype=torch.float64)
    ref[:, STOP] += 2.0
    return (ref + 0.3 * torch.randn(ref.shape, generator=g, dtype=torch.float64)).requires_grad_(), ref


def position_values(policy, ref, sampling: Sampling, naive: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """pi_S(v) and the scorer's k1 of every id at every position, each [T, V]."""
    positions = torch.arange(LENGTH).repeat_interleave(VOCAB)
    support = support_of(sampling, positions, VOCAB)
    scores = token_scores(policy[positions], ref[positions], torch.arange(VOCAB).repeat(LENGTH), support=support)
    k1 = scores.policy_logprobs - scores.ref_logprobs
    keep = torch.ones(LENGTH, VOCAB, dtype=torch.bool)
    if support is not None:
        if not naive:
            k1 = scores.policy_logprobs_support - scores.ref_logprobs_support
        keep = keep_mask(support_of(sampling, torch.arange(LENGTH), VOCAB), policy.detach())
    return policy.masked_fill(~keep, -torch.inf).softmax(1), k1.view(LENGTH, VOCAB)


def expected_penalty(policy, ref, sampling: Sampling, case: str, naive: bool) -> torch.Tensor:
    """E[the completion's KL estimate], differentiable in full: through the draws and through the values."""
    chance, k1 = position_values(policy, ref, sampling, naive)
    total, alive, so_far = 0.0, 1.0, 0.0  # so_far: E[sum of k1, still going]
    for t in range(LENGTH):
        stops = alive * chance[t, STOP]
        at_stop = chance[t, STOP] * so_far + stops * k1[t, STOP]
        if naive and case == "padding":  # the row is filled up with pads, and they are scored
            at_stop = at_stop + stops * k1[t + 1 :, PAD].sum()
        going = chance[t] * (torch.arange(VOCAB) != STOP)
        so_far = going.sum() * so_far + alive * (going * k1[t]).sum()
        total, alive = total + at_stop, alive - stops
    if naive and case == "truncated rows":  # their KL is set to zero, but they stay in the group
        return total
    return total + so_far


def sampled_penalty(policy, ref, sampling: Sampling, num: int = 4000) -> tuple[float, float]:
    """Mean and standard error of the completions' k1 sums, drawn and scored by the code under test."""
    g = torch.Generator().manual_seed(1)
    total, alive = torch.zeros(num, dtype=torch.float64), torch.ones(num, dtype=torch.bool)
    for t in range(LENGTH):
        rows = alive.nonzero()[:, 0]
        if not len(rows):
            break
        z, r = policy.detach()[t].expand(len(rows), -1), ref[t].expand(len(rows), -1)
        support = support_of(sampling, torch.full((len(rows),), t), VOCAB)
        tokens, _ = sample(z, 1.0, torch.rand(len(rows), generator=g, dtype=torch.float64), support)
        scores = token_scores(z, r, tokens, support=support)
        logp = scores.policy_logprobs if support is None else scores.policy_logprobs_support
        total[rows] += logp - (scores.ref_logprobs if support is None else scores.ref_logprobs_support)
        alive[rows[tokens == STOP]] = False
    return float(total.mean()), float(total.std() / num**0.5)


def adversary(case: str, naive: bool, steps: int = 150):
    """Trains the policy against the scorer; returns it, the reference, the sampling and the penalty's course."""
    sampling = Sampling(1.0, LENGTH, (STOP,), **CASES[case])
    policy, ref = tables(case)
    optimizer = torch.optim.Adam([policy], lr=0.05)
    course = []
    for _ in range(steps):
        optimizer.zero_grad()
        penalty = expected_penalty(policy, ref, sampling, case, naive)
        penalty.backward()
        optimizer.step()
        course.append(float(penalty.detach()))
    return policy, ref, sampling, course


@pytest.mark.parametrize("case", CASES)
def test_the_adversary_ends_at_the_reference_and_its_estimate_is_never_below_zero(case):
    policy, ref, sampling, course = adversary(case, naive=False)
    assert min(course) > -1e-9, "the expected penalty is a KL"
    assert course[-1] < 0.02 < course[0]
    mean, error = sampled_penalty(policy, ref, sampling)
    assert mean > -4 * error - 1e-9
    for start in (tables(case)[0],):
        mean, error = sampled_penalty(start, ref, sampling)
        assert mean > 4 * error > 0  # and it does see the KL that was there at the start


@pytest.mark.parametrize("case", CASES)
def test_the_same_adversary_is_paid_by_the_naive_scorer(case):
    """The control: without it, the test above could not fail."""
    policy, ref, sampling, course = adversary(case, naive=True)
    if case == "truncated rows":  # negative on paper, and ever further away from the reference
        true = float(expected_penalty(policy.detach(), ref, sampling, case, naive=False))
        assert course[-1] < -0.1 < 0.2 < true
    else:
        assert min(course) < -0.5
    if case in ("min_tokens", "padding"):
        assert course[-1] < course[len(course) // 2] - 0.1, "and it goes on"
