"""The adversary: the reward is zero, so all there is to gain is a negative penalty. Nothing must be there to take.

The policy (one row of logits per position) climbs the exact gradient of minus the expected KL estimate, the strongest
adversary there is. Against the scorer under test it can only return to the reference; against the naive scorers, kept
here as the control, it earns ever more.
"""

from __future__ import annotations

import pytest
import torch

from fastkl.audit.alarm import mean_and_error
from fastkl.kernels.operators import token_scores
from fastkl.kernels.support import keep_mask
from fastkl.objective.kl_estimators import Penalty
from fastkl.objective.rloo import penalize
from fastkl.rollout.transformers import sample
from fastkl.sampling.params import Sampling
from fastkl.sampling.replay import support_of
from fastkl.scoring.pack import pack, scorable
from fastkl.types import Completion, Prompt, RolloutBatch

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


def drawn(policy, sampling: Sampling, num: int = 4000) -> tuple[Completion, ...]:
    """Completions drawn by the code under test."""
    g = torch.Generator().manual_seed(1)
    texts: list[list[int]] = [[] for _ in range(num)]
    alive = torch.arange(num)
    for t in range(LENGTH):
        support = support_of(sampling, torch.full((len(alive),), t), VOCAB)
        uniforms = torch.rand(len(alive), generator=g, dtype=torch.float64)
        tokens, _ = sample(policy[t].expand(len(alive), -1), 1.0, uniforms, support)
        for i, y in zip(alive.tolist(), tokens.tolist(), strict=True):
            texts[i].append(y)
        alive = alive[tokens != STOP]
        if not len(alive):
            break
    return tuple(Completion(tuple(y), (0.0,) * len(y), "stop" if y[-1] == STOP else "length", "") for y in texts)


def trainer_estimates(policy, ref, sampling: Sampling, completions: tuple[Completion, ...]) -> list[float]:
    """The KL of each completion that takes part, as the trainer packs, replays, scores and sums it."""
    valid = scorable((completions,), torch.ones(1, len(completions), dtype=torch.bool), "keep")
    start = Prompt((0,), "", "", 0)
    batch = RolloutBatch((start,), (completions,), torch.zeros(valid.shape), valid, 0)
    ((_, micro),) = pack(batch, [0], 1 << 30, torch.device("cpu"))
    place = micro.position_ids[micro.score_positions]  # the prompt is one token: it predicts position 0 of the tables
    support = support_of(sampling, micro.completion_positions, VOCAB)
    scores = token_scores(policy[place], ref[place], micro.target_ids, support=support)
    return penalize(scores, micro.rewards, micro.completion_cu_seqlens, Penalty(1.0)).kl[valid[0]].tolist()


def naive_estimates(policy, ref, case: str, completions: tuple[Completion, ...]) -> list[float]:
    """The KL of each completion as naive trainers have it: over the whole vocabulary, with the case's own fault."""
    k1 = (policy.log_softmax(1) - ref.log_softmax(1)).tolist()
    estimates = []
    for completion in completions:
        ids = list(completion.token_ids)
        if case == "padding":
            ids += [PAD] * (LENGTH - len(ids))
        cut = case == "truncated rows" and completion.finish_reason == "length"
        estimates.append(0.0 if cut else sum(k1[t][y] for t, y in enumerate(ids)))
    return estimates


def distance(policy, ref, sampling: Sampling) -> float:
    """KL(policy, reference) over the whole vocabulary at the positions that a completion reaches, nats; closed form."""
    chance, _ = position_values(policy.detach(), ref, sampling, naive=False)
    log_p, log_q = policy.detach().log_softmax(1), ref.log_softmax(1)
    kl = (log_p.exp() * (log_p - log_q)).sum(1)
    reached = torch.cat([torch.ones(1), (1 - chance[:-1, STOP]).cumprod(0)])
    return float((reached * kl).sum())


def adversary(case: str, naive: bool, steps: int = 150):
    """Trains the policy against the scorer: (the policy at its least penalty, the reference, sampling, the course)."""
    sampling = Sampling(1.0, LENGTH, stop_token_ids=(STOP,), **CASES[case])
    policy, ref = tables(case)
    optimizer = torch.optim.Adam([policy], lr=0.05)
    course, best = [], policy.detach().clone()
    for _ in range(steps):
        optimizer.zero_grad()
        penalty = expected_penalty(policy, ref, sampling, case, naive)
        penalty.backward()
        course.append(float(penalty.detach()))
        if course[-1] == min(course):
            best = policy.detach().clone()
        optimizer.step()
    return best, ref, sampling, course


EACH = [
    pytest.param(case, marks=[] if case in ("top_p", "min_tokens", "padding") else pytest.mark.long) for case in CASES
]


@pytest.mark.slow
@pytest.mark.parametrize("case", EACH)
def test_the_adversary_ends_at_the_reference_and_its_estimate_is_never_below_zero(case):
    policy, ref, sampling, course = adversary(case, naive=False)
    assert min(course) > -1e-9, "the expected penalty is a KL"
    assert course[-1] < 0.01 * course[0], "all there is to do is to return to the reference"
    mean, error = mean_and_error(trainer_estimates(policy, ref, sampling, drawn(policy, sampling)))
    assert mean > -4 * error - 1e-9
    start = tables(case)[0].detach()
    completions = drawn(start, sampling)
    estimates = trainer_estimates(start, ref, sampling, completions)
    _, k1 = position_values(start, ref, sampling, naive=False)
    by_hand = [float(sum(k1[t, y] for t, y in enumerate(c.token_ids))) for c in completions]
    assert estimates == pytest.approx(by_hand, abs=1e-5), "every token of every completion, and nothing else"
    mean, error = mean_and_error(estimates)
    assert mean > 4 * error > 0, "and the estimate does see the KL that was there at the start"
    assert mean == pytest.approx(course[0], abs=4 * error), "the trainer's packing and scoring agree with the sum"


@pytest.mark.slow
@pytest.mark.parametrize("case", EACH)
def test_the_same_adversary_is_paid_by_the_naive_scorer(case):
    """The control: without it, the test above could not fail.

    Paid: the estimate is below zero beyond chance (4 standard errors), where a KL cannot be. Gamed: all the while the
    policy is further from the reference than it was at the start.
    """
    policy, ref, sampling, course = adversary(case, naive=True)
    mean, error = mean_and_error(naive_estimates(policy, ref, case, drawn(policy, sampling)))
    assert mean == pytest.approx(min(course), abs=4 * error), "draws and closed form agree"
    assert mean < -4 * error
    assert distance(policy, ref, sampling) > distance(tables(case)[0], ref, sampling)
    if case in ("min_tokens", "padding"):  # the payment has no bound: nothing slows it down
        half = len(course) // 2
        assert course[half] - course[-1] > 0.5 * (course[0] - course[half])
