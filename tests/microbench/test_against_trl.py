"""The reward curves of bench/real/against_trl.py, and how far apart they are, from runs that are made up."""

from __future__ import annotations

import pytest
import torch

from bench.real.against_trl import apart, curve


def runs(rewards: torch.Tensor) -> list[dict]:
    """rewards: f64 [runs, steps]."""
    return [{"rewards": run, "step_s": [1.0]} for run in rewards.tolist()]


def test_a_curve_is_the_mean_of_the_runs_with_its_standard_error():
    rewards = torch.rand(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, error = curve(runs(rewards))
    assert mean == pytest.approx(rewards.mean(0).tolist())
    assert error == pytest.approx(((rewards - rewards.mean(0)).square().sum(0) / (5 - 1) / 5).sqrt().tolist())


def test_a_distance_is_counted_in_the_error_of_all_steps_and_has_its_sign():
    ours, theirs = torch.tensor([[0.0, 2.0], [1.0, 2.0]]), torch.tensor([[0.0, 3.0], [0.0, 5.0]])
    # means 0.5, 2 and 0, 4; errors 0.5, 0 and 0, 1: the whole error is sqrt((0.25 + 1) / 2)
    assert apart(runs(ours), runs(theirs)) == pytest.approx([0.5 / 0.625**0.5, -2 / 0.625**0.5])


def test_curves_of_the_same_rewards_are_one_error_apart():
    draws = torch.rand(2, 20, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    distances = torch.tensor(apart(*map(runs, draws)))  # 300 steps: mean square 1 within 1 / sqrt(150)
    assert distances.square().mean().item() == pytest.approx(1, abs=4 / 150**0.5)
    assert distances.mean().item() == pytest.approx(0, abs=4 / 300**0.5)


def test_runs_of_different_lengths_make_no_curve():
    with pytest.raises(ValueError):
        curve([{"rewards": [1.0, 2.0]}, {"rewards": [1.0]}])
