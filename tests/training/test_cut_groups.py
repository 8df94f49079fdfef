"""Groups that do not fit into a micro-batch: cut between samples, the same loss and the same gradient."""

from __future__ import annotations

import pytest
import torch
from toy import prompt, toy_batch, toy_config, toy_model
from toy_step import Recorder, toy_update

from fastkl.scoring import backbone
from fastkl.scoring.pack import pack
from fastkl.scoring.scored_model import ScoredModel
from fastkl.training import first_forward, loop
from fastkl.types import Completion, RolloutBatch

CPU = torch.device("cpu")


def gradient(policy, reference, batch, config, micro_batch_tokens: int):
    recorder = Recorder(policy.parameters(), lr=1.0)
    outcome = toy_update(policy, reference, recorder, batch, config, micro_batch_tokens=micro_batch_tokens)
    assert outcome.applied
    return recorder.gradients, outcome.total


OPTIONS = [
    {},
    {"advantage": "none"},
    {"kl_reduction": "mean", "kl_coef": 5.0},
    {"kl_credit": "caused"},
    {"kl_coef": 0.0},
    {"kl_estimator": "exact", "kl_placement": "reward"},
    {"kl_estimator": "k3", "kl_placement": "loss"},
    {"kl_estimator": "exact_full", "kl_placement": "loss", "top_k": 4},
    {"importance": "sequence"},
    {"truncated": "drop"},
    {"advantage": "grpo", "loss_level": "mean"},
    {"advantage": "reinforce_pp"},
]


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("layout", ["packed", "shared"])
def test_loss_gradient_and_sums_do_not_depend_on_where_groups_are_cut(options, layout, monkeypatch):
    """One sample of the batch is not valid; the lengths differ; at 1 token every sample stands alone."""
    monkeypatch.setattr(loop, "check_agreement", lambda *arguments: None)  # the samples are of the whole vocabulary
    monkeypatch.setattr("toy_step.ScoredModel", lambda model: ScoredModel(model, layout))
    policy, reference = toy_model(0), toy_model(1).requires_grad_(False)
    config, batch = toy_config(**options), toy_batch(policy)
    whole, wanted = gradient(policy, reference, batch, config, 10_000)
    for tokens in (1, 14) if layout == "packed" else (1, 25):
        found, total = gradient(policy, reference, batch, config, tokens)
        assert total.loss == pytest.approx(wanted.loss, rel=1e-6, abs=1e-6)
        assert (total.num_tokens, total.num_weights_cut) == (wanted.num_tokens, wanted.num_weights_cut)
        torch.testing.assert_close(total.sums, wanted.sums, rtol=0, atol=1e-5, equal_nan=True)
        for ours, theirs in zip(found, whole, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6 * max(1.0, float(theirs.abs().max())))


def long_batch(num_samples: int, lengths: list[int]) -> RolloutBatch:
    """One prompt whose samples have these lengths; no model drew them."""
    random = torch.Generator().manual_seed(0)
    tokens = [tuple(torch.randint(20, (n,), generator=random).tolist()) for n in lengths]
    group = tuple(Completion(ids, (0.0,) * len(ids), "length", "") for ids in tokens)
    rewards = torch.randn(1, num_samples, generator=random, dtype=torch.float64)
    valid = torch.ones(1, num_samples, dtype=torch.bool)
    return RolloutBatch((prompt(*range(1, 20)),), (group,), rewards, valid, policy_version=0)


@pytest.mark.slow
def test_every_token_of_a_64k_group_comes_once_and_no_part_is_larger_than_16k():
    lengths = [12_000, 300, 7_100, 5_000, 1, 15_900, 9_000, 8_000, 2_000, 5_200]
    batch = long_batch(10, lengths)
    assert sum(lengths) > 64_000
    for once in (True, False):
        parts = pack(batch, [0], 16_000, CPU, once=once, cut=True)
        assert len(parts) == 5
        seen = torch.zeros(10, dtype=torch.int64)
        for members, part in parts:
            assert members == [0]
            prompts = 19 * (1 if once else int(part.valid.sum()))
            assert len(part.target_ids) + prompts <= 16_000
            assert part.completion_lengths.tolist() == [n * int(v) for n, v in zip(lengths, part.valid[0], strict=True)]
            seen += part.completion_lengths
        assert seen.tolist() == lengths
    ((_, whole),) = pack(batch, [0], 16_000, CPU)
    assert len(whole.target_ids) == sum(lengths)


@pytest.mark.slow
def test_a_64k_group_is_trained_under_a_16k_budget_as_without_one(monkeypatch):
    """A tiny model, and a check of what passes through it at a time."""
    monkeypatch.setattr(loop, "check_agreement", lambda *arguments: None)
    options = {"hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
    options |= {"max_position_embeddings": 1 << 15}
    policy, reference = (toy_model(seed, **options) for seed in (0, 1))
    reference.requires_grad_(False)
    batch = long_batch(40, [1_650 - 13 * i for i in range(40)])
    sizes: list[int] = []
    hidden_states = backbone.hidden_states

    def measured(model, micro, layout):
        sizes.append(len(micro.input_ids))
        return hidden_states(model, micro, layout)

    config = toy_config(kl_coef=0.01)
    whole, wanted = gradient(policy, reference, batch, config, 1 << 20)
    monkeypatch.setattr(backbone, "hidden_states", measured)
    found, total = gradient(policy, reference, batch, config, 16_000)
    assert wanted.num_tokens > 55_000 and max(sizes) <= 16_000
    sizes = sizes[2:]  # without the two forwards that measure the model's activations
    assert len(sizes) == 4 * 4  # four parts; two models, in the first forward and in the update
    assert total.loss == pytest.approx(wanted.loss, rel=1e-6)
    for ours, theirs in zip(found, whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6 * float(theirs.abs().max()))


@pytest.mark.slow
def test_groups_that_fit_are_forwarded_as_before(monkeypatch):
    """No first forward for them, and none at all where the KL is not in the reward."""
    forwards: list[list[int] | None] = []
    original = first_forward.first_forward

    def noted(*arguments):
        forwards.append(arguments[6])  # groups
        return original(*arguments)

    monkeypatch.setattr(first_forward, "first_forward", noted)
    policy, reference = toy_model(0), toy_model(1).requires_grad_(False)
    batch = toy_batch(policy)
    sizes = [
        sum(len(c.token_ids) + len(p.token_ids) for c in group)
        for p, group in zip(batch.prompts, batch.completions, strict=True)
    ]
    largest = sizes.index(max(sizes))
    for tokens, options, wanted in (
        (max(sizes), {}, []),
        (sorted(sizes)[-2], {}, [[largest]]),
        (1, {"kl_estimator": "k3", "kl_placement": "loss"}, []),
    ):
        forwards.clear()
        gradient(policy, reference, batch, toy_config(**options), tokens)
        assert forwards == wanted
