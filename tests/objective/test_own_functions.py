"""A user's own advantage or estimator is one file: it is found by name, trains, and does what its formula says."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from toy import toy_batch, toy_config, toy_model
from toy_step import step_gradient

from fastkl.errors import UserError
from fastkl.kernels.types import TokenScores
from fastkl.objective.advantages import ADVANTAGES, find_advantage
from fastkl.objective.kl_estimators import Penalty, check_penalty, find_estimator

ADVANTAGE = """
def standardized(rewards, valid):
    count = valid.sum(1, keepdim=True).clamp(min=1)
    rewards = rewards.masked_fill(~valid, 0.0)
    mean = rewards.sum(1, keepdim=True) / count
    spread = ((rewards - mean) ** 2).masked_fill(~valid, 0.0).sum(1, keepdim=True) / count
    return ((rewards - mean) / spread.sqrt().clamp(min=1e-6)).masked_fill(~valid, 0.0)

standardized.min_samples = 3
"""
ESTIMATOR = """
def k1_again(scores):
    return scores.policy_logprobs - scores.ref_logprobs

k1_again.unbiased_in = ("reward",)

def k2_again(scores):
    return 0.5 * (scores.policy_logprobs - scores.ref_logprobs) ** 2

k2_again.unbiased_in = ("loss",)
k2_again.slope = lambda scores: scores.policy_logprobs - scores.ref_logprobs

def silent(scores):
    return scores.kl

def nowhere(scores):
    return scores.kl

nowhere.unbiased_in = ("loss",)
"""


@pytest.fixture
def models():
    return toy_model(0), toy_model(1).requires_grad_(False)


def own(tmp_path: Path, text: str, name: str) -> str:
    path = tmp_path / "own.py"
    path.write_text(text)
    return f"{path}:{name}"


def test_an_advantage_of_ones_own_shapes_the_gradient(tmp_path, models):
    """RLOO's advantage is (R - mean) K / (K - 1); the own one is (R - mean) / deviation: a known ratio in a group."""
    policy, reference = models
    name = own(tmp_path, ADVANTAGE, "standardized")
    batch = toy_batch(policy)
    assert find_advantage(name).min_samples == 3
    rewards = torch.tensor([[1.0, 2.0, 4.0, 9.0]])
    valid = torch.ones(1, 4, dtype=torch.bool)
    ours, rloo = find_advantage(name).function(rewards, valid), ADVANTAGES["rloo"].function(rewards, valid)
    torch.testing.assert_close(ours * rewards.std(correction=0) * 4 / 3, rloo)
    whole, _ = step_gradient(policy, reference, batch, toy_config(advantage=name))
    other, _ = step_gradient(policy, reference, batch, toy_config())
    assert any((whole[key] - other[key]).abs().max() > 1e-3 for key in whole)


@pytest.mark.parametrize(("name", "twin", "placement"), [("k1_again", "k1", "reward"), ("k2_again", "k2", "loss")])
def test_an_estimator_of_ones_own_equals_the_built_in_one_that_it_copies(tmp_path, models, name, twin, placement):
    policy, reference = models
    batch = toy_batch(policy)
    mine = own(tmp_path, ESTIMATOR, name)
    check_penalty(Penalty(1.0, mine, placement))
    ours, _ = step_gradient(policy, reference, batch, toy_config(kl_estimator=mine, kl_placement=placement))
    theirs, _ = step_gradient(policy, reference, batch, toy_config(kl_estimator=twin, kl_placement=placement))
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=1e-12)


def test_an_estimator_is_refused_where_it_does_not_claim_to_be_unbiased(tmp_path):
    name = own(tmp_path, ESTIMATOR, "k2_again")
    with pytest.raises(UserError, match="kl_estimator: .*k2_again in the reward is refused, .*put it into the loss"):
        check_penalty(Penalty(1.0, name, "reward"))


@pytest.mark.parametrize(
    ("name", "words"), [("silent", "does not say where it is unbiased"), ("nowhere", "in the loss and has no slope")]
)
def test_an_estimator_that_leaves_something_open_is_refused_by_name(tmp_path, name, words):
    with pytest.raises(UserError, match=words):
        find_estimator(own(tmp_path, ESTIMATOR, name))


def test_unknown_names_are_answered_with_the_nearest_and_with_the_forms_there_are():
    with pytest.raises(UserError, match="advantage: unknown 'rlo'. Did you mean 'rloo'.*file.py:function"):
        find_advantage("rlo")
    with pytest.raises(UserError, match="kl_estimator: unknown 'k4'. .*exact_full, package.module:function"):
        find_estimator("k4")


def test_the_built_in_estimators_are_their_formulas():
    k = torch.tensor([0.3, -1.2, 0.0], dtype=torch.float64)
    scores = TokenScores(k, torch.zeros_like(k), kl=k**2)
    expected = {
        "k1": (lambda x: x, lambda x: 1.0),
        "k2": (lambda x: x * x / 2, lambda x: x),
        "k3": (lambda x: math.exp(-x) - 1 + x, lambda x: 1 - math.exp(-x)),
    }
    for name, (value, slope) in expected.items():
        estimator = find_estimator(name)
        assert estimator.value(scores).tolist() == pytest.approx([value(x) for x in k.tolist()], abs=1e-12)
        assert estimator.slope(scores).tolist() == pytest.approx([slope(x) for x in k.tolist()], abs=1e-12)
    assert find_estimator("exact").value(scores).tolist() == (k**2).tolist()
