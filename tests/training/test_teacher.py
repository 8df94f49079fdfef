"""A teacher of another size: what a run with one trains on, and which teachers are refused by name."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from cases import slow
from test_loop import rows, small
from toy import half_storyteller, toy_batch, toy_config, toy_model
from toy_step import step_gradient

import fastkl
from fastkl.audit.run_checks import RunRecord, SampleTotals, first_step
from fastkl.config.defaults import resolved
from fastkl.config.settings import TrainConfig, check_config
from fastkl.errors import UserError
from fastkl.training.teacher import check_same_ids


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storyteller of half the width, with random weights."""
    folder = tmp_path_factory.mktemp("student")
    half_storyteller(folder)
    return folder


@pytest.mark.parametrize("padding", [*slow(0), 9])
@pytest.mark.parametrize(("placement", "direction"), [
    ("loss", "reverse"), ("loss", "forward"), ("loss", "jsd"), ("reward", "reverse"),
])  # fmt: skip
def test_gradient_of_a_step_is_that_of_the_kl_to_the_teacher_over_the_shared_ids(placement, direction, padding):
    """Rewards are zero; the teacher has three times the width, another head, and rows that pad its vocabulary."""
    policy = toy_model(0)
    teacher = toy_model(1, hidden_size=48, tie_word_embeddings=False, vocab_size=23 + padding).requires_grad_(False)
    batch = toy_batch(policy)
    batch.rewards.zero_()
    estimator = "exact" if placement == "loss" else "k1"
    config = toy_config(kl_estimator=estimator, kl_placement=placement, kl_coef=1.0, kl_direction=direction)
    gradient, outcome = step_gradient(policy, teacher, batch, config)
    terms = []
    for b, group in enumerate(batch.completions):
        members = []
        for c, ok in zip(group, batch.valid[b].tolist(), strict=True):
            if not ok:
                continue
            ids, y = torch.tensor([batch.prompts[b].token_ids + c.token_ids]), torch.tensor(c.token_ids)[:, None]
            logp, logq = (
                m(input_ids=ids, use_cache=False).logits[0, -len(y) - 1 : -1, :23].log_softmax(-1)
                for m in (policy, teacher)
            )
            p, q = logp.exp(), logq.exp()
            logm = ((p + q) / 2).log()
            divergence = {
                "reverse": (p * (logp - logq)).sum(),
                "forward": (q * (logq - logp)).sum(),
                "jsd": (p * (logp - logm) + q * (logq - logm)).sum() / 2,
            }[direction]
            members.append((divergence, logp.gather(1, y).sum(), logq.gather(1, y).sum()))
        rewards = [float((q - p).detach()) for _, p, q in members]
        for r, (kl, p, _) in zip(rewards, members, strict=True):
            others = (sum(rewards) - r) / (len(rewards) - 1)
            terms.append(kl if placement == "loss" else -(r - others) * p)
    if placement == "loss":
        assert outcome.total.mean("kl_penalized") == pytest.approx(float(torch.stack(terms).detach().mean()), rel=1e-6)
    expected = torch.autograd.grad(torch.stack(terms).sum() / len(terms), list(policy.parameters()))
    for (name, ours), theirs in zip(gradient.items(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
@pytest.mark.parametrize("direction", [pytest.param("forward", marks=pytest.mark.long), "jsd"])
def test_another_direction_is_trained_on_the_support_with_several_updates_and_logged(tmp_path, student, direction):
    """top_k, clipping, two minibatches: what is charged falls, and the reverse KL keeps its keys."""
    config = small(
        tmp_path / "run", model=str(student), reference="storyteller", reward=("none",), kl_coef=1.0, lr=5e-3, top_k=40,
        kl_direction=direction, kl_estimator="exact", steps=5, updates_per_rollout=2, clip=(0.2, 0.2), num_samples=8,
        lr_decay="constant", save_every=0,
    )  # fmt: skip
    fastkl.train(config)
    lines = [row for row in rows(config) if row["step"]]
    charged = [row["kl/divergence"] / row["completion/mean_length"] for row in lines]
    assert min(charged[2:]) < charged[0], charged
    assert all(row["kl/penalty"] == pytest.approx(row["kl/divergence"]) for row in lines)
    assert all(row["kl/support"] > 0 and row["kl/support"] != row["kl/divergence"] for row in lines)
    assert direction == "forward" or max(charged) < math.log(2)


@pytest.mark.slow
def test_a_student_comes_nearer_to_its_teacher_without_a_reward_and_resumes_to_the_bit(tmp_path, student):
    options = {"model": str(student), "reference": "storyteller", "reward": ("none",), "kl_coef": 1.0, "lr": 5e-3,
               "kl_estimator": "exact", "kl_placement": "loss", "steps": 6, "save_every": 3, "lr_decay": "constant",
               "num_samples": 8, "eval_prompts": "Once there was", "eval_every": 3, "eval_samples": 2}  # fmt: skip
    whole, parts = small(tmp_path / "whole", **options), small(tmp_path / "parts", **options)
    fastkl.train(whole)
    fastkl.train(small(tmp_path / "parts", **(options | {"steps": 3})))
    fastkl.train(small(tmp_path / "parts", **options, resume=True))
    found = []
    for run in (whole, parts):
        lines = [row for row in rows(run) if row["step"]]
        found.append(
            [{k: v for k, v in row.items() if not k.startswith(("time/", "throughput/", "memory/"))} for row in lines]
        )
    assert [row["kl/exact"] for row in found[0]] == [row["kl/exact"] for row in found[1]]
    assert all(row["reward/raw"] == 0 for row in found[0])
    per_token = [row["kl/exact"] / row["completion/mean_length"] for row in found[0]]
    assert per_token[0] > 5 and min(per_token[3:]) < per_token[0], per_token


@pytest.mark.slow
@pytest.mark.long
def test_adapters_learn_from_a_teacher_and_resume_to_the_bit(tmp_path, student):
    """The policy is the storyteller, the teacher half as wide with random weights."""
    pytest.importorskip("peft")
    options = {"lora_rank": 4, "reference": str(student), "reward": ("none",), "kl_coef": 1.0, "lr": 1e-2, "steps": 4,
               "kl_estimator": "exact", "kl_placement": "loss", "save_every": 2, "lr_decay": "constant"}  # fmt: skip
    whole = fastkl.train(small(tmp_path / "whole", **options))
    fastkl.train(small(tmp_path / "parts", **(options | {"steps": 2})))
    parts = fastkl.train(small(tmp_path / "parts", **options, resume=True))
    kls = [
        [row["kl/exact"] / row["completion/mean_length"] for row in rows(small(tmp_path / name))]
        for name in ("whole", "parts")
    ]
    assert kls[0] == kls[1] and kls[0][-1] < kls[0][0]
    for (name, mine), (_, yours) in zip(whole.policy.named_parameters(), parts.policy.named_parameters(), strict=True):
        assert torch.equal(mine, yours), name


class Words:
    def __init__(self, *tokens: str):
        self.tokens = tokens

    def get_vocab(self) -> dict[str, int]:
        return {token: i for i, token in enumerate(self.tokens)}


def test_the_first_id_that_two_tokenizers_use_otherwise_is_named():
    check_same_ids("t", Words("a", "b"), Words("a", "b"))
    with pytest.raises(UserError, match=r"reference: the tokenizer of 't' has 'c' for the id 1 where .* has 'b'"):
        check_same_ids("t", Words("a", "b"), Words("a", "c"))
    with pytest.raises(UserError, match=r"has 'c' for the id 2 where the policy's has None"):
        check_same_ids("t", Words("a", "b"), Words("a", "b", "c"))


def test_a_teacher_that_lacks_ids_of_the_policy_is_refused_by_name(tmp_path, student):
    half_storyteller(tmp_path / "narrow", vocab_size=2040, eos_token_id=1)
    config = small(tmp_path, model=str(student), reference=str(tmp_path / "narrow"), reward=("none",))
    with pytest.raises(UserError, match="reference: .* has 2040 token ids and the policy 2048"):
        fastkl.train(config)


@pytest.mark.parametrize(("options", "words"), [
    ({"reference": "storyteller", "reference_every": 2}, "reference_every: the reference is the teacher"),
    ({"reference": "storyteller", "no_reference": True, "kl_coef": 0.0}, "no_reference: the reference is the teacher"),
    ({"reward": ()}, "reward: names no function; .* a teacher to learn from"),
    ({"reward": ("none",)}, "reward: names no function; .* a teacher to learn from"),
], ids=str)  # fmt: skip
def test_settings_that_contradict_a_teacher_are_refused_by_name(options, words):
    with pytest.raises(UserError, match=words):
        check_config(TrainConfig(**options))


def test_no_reward_is_a_reward_of_zero_where_there_is_a_teacher():
    config = resolved(TrainConfig(reward=(), reference="storyteller"))
    check_config(config)
    assert config.reward == ("none",) and config.output == "runs/storyteller-none"


def test_the_audit_does_not_take_policy_and_teacher_for_one_model():
    sample = {"step": 1, "reward": 0.0, "kl": 40.0, "num_tokens": 10, "lm_cross_entropy": 2.0}
    totals = SampleTotals.of([sample, sample])
    assert first_step(RunRecord({}, [], totals)) is not None
    assert first_step(RunRecord({"reference": "storyteller"}, [], totals)) is None
