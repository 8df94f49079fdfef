"""One whole optimisation step against the written-out objective, by autograd, in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import slow
from toy import STOP, ToyTokenizer, draw, prompt, toy_batch, toy_config, toy_model
from toy_step import step_gradient, toy_update

from fastkl.errors import UserError
from fastkl.report.metrics import metrics_of
from fastkl.report.step_metrics import FinishedStep, StepReport
from fastkl.rollout import agreement
from fastkl.rollout.transformers import TransformersGenerator
from fastkl.sampling.params import Sampling
from fastkl.scoring import backbone
from fastkl.scoring.pack import scorable
from fastkl.scoring.scored_model import ScoredModel
from fastkl.training.ready_models import check_trainable, probe_batch
from fastkl.types import RolloutBatch


def written_out_loss(policy, reference, batch, config) -> torch.Tensor:
    """The objective as the documentation states it: one sequence at a time, the model's own logits, no shared code."""
    losses, count = [], 0
    for b, group in enumerate(batch.completions):
        logps, penalized = [], []
        for k, completion in enumerate(group):
            if not batch.valid[b, k]:
                continue
            ids = torch.tensor([batch.prompts[b].token_ids + completion.token_ids])
            targets = torch.tensor(completion.token_ids)[:, None]
            logp, ref = (
                (model(input_ids=ids, use_cache=False).logits[0] / config.temperature)
                .log_softmax(-1)[-len(targets) - 1 : -1]
                .gather(1, targets)
                .sum()
                for model in (policy, reference)
            )
            kl = (logp - ref).detach() / (len(targets) if config.kl_reduction == "mean" else 1)
            logps.append(logp)
            penalized.append(float(batch.rewards[b, k]) - config.kl_coef * float(kl))
        for i, logp in enumerate(logps):
            others = [r for j, r in enumerate(penalized) if j != i]
            baseline = sum(others) / len(others) if config.advantage == "rloo" else 0.0
            losses.append(-(penalized[i] - baseline) * logp)
        count += len(logps)
    return torch.stack(losses).sum() / count


@pytest.mark.parametrize("options", [
    {},
    {"kl_reduction": "mean", "kl_coef": 5.0},
    {"advantage": "none"},
    {"temperature": 0.7},
    {"kl_coef": 0.0},
], ids=["default", "mean", "reinforce", "temperature", "beta-0"])  # fmt: skip
@pytest.mark.parametrize("tied", [True, *slow(False)])
def test_gradient_of_the_whole_step_equals_autograd_of_the_written_out_objective(options, tied):
    policy = toy_model(0, tie_word_embeddings=tied)
    reference = toy_model(1, tie_word_embeddings=tied).requires_grad_(False)
    config = toy_config(**options)
    batch = scored_by(policy, toy_batch(policy), config.temperature)
    gradient, outcome = step_gradient(policy, reference, batch, config)
    expected_loss = written_out_loss(policy, reference, batch, config)
    expected = torch.autograd.grad(expected_loss, list(policy.parameters()))
    assert outcome.total.loss == pytest.approx(expected_loss.item(), abs=1e-9)
    for (name, ours), theirs in zip(gradient.items(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def scored_by(policy, batch, temperature: float):
    """The batch with engine log-probs under the tempered policy, as a generator with that temperature would record."""
    import dataclasses

    if temperature == 1.0:
        return batch
    groups = []
    for p, group in zip(batch.prompts, batch.completions, strict=True):
        rescored = []
        for c in group:
            ids = torch.tensor([p.token_ids + c.token_ids])
            table = (policy(input_ids=ids, use_cache=False).logits[0].detach() / temperature).log_softmax(-1)
            values = table[len(p.token_ids) - 1 : -1].gather(1, torch.tensor(c.token_ids)[:, None])[:, 0]
            rescored.append(dataclasses.replace(c, logprobs=tuple(values.tolist())))
        groups.append(tuple(rescored))
    return dataclasses.replace(batch, completions=tuple(groups))


@pytest.mark.parametrize("options", [
    *slow({"top_k": 4}, {"top_p": 0.8, "temperature": 0.7}, {"min_p": 0.1}),
    {"min_tokens": 3},
    {"banned_token_ids": (2, 7), "top_k": 5},
], ids=str)  # fmt: skip
def test_gradient_under_truncated_sampling_is_that_of_the_logprobs_on_the_support(options):
    policy, reference = toy_model(0), toy_model(1).requires_grad_(False)
    config = toy_config(max_new_tokens=6, kl_estimator="k1", kl_placement="reward", **options)
    sampling = Sampling.of(config, (STOP,))
    prompts = toy_batch(policy).prompts
    completions = draw(TransformersGenerator(policy, ToyTokenizer(), sampling), prompts, 4, seed=1, step=1)
    rewards = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    batch = RolloutBatch(prompts, completions, rewards, torch.ones(3, 4, dtype=torch.bool), policy_version=0)
    gradient, outcome = step_gradient(policy, reference, batch, config)
    assert outcome.total.gap_max < 1e-5, "the generator recorded the log-probs of the same support"

    losses = []
    for p, group, row in zip(prompts, completions, rewards.tolist(), strict=True):
        logps, penalized = [], []
        for c, r in zip(group, row, strict=True):
            logp, ref = on_support(policy, reference, p, c, config)
            logps.append(logp)
            penalized.append(r - config.kl_coef * float(logp - ref))
        for i, logp in enumerate(logps):
            baseline = (sum(penalized) - penalized[i]) / 3
            losses.append(-(penalized[i] - baseline) * logp)
    expected = torch.autograd.grad(torch.stack(losses).sum() / 12, list(policy.parameters()))
    for (name, ours), theirs in zip(gradient.items(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def on_support(policy, reference, p, c, config) -> tuple[torch.Tensor, torch.Tensor]:
    """log pi_S and log q_S of a completion, a token at a time, S found by a loop over the policy's own logits."""
    ids = torch.tensor([p.token_ids + c.token_ids])
    tables = [m(input_ids=ids, use_cache=False).logits[0][len(p.token_ids) - 1 : -1] for m in (policy, reference)]
    sums = [0.0, 0.0]
    for t, y in enumerate(c.token_ids):
        z = tables[0][t].detach() / config.temperature
        alive = [v for v in range(len(z)) if v not in config.banned_token_ids and (v != STOP or t >= config.min_tokens)]
        best = max(z[v] for v in alive)
        alive = sorted((v for v in alive if (z[v] - best).exp() >= config.min_p), key=lambda v: -z[v])
        alive = alive[: config.top_k or len(z)]
        probs = z[alive].softmax(0)
        kept = [
            v
            for v, before in zip(alive, probs.cumsum(0) - probs, strict=True)
            if config.top_p >= 1 or before < config.top_p
        ]
        for i in (0, 1):
            sums[i] = sums[i] + (tables[i][t][kept] / config.temperature).log_softmax(0)[kept.index(y)]
    return sums[0], sums[1].detach()


def test_a_truncated_sample_that_is_dropped_leaves_reward_baseline_and_loss():
    policy, reference = toy_model(0), toy_model(1).requires_grad_(False)
    batch, config = toy_batch(policy, num_samples=6), toy_config(num_samples=6)
    valid = scorable(batch.completions, batch.valid, "drop")
    cut = torch.tensor([[c.finish_reason == "length" for c in group] for group in batch.completions])
    assert cut.any() and not cut.all()
    assert torch.equal(valid, batch.valid & ~cut)
    assert torch.equal(scorable(batch.completions, batch.valid, "keep"), batch.valid)
    rewards = batch.rewards.masked_fill(~valid, 0.0)
    gradient, _ = step_gradient(policy, reference, replace(batch, rewards=rewards, valid=valid), config)
    other = rewards + 100.0 * cut  # the reward of a dropped sample must not matter, to itself or to its siblings
    same, _ = step_gradient(policy, reference, replace(batch, rewards=other, valid=valid), config)
    for name in gradient:
        assert torch.equal(gradient[name], same[name]), name


def test_importance_weights_of_an_engine_that_agrees_change_nothing_and_of_another_one_reweight_the_gradient():
    policy, reference = toy_model(0), toy_model(1).requires_grad_(False)
    batch = toy_batch(policy)
    plain, _ = step_gradient(policy, reference, batch, toy_config())
    for level in ("token", "sequence"):
        weighted, outcome = step_gradient(policy, reference, batch, toy_config(importance=level))
        assert outcome.total.num_weights_cut == 0
        for name in plain:
            torch.testing.assert_close(weighted[name], plain[name], rtol=1e-4, atol=1e-6)


def test_micro_batches_add_up_to_the_big_batch_in_float32():
    policy, reference = toy_model(0, torch.float32), toy_model(1, torch.float32).requires_grad_(False)
    batch = toy_batch(policy)
    whole, outcome = step_gradient(policy, reference, batch, toy_config())
    parts, outcome_of_parts = step_gradient(policy, reference, batch, toy_config(micro_batch_tokens=1))
    difference = torch.cat([(parts[name] - whole[name]).flatten() for name in whole])
    assert difference.norm() <= 1e-6 * torch.cat([gradient.flatten() for gradient in whole.values()]).norm()
    ours, theirs = outcome_of_parts.total, outcome.total
    assert ours.loss == pytest.approx(theirs.loss, abs=1e-6)
    assert ours.num_tokens == theirs.num_tokens
    torch.testing.assert_close(ours.sums, theirs.sums, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_a_non_finite_loss_skips_the_update_and_leaves_the_weights():
    policy, reference = toy_model(0), toy_model(1).requires_grad_(False)
    batch = toy_batch(policy)
    batch.rewards[0, 0] = float("inf")
    config = toy_config()
    before = [p.detach().clone() for p in policy.parameters()]
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    assert not toy_update(policy, reference, optimizer, batch, config).applied
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))
    assert all(p.grad is None for p in policy.parameters())


def test_samples_from_other_weights_stop_the_run_before_the_update():
    policy, stale = toy_model(0), toy_model(0)
    with torch.no_grad():
        stale.model.norm.weight.mul_(1.01)
    batch = toy_batch(stale)
    config = toy_config()
    before = [p.detach().clone() for p in policy.parameters()]
    with pytest.raises(agreement.StaleEngineError, match="differ by"):
        toy_update(policy, toy_model(1), torch.optim.SGD(policy.parameters(), lr=1.0), batch, config, step=2)
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))


def test_report_equals_the_scores_computed_one_sequence_at_a_time():
    policy, reference = toy_model(0), toy_model(1).requires_grad_(False)
    batch, config = toy_batch(policy), toy_config()
    _, outcome = step_gradient(policy, reference, batch, config)
    report = StepReport(1, batch, {}, config.kl_coef, outcome)
    metrics = metrics_of(FinishedStep(report, 1e-3, {"generate": 1.0}))
    logp_sum, ref_sum, kl_sum, entropy_sum, tokens = 0.0, 0.0, 0.0, 0.0, 0
    for p, group, valid in zip(batch.prompts, batch.completions, batch.valid.tolist(), strict=True):
        for c, ok in zip(group, valid, strict=True):
            if not ok:
                continue
            ids = torch.tensor([p.token_ids + c.token_ids])
            lp, lq = (
                m(input_ids=ids, use_cache=False).logits[0].detach().log_softmax(-1)[len(p.token_ids) - 1 : -1]
                for m in (policy, reference)
            )
            y = torch.tensor(c.token_ids)[:, None]
            logp_sum += lp.gather(1, y).sum().item()
            ref_sum += lq.gather(1, y).sum().item()
            kl_sum += (lp.exp() * (lp - lq)).sum().item()
            entropy_sum -= (lp.exp() * lp).sum().item()
            tokens += len(c.token_ids)
    sequences = int(batch.valid.sum())
    assert metrics["kl/mean"] == pytest.approx((logp_sum - ref_sum) / sequences, abs=1e-5)
    assert metrics["kl/exact"] == pytest.approx(kl_sum / sequences, abs=1e-5)
    assert metrics["entropy"] == pytest.approx(entropy_sum / tokens, abs=1e-5)
    assert metrics["lm_cross_entropy"] == pytest.approx(-logp_sum / tokens, abs=1e-5)
    assert metrics["original_lm_cross_entropy"] == pytest.approx(-ref_sum / tokens, abs=1e-5)
    samples = report.samples()
    assert len(samples) == 12
    assert samples[6]["reward"] is None
    kept = [s["kl"] for s in samples if s["reward"] is not None]
    assert sum(kept) / len(kept) == pytest.approx(metrics["kl/mean"], abs=1e-5)


class NoBackward(torch.autograd.Function):
    """A kernel that somebody has written for inference."""

    @staticmethod
    def forward(ctx, states):
        return states.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise NotImplementedError("inference only\nsecond line")


def test_a_model_without_a_backward_is_refused_before_anything_starts_and_no_gradient_is_left():
    backbone.register_packed_attention()
    model, probe = toy_model(), probe_batch(prompt(1, 2, 3), torch.device("cpu"))
    check_trainable(ScoredModel(model), probe)
    assert all(weight.grad is None for weight in model.parameters())
    model.model.layers[0].register_forward_hook(lambda module, inputs, output: NoBackward.apply(output))
    with pytest.raises(UserError, match=r"LlamaForCausalLM cannot be trained \(inference only\)"):
        check_trainable(ScoredModel(model), probe)
    assert all(weight.grad is None for weight in model.parameters())
