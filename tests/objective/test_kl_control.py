"""Controller, renewed reference and importance weights, against their formulas and in real runs."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import signal
from pathlib import Path

import commands
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from toy import toy_batch, toy_config, toy_model
from toy_step import step_gradient

from fastkl.config.settings import TrainConfig
from fastkl.errors import UserError
from fastkl.objective.importance import engine_kl_sum, importance_weights
from fastkl.objective.kl_control import KlController, renew_reference
from fastkl.rollout import agreement
from fastkl.training import loop
from fastkl.training.checkpoint import RandomState, open_checkpoint, restore_reference, save_checkpoint
from fastkl.types import Completion


def adapted_coef(coef: float, kl: float, target: float) -> float:
    """The coefficient after one step of the controller."""
    controller = KlController(coef, target)
    controller.follow(kl)
    return controller.coef


def test_the_controller_holds_at_the_target_and_moves_towards_it_from_both_sides():
    assert adapted_coef(0.5, kl=4.0, target=4.0) == 0.5
    assert adapted_coef(0.5, kl=5.0, target=4.0) == pytest.approx(0.5 * 1.05)
    assert adapted_coef(0.5, kl=400.0, target=4.0) == pytest.approx(0.55)
    assert adapted_coef(0.5, kl=0.0, target=4.0) == pytest.approx(0.45)
    assert adapted_coef(0.5, kl=math.nan, target=4.0) == 0.5
    assert adapted_coef(0.5, kl=400.0, target=0.0) == 0.5, "without a target the coefficient stays"


def test_the_controller_finds_the_coefficient_of_a_target():
    """A policy whose KL is 6 / beta: the target 3 needs beta 2."""
    coef = 0.05
    for _ in range(200):
        coef = adapted_coef(coef, kl=6.0 / coef, target=3.0)
    assert coef == pytest.approx(2.0, rel=1e-3)


def test_a_renewed_reference_is_a_moving_average_or_a_copy():
    old, new = nn.Linear(3, 2), nn.Linear(3, 2)
    before = old.weight.detach().clone()
    renew_reference(old, new, 0.25)
    torch.testing.assert_close(old.weight, 0.75 * before + 0.25 * new.weight)
    renew_reference(old, new, 1.0)
    assert torch.equal(old.weight, new.weight)
    assert old.weight.data_ptr() != new.weight.data_ptr()


def test_a_renewed_reference_is_saved_and_restored_bit_for_bit(tmp_path):
    class NoTokenizer:
        def save_pretrained(self, folder) -> None:
            pass

    policy, reference = toy_model(0), toy_model(1)
    saved = [p.detach().clone() for p in reference.parameters()]
    optimizer = torch.optim.AdamW(policy.parameters())
    state = {
        "policy": policy,
        "tokenizer": NoTokenizer(),
        "optimizer": optimizer,
        "state": {},
        "random": RandomState.now(),
        "config": {},
        "keep": 0,
    }
    save_checkpoint(tmp_path, 1, **state, reference=reference)
    renew_reference(reference, policy, 1.0)
    restore_reference(open_checkpoint(tmp_path / "step-1"), reference)
    assert all(torch.equal(a, b) for a, b in zip(saved, reference.parameters(), strict=True))
    save_checkpoint(tmp_path, 2, **state)
    with pytest.raises(UserError, match="holds no reference.safetensors"):
        restore_reference(open_checkpoint(tmp_path / "step-2"), reference)


def test_importance_weights_are_truncated_ratios_per_token_or_per_sequence():
    engine, policy = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.5, -1.0, -3.0])
    cu = torch.tensor([0, 2, 2, 3], dtype=torch.int32)
    assert importance_weights(engine, policy, cu, "none", 2.0).values is None
    token = importance_weights(engine, policy, cu, "token", 2.0)
    torch.testing.assert_close(token.values, torch.tensor([math.exp(-0.5), 2.0, 1.0]))
    assert token.num_cut == 1
    sequence = importance_weights(engine, policy, cu, "sequence", 2.0)
    torch.testing.assert_close(sequence.values, torch.tensor([math.exp(0.5), math.exp(0.5), 1.0]))
    assert sequence.num_cut == 0


def test_weighted_draws_of_a_mismatched_engine_have_the_trainers_mean():
    """Enumerated: sum_v engine(v) w(v) f(v) = sum_v trainer(v) f(v) where no weight is cut."""
    g = torch.Generator().manual_seed(0)
    engine, policy, f = (torch.randn(7, generator=g, dtype=torch.float64) for _ in range(3))
    engine, policy = engine.log_softmax(0), policy.log_softmax(0)
    weights = importance_weights(engine, policy, torch.arange(8, dtype=torch.int32), "token", 1e9).values
    torch.testing.assert_close((engine.exp() * weights * f).sum(), (policy.exp() * f).sum())
    assert engine_kl_sum(engine, engine) == 0.0
    expected = float((engine.exp() * (engine - policy)).sum())
    mean = sum(float(engine[v].exp()) * engine_kl_sum(engine[v : v + 1], policy[v : v + 1]) for v in range(7))
    assert mean == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_importance_weights_reach_the_gradient_of_a_real_step(level, monkeypatch):
    """An engine whose log-probs are all too low by log 1.5 (per token, or in sum) makes every weight 1.5."""
    policy, reference = toy_model(0), toy_model(1).requires_grad_(False)
    batch = toy_batch(policy)
    plain, _ = step_gradient(policy, reference, batch, toy_config())

    def lowered(c: Completion) -> Completion:
        shift = math.log(1.5) / (len(c.token_ids) if level == "sequence" else 1)
        return dataclasses.replace(c, logprobs=tuple(logp - shift for logp in c.logprobs))

    other = dataclasses.replace(batch, completions=tuple(tuple(map(lowered, group)) for group in batch.completions))
    monkeypatch.setitem(agreement.AGREEMENT_NATS, torch.float32, 1.0)
    weighted, outcome = step_gradient(policy, reference, other, toy_config(importance=level))
    assert outcome.total.num_weights_cut == 0
    for name, value in plain.items():
        torch.testing.assert_close(weighted[name], 1.5 * value, rtol=1e-4, atol=1e-6)
    capped, outcome = step_gradient(policy, reference, other, toy_config(importance=level, importance_cap=1.25))
    assert outcome.total.num_weights_cut == outcome.total.num_tokens
    for name, value in plain.items():
        torch.testing.assert_close(capped[name], 1.25 * value, rtol=1e-4, atol=1e-6)


STEERED = {"kl_target": 2.0, "reference_every": 1, "reference_share": 0.3, "kl_coef": 0.5, "lr": 3e-3, "seed": 3}


def steered(folder: Path, **options) -> TrainConfig:
    """Four small real steps of the embedded model."""
    settings = {
        "output": str(folder), "generator": "transformers", "steps": 4, "save_every": 1, "keep_checkpoints": 0,
        "prompts_per_step": 2, "num_samples": 4, "max_new_tokens": 12, "report_to": (),
    }  # fmt: skip
    return TrainConfig(**(settings | STEERED | options))


def metrics(config: TrainConfig) -> list[dict]:
    rows = [json.loads(line) for line in (Path(config.output) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "throughput/", "memory/"))} for row in rows]


def weights(config: TrainConfig, step: int, name: str) -> dict[str, torch.Tensor]:
    return load_file(Path(config.output) / "checkpoints" / f"step-{step}" / f"{name}.safetensors")


KILLED = """
import os, signal
from pathlib import Path
from fastkl.training import loop
from test_kl_control import steered

update = loop.update

def killed_in_step_3(*arguments, step, **options):
    if step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return update(*arguments, step=step, **options)

loop.update = killed_in_step_3
loop.train(steered(Path({folder!r})))
"""


@pytest.mark.slow
def test_a_killed_and_resumed_run_with_a_target_and_a_moving_reference_equals_an_uninterrupted_one(tmp_path):
    """And on the way: the coefficient is the controller's, and the reference is the moving average of the policies."""
    whole, killed = steered(tmp_path / "whole"), steered(tmp_path / "killed")
    loop.train(whole)
    child = commands.run(script=KILLED.format(folder=killed.output), timeout=120)
    assert child.returncode == -signal.SIGKILL, child.stderr[-2000:]
    loop.train(dataclasses.replace(killed, resume=True))
    assert metrics(killed) == metrics(whole)
    for name in ("model", "trainer", "reference"):
        ours, theirs = weights(killed, 4, name), weights(whole, 4, name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name

    rows = metrics(whole)
    for before, after in itertools.pairwise(rows):
        assert after["kl/coef"] == adapted_coef(before["kl/coef"], before["kl/support"], 2.0) != before["kl/coef"]
    for step in (2, 3, 4):
        old, new, policy = (
            weights(whole, step - 1, "reference"),
            weights(whole, step, "reference"),
            weights(whole, step, "model"),
        )
        for name, value in new.items():
            torch.testing.assert_close(value, 0.7 * old[name] + 0.3 * policy[name], rtol=1e-6, atol=1e-8)
        assert any(not torch.equal(value, old[name]) for name, value in new.items())


@pytest.mark.slow
def test_a_reference_copied_every_two_steps_brings_the_kl_back_to_zero(tmp_path):
    config = steered(tmp_path / "run", kl_target=0.0, reference_every=2, reference_share=1.0, steps=5, save_every=0)
    loop.train(config)
    exact = [row["kl/exact"] for row in metrics(config)]
    assert exact[2] == exact[4] == 0.0 == exact[0], "the steps after a copy: policy and reference are one model"
    assert min(exact[1], exact[3]) > 0.01
