"""pass@k against all subsets, standard errors against repeated experiments, and which rewards are a pass."""

from __future__ import annotations

import itertools
import math
import random
from fractions import Fraction
from statistics import fmean, stdev

import pytest
import torch

from fastkl.config.held_out import pass_ks
from fastkl.evaluation.evaluate import passes
from fastkl.evaluation.measures import mean_and_error, pass_at_k
from fastkl.rewards.call import Rewards
from fastkl.types import RewardNotes


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_with_a_pass(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        samples = [i < c for i in range(n)]
        subsets = list(itertools.combinations(samples, k))
        assert pass_at_k(n, c, k) == pytest.approx(float(Fraction(sum(map(any, subsets)), len(subsets))), abs=1e-12)


def test_pass_at_k_is_unbiased_where_the_plug_in_estimate_is_not():
    """The mean over all outcomes of 5 samples that pass with probability 0.3 is 1 - 0.7^k to the last digits."""
    n, p = 5, 0.3

    def expected(estimate) -> float:
        return sum(math.comb(n, c) * p**c * (1 - p) ** (n - c) * estimate(c) for c in range(n + 1))

    for k in (1, 2, 4, 5):
        assert expected(lambda c, k=k: pass_at_k(n, c, k)) == pytest.approx(1 - 0.7**k, abs=1e-12)
    assert expected(lambda c: 1 - (1 - c / n) ** 4) < 1 - 0.7**4 - 0.05  # the control


@pytest.mark.slow
def test_the_standard_error_is_the_spread_of_repeated_evaluations_over_other_prompts_and_samples():
    """Prompts of chances 0.1 to 0.9, 6 samples each: the samples of a prompt are alike, so dividing by all samples
    would promise too much.
    """
    rng = random.Random(5)
    means, errors, naive = [], [], []
    for _ in range(4000):
        chances = [rng.choice((0.1, 0.5, 0.9)) for _ in range(12)]
        samples = [[float(rng.random() < chance) for _ in range(6)] for chance in chances]
        mean, error = mean_and_error([fmean(group) for group in samples])
        means.append(mean)
        errors.append(error**2)
        naive.append(stdev(x for group in samples for x in group) ** 2 / 72)
    variance = stdev(means) ** 2
    noise = variance * math.sqrt(2 / 4000)  # standard error of a variance
    assert fmean(errors) == pytest.approx(variance, abs=4 * noise)
    assert fmean(naive) < variance / 2


def test_one_prompt_has_no_standard_error():
    assert mean_and_error([0.25]) == (0.25, None)


def test_the_k_of_pass_at_k_are_the_powers_of_two_below_n_and_n():
    assert [pass_ks(n) for n in (1, 2, 3, 6, 8)] == [(1,), (1, 2), (1, 2, 3), (1, 2, 4, 6), (1, 2, 4, 8)]


def test_a_pass_reaches_the_mark_and_samples_without_a_reward_do_not_count():
    total = torch.tensor([[0.99, 0.98999, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    valid = torch.tensor([[True, True, True], [True, False, True], [False, False, False]])
    rewards = Rewards(total, valid, {}, RewardNotes())
    assert passes(rewards, 0.99, 1) == pytest.approx([2 / 3, 1 / 2])
    assert passes(rewards, 0.99, 2) == pytest.approx([1.0, 1.0])
    assert passes(rewards, 0.99, 3) == pytest.approx([1.0])
    assert passes(rewards, 0.0, 1) == [1.0, 1.0], "a missing reward stands as 0, and is no pass where 0 is one"
