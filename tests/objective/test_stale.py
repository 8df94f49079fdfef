"""Samples of an earlier policy: what is reported and what is learnt, by brute force over a toy's completions.

mu is the world's policy, which draws; pi is another table of logits, which is trained. That sequence weights make the
update that of the objective at pi is shown in test_reuse.py, whose first policy is mu.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_objective import BETA, World, exact_gradient, scores_of
from test_reuse import constants, two_policies, update_gradient

from fastkl.audit.alarm import KlAlarm
from fastkl.config.settings import TrainConfig, check_config
from fastkl.errors import UserError
from fastkl.objective.importance import weighted_k1
from fastkl.objective.kl_estimators import Penalty, sampled_logprobs, sampled_ref_logprobs

AHEAD = {"rollout_ahead": 1, "importance": "sequence"}


def mean_kl(mu: World, pi: World, *, weighted: bool) -> float:
    """E over all completions that mu draws of the estimate of KL(pi, q), by the code under test."""
    drawn, scored = (constants(scores_of(world)[0]) for world in (mu, pi))
    _, owners = scores_of(mu)
    logprobs, ref = sampled_logprobs(scored), sampled_ref_logprobs(scored)
    k1 = weighted_k1(sampled_logprobs(drawn), logprobs, ref) if weighted else logprobs - ref
    return float(
        sum(mu.logprob(c).exp().detach() * k1[rows].sum() for c, rows in zip(mu.completions, owners, strict=True))
    )


def kl_at_the_texts_of(mu: World, pi: World) -> float:
    """sum over the texts that mu can be at of mu(text) KL(pi, q) there."""
    chance: dict[tuple[int, ...], float] = {}
    for c in mu.completions:
        for t in range(len(c)):
            chance[c[:t]] = chance.get(c[:t], 0.0) + float(mu.logprob(c).exp().detach())
    return sum(p * float(pi.kl(text).detach()) for text, p in chance.items())


@pytest.mark.parametrize("sampling", ["whole", "temperature", "min_tokens", "banned"])
def test_the_weighted_estimate_has_the_mean_of_a_kl_whichever_policy_has_drawn(sampling):
    mu, pi = two_policies(sampling)
    assert mean_kl(mu, pi, weighted=True) == pytest.approx(kl_at_the_texts_of(mu, pi), abs=1e-9)
    assert abs(mean_kl(mu, pi, weighted=False) - kl_at_the_texts_of(mu, pi)) > 5e-3


def first_stale_step() -> tuple[World, World]:
    """mu is the reference, as before the first update."""
    mu, pi = two_policies("whole")
    start = mu.table.detach().clone()
    return replace(mu, ref_table=start, kept={}), replace(pi, ref_table=start, kept={})


def test_in_the_first_stale_step_the_plain_estimate_is_negative_and_rings_the_alarm_and_the_weighted_one_does_not():
    mu, pi = first_stale_step()
    expected = kl_at_the_texts_of(mu, replace(mu, ref_table=pi.table.detach(), kept={}))  # KL(q, pi)
    assert mean_kl(mu, pi, weighted=False) == pytest.approx(-expected, abs=1e-9)
    assert mean_kl(mu, pi, weighted=True) > 0.01
    chance = mu.logprobs().exp().detach()
    draws = torch.multinomial(chance, 4000, replacement=True, generator=torch.Generator().manual_seed(0)).tolist()
    drawn, scored = (constants(scores_of(world)[0]) for world in (mu, pi))
    _, owners = scores_of(mu)
    logprobs, ref = sampled_logprobs(scored), sampled_ref_logprobs(scored)
    weighted = weighted_k1(sampled_logprobs(drawn), logprobs, ref)
    assert KlAlarm().add(float((logprobs - ref)[owners[i]].sum()) for i in draws)
    assert KlAlarm().add(float(weighted[owners[i]].sum()) for i in draws) is None


def test_without_weights_k1_in_the_reward_has_the_gradient_of_a_variance():
    mu, pi = two_policies("whole")
    mu = replace(mu, reward=torch.zeros_like(mu.reward))
    chance = mu.logprobs().exp().detach()
    k = pi.logprobs()
    k = k - replace(pi, table=pi.ref_table, kept={}).logprobs()
    variance = (chance * k.square()).sum() - (chance * k).sum().square()
    (documented,) = torch.autograd.grad(-BETA / 2 * variance, pi.table)
    got = update_gradient(mu, pi, Penalty(BETA, "k1", "reward"))
    torch.testing.assert_close(got, documented, rtol=0, atol=1e-9)
    right = exact_gradient(replace(pi, reward=mu.reward), "k1", "reward")
    assert (got - right).abs().max() > 5e-3


@pytest.mark.parametrize(("settings", "words"), [
    ({"importance": "none"}, "importance: none takes .* k1 in the reward has the gradient of a variance"),
    ({"importance": "none", "kl_coef": 0.0}, "importance: none takes .* its gradient is biased; give"),
    ({"importance": "none", "kl_estimator": "exact_full", "kl_placement": "loss"}, "importance: .* is biased; give"),
    ({"top_p": 0.9}, "top_p: keeps other ids after an update"),
    ({"updates_per_rollout": 2, "clip": (0.2, 0.2)}, "updates_per_rollout: 2 updates a rollout"),
    ({"epochs": 3, "clip": (0.2, 0.2)}, "epochs: 3 updates a rollout"),
    ({"dynamic_sampling": 1}, "dynamic_sampling: 1 draws other prompts"),
    ({"engine_sleep": True}, "engine_sleep: with rollout_ahead the engine draws"),
    ({"engine_tp": 2}, "engine_tp: with rollout_ahead the 2 processes of an engine"),
    ({"rollout_ahead": 2}, "rollout_ahead: 2 is out of range; it must be 0 or 1"),
])  # fmt: skip
def test_what_is_biased_or_cannot_be_with_stale_samples_is_refused_by_name(settings, words):
    with pytest.raises(UserError, match=words):
        check_config(TrainConfig(**(AHEAD | settings)))


@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_the_rest_is_allowed(importance):
    check_config(TrainConfig(**(AHEAD | {"importance": importance, "min_tokens": 3, "banned_token_ids": (5,)})))
