"""RLOO against brute force: advantages by hand, gradients by enumerating every completion of a toy policy."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fastkl.rloo import (
    advantages,
    leave_one_out_advantages,
    penalized_rewards,
    sequence_kl,
    sequence_sums,
    token_coefficients,
)


def test_sequence_sums_equal_a_loop_and_skip_empty_sequences():
    values = torch.randn(9, dtype=torch.float64, requires_grad=True)
    cu = torch.tensor([0, 4, 4, 5, 9], dtype=torch.int32)
    sums = sequence_sums(values, cu)
    assert torch.equal(sums[1], torch.zeros((), dtype=torch.float64))
    for i in range(4):
        torch.testing.assert_close(sums[i], values[cu[i] : cu[i + 1]].sum(), rtol=0, atol=1e-15)
    (grad,) = torch.autograd.grad((sums * torch.tensor([1.0, 2, 3, 4])).sum(), values)
    assert grad.tolist() == [1, 1, 1, 1, 3, 4, 4, 4, 4]


def test_sequence_kl_sums_or_averages_the_log_ratio():
    logp, ref = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.5, -2.25, -2.0])
    cu = torch.tensor([0, 2, 2, 3], dtype=torch.int32)
    assert sequence_kl(logp, ref, cu, "sum").tolist() == [0.75, 0.0, -1.0]
    assert sequence_kl(logp, ref, cu, "mean").tolist() == [0.375, 0.0, -1.0]


def test_leave_one_out_advantage_is_reward_minus_mean_of_the_other_valid_samples():
    rewards = torch.tensor([[1.0, 4.0, 7.0, 100.0], [5.0, 0.0, 0.0, 0.0]])
    valid = torch.tensor([[True, True, True, False], [True, False, False, False]])
    expected = [[1 - 5.5, 4 - 4.0, 7 - 2.5, 0.0], [0.0, 0.0, 0.0, 0.0]]
    assert leave_one_out_advantages(rewards, valid).tolist() == expected
    assert advantages(rewards, valid, "none").tolist() == [[1.0, 4.0, 7.0, 0.0], [5.0, 0.0, 0.0, 0.0]]


def all_completions(vocab: int, length: int, stop: int) -> list[tuple[int, ...]]:
    """Every completion: ends at `stop`, or is cut at `length`."""
    found = []
    for tokens in itertools.product(range(vocab), repeat=length):
        cut = tokens.index(stop) + 1 if stop in tokens else length
        found.append(tokens[:cut])
    return sorted(set(found))


def tabular_logprobs(table: torch.Tensor, completion: tuple[int, ...]) -> torch.Tensor:
    """log pi of each token under a policy with one logit row per (position, previous token)."""
    previous = (0, *completion[:-1])
    return torch.stack([table[t, previous[t]].log_softmax(-1)[y] for t, y in enumerate(completion)])


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("baseline", ["leave_one_out", "none"])
def test_expected_gradient_of_the_loss_is_that_of_the_penalised_objective(reduction, baseline):
    """All pairs (K = 2) of a 3-token, 3-step tabular policy, float64: E[-grad loss] = grad E[r - beta KL], to 1e-9."""
    vocab, length, stop, beta = 3, 3, 2, 0.7
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(length, vocab, vocab, dtype=torch.float64, generator=generator, requires_grad=True)
    ref_table = torch.randn(length, vocab, vocab, dtype=torch.float64, generator=generator)
    completions = all_completions(vocab, length, stop)
    reward = torch.randn(len(completions), dtype=torch.float64, generator=generator)

    def per_token(i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return tabular_logprobs(table, completions[i]), tabular_logprobs(ref_table, completions[i])

    probability = torch.stack([per_token(i)[0].sum().exp() for i in range(len(completions))])
    assert math.isclose(float(probability.detach().sum()), 1.0, abs_tol=1e-12)

    expected_loss_gradient = torch.zeros_like(table)
    for i, j in itertools.product(range(len(completions)), repeat=2):
        (logp_i, ref_i), (logp_j, ref_j) = per_token(i), per_token(j)
        logp, ref = torch.cat([logp_i, logp_j]), torch.cat([ref_i, ref_j])
        cu = torch.tensor([0, len(logp_i), len(logp)], dtype=torch.int32)
        penalized = penalized_rewards(reward[[i, j]].view(1, 2), logp.detach(), ref, cu, beta, reduction)
        valid = torch.ones(1, 2, dtype=torch.bool)
        loss = (token_coefficients(advantages(penalized, valid, baseline), cu, normalizer=2.0) * logp).sum()
        (gradient,) = torch.autograd.grad(loss, table)
        expected_loss_gradient += probability[i].detach() * probability[j].detach() * gradient

    def penalty(i: int) -> torch.Tensor:
        ratio = per_token(i)[0] - per_token(i)[1]
        # "mean" is a reward like any other: no gradient through the ratio itself (see rloo.py)
        return ratio.sum() if reduction == "sum" else ratio.mean().detach()

    objective = sum(probability[i] * (reward[i] - beta * penalty(i)) for i in range(len(completions)))
    (exact,) = torch.autograd.grad(objective, table)
    torch.testing.assert_close(-expected_loss_gradient, exact, rtol=0, atol=1e-9)
