"""Controller, renewed reference and importance weights, against their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from toy import toy_model

from fastkl.anchor import adapted_coef, renew_reference
from fastkl.checkpoint import open_checkpoint, restore_reference, save_checkpoint
from fastkl.errors import UserError
from fastkl.mismatch import engine_kl_sum, importance_weights


def test_the_controller_holds_at_the_target_and_moves_towards_it_from_both_sides():
    assert adapted_coef(0.5, kl=4.0, target=4.0) == 0.5
    assert adapted_coef(0.5, kl=5.0, target=4.0) == pytest.approx(0.5 * 1.05)
    assert adapted_coef(0.5, kl=400.0, target=4.0) == pytest.approx(0.55)
    assert adapted_coef(0.5, kl=0.0, target=4.0) == pytest.approx(0.45)
    assert adapted_coef(0.5, kl=math.nan, target=4.0) == 0.5


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
    state = {"policy": policy, "tokenizer": NoTokenizer(), "optimizer": optimizer, "state": {}, "config": {}, "keep": 0}
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
    assert (token.num_cut, token.num_tokens) == (1, 3)
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
