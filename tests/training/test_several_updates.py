"""Several updates per rollout: what the minibatches are, what is reported, and that a run resumes to the bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_loop import rows, small
from toy import toy_batch, toy_config, toy_model
from toy_step import CPU, toy_objective, toy_update

import fastkl
from fastkl.rollout.agreement import StaleEngineError
from fastkl.scoring import backbone
from fastkl.scoring.scored_model import ScoredModel
from fastkl.training.first_forward import first_forward
from fastkl.training.loop import learn
from fastkl.training.minibatches import minibatches
from fastkl.training.setup import limits_of
from fastkl.training.stopwatch import Stopwatch

CLIP = {"updates_per_rollout": 2, "epochs": 2, "clip": (0.2, 0.2)}


def several(policy, reference, optimizer, batch, config):
    backbone.register_packed_attention()
    models = ScoredModel(policy), ScoredModel(reference)
    limits = replace(limits_of(config, models[0]), micro_batch_tokens=4096)
    return learn(*models, optimizer, batch, toy_objective(config), limits, Stopwatch(CPU), step=1)


@pytest.mark.parametrize(("updates", "epochs"), [(1, 2), (2, 1), (3, 2)])
def test_every_epoch_has_each_group_once_and_whole(updates, epochs):
    batch = toy_batch(toy_model(0))
    objective = toy_objective(toy_config(updates_per_rollout=updates, epochs=epochs, clip=(0.2, 0.2)))
    parts = [part.valid for part in minibatches(batch, objective)]
    assert len(parts) == updates * epochs
    for epoch in range(epochs):
        mine = torch.stack(parts[epoch * updates : (epoch + 1) * updates])
        assert torch.equal(mine.sum(0), batch.valid.long())
        assert all(torch.equal(part[g], batch.valid[g]) for part in mine for g in range(3) if part[g].any())


def test_the_first_update_of_a_rollout_is_the_only_ones_gradient_and_later_ones_see_the_ratio():
    """By hand: two SGD steps on the two halves, the second with the surrogate's gradient at the policy in between."""
    policy, reference, by_hand = toy_model(0), toy_model(1).requires_grad_(False), toy_model(0)
    config = toy_config(updates_per_rollout=2, clip=(0.2, 0.2), kl_coef=0.0)
    batch = toy_batch(policy)
    outcome = several(policy, reference, torch.optim.SGD(policy.parameters(), lr=0.5), batch, config)
    assert outcome.applied and outcome.reused.num_updates == 2 and outcome.reused.drift > 0
    old = [logprobs_of(by_hand, batch, b) for b in range(3)]
    for groups in ((0, 1), (2,)):
        terms = []
        for b in groups:
            members = [k for k in range(4) if batch.valid[b, k]]
            rewards = [float(batch.rewards[b, k]) for k in members]
            for logp, before, r in zip(logprobs_of(by_hand, batch, b), old[b], rewards, strict=True):
                a = r - (sum(rewards) - r) / (len(rewards) - 1)
                ratio = (logp - before.detach()).exp()
                terms.append(torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a).sum())
        gradients = torch.autograd.grad(-torch.stack(terms).sum() / len(terms), list(by_hand.parameters()))
        with torch.no_grad():
            for p, g in zip(by_hand.parameters(), gradients, strict=True):
                p -= 0.5 * g
    for ours, theirs in zip(policy.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def logprobs_of(model, batch, b: int) -> list[torch.Tensor]:
    """log pi of each valid completion's tokens, from the model's own logits."""
    found, prompt = [], batch.prompts[b].token_ids
    for completion, ok in zip(batch.completions[b], batch.valid[b].tolist(), strict=True):
        if ok:
            y = torch.tensor(completion.token_ids)[:, None]
            logits = model(input_ids=torch.tensor([prompt + completion.token_ids]), use_cache=False).logits[0]
            found.append(logits.log_softmax(-1)[-len(y) - 1 : -1].gather(1, y)[:, 0])
    return found


def test_what_is_reported_is_of_the_policy_that_sampled():
    """KL, entropy and agreement mean what they do with one update: they equal those of one."""
    policy, reference, batch = toy_model(0), toy_model(1).requires_grad_(False), toy_batch(toy_model(0))
    once = toy_update(toy_model(0), reference, torch.optim.SGD(policy.parameters(), lr=0.0), batch, toy_config())
    often = several(policy, reference, torch.optim.SGD(policy.parameters(), lr=0.5), batch, toy_config(**CLIP))
    assert often.reused.num_updates == 4
    torch.testing.assert_close(often.total.sums, once.total.sums, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert often.total.num_tokens == once.total.num_tokens
    assert often.total.gap_max == pytest.approx(once.total.gap_max, abs=1e-6)


def test_samples_from_other_weights_stop_the_run_before_the_first_update():
    policy, stale = toy_model(0), toy_model(0)
    with torch.no_grad():
        stale.model.norm.weight.mul_(1.01)
    before = [p.detach().clone() for p in policy.parameters()]
    with pytest.raises(StaleEngineError, match="differ by"):
        optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
        several(policy, toy_model(1), optimizer, toy_batch(stale), toy_config(**CLIP))
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))


def test_the_first_forward_keeps_what_it_scored_group_by_group():
    policy, reference = toy_model(0), toy_model(1)
    backbone.register_packed_attention()
    batch, config = toy_batch(policy), toy_config()
    models = ScoredModel(policy), ScoredModel(reference)
    first = first_forward(*models, batch, toy_objective(config), 1, Stopwatch(CPU))
    for b in range(3):
        expected = torch.cat(logprobs_of(policy, batch, b)).detach()
        torch.testing.assert_close(first.logprobs[b].double(), expected, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_a_run_with_several_updates_per_rollout_resumes_to_the_bit(tmp_path):
    """One line per rollout, and the weights and metrics of a run that was never stopped."""
    options = CLIP | {"prompts_per_step": 3, "steps": 4, "save_every": 2, "lr_decay": "constant"}
    whole, parts = small(tmp_path / "whole", **options), small(tmp_path / "parts", **options)
    fastkl.train(whole)
    fastkl.train(replace(parts, steps=2))
    assert fastkl.train(replace(parts, resume=True)).step == 4
    ours, theirs = (
        [{k: v for k, v in row.items() if not k.startswith(("time/", "throughput/", "memory/"))} for row in rows(run)]
        for run in (parts, whole)
    )
    assert ours == theirs and [row["step"] for row in ours] == [1, 2, 3, 4]
    assert all(row["reuse/updates"] == 4 and row["reuse/drift"] > 0 for row in ours)
    assert abs(ours[0]["kl/mean"]) < 1e-4, "in step 1 the scores are those of the start, not of the updates"
