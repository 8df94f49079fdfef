"""The limit of the log-probs' gap: the flat one in the first steps, then the run's own; a resumed run has the same."""

from __future__ import annotations

import json
import math

import pytest
import torch

from fastkl.config.settings import TrainConfig
from fastkl.rollout.agreement import (
    AGREEMENT_NATS,
    CALIBRATION_STEPS,
    FACTOR,
    StaleEngineError,
    agreement_limit,
    check_agreement,
)
from fastkl.training.loop import run_steps
from fastkl.training.setup import set_up
from fastkl.training.state import Run

FLAT = AGREEMENT_NATS[torch.bfloat16]


def test_the_limit_is_flat_until_the_runs_own_gap_is_known_and_then_a_multiple_of_its_largest():
    gaps = (0.008, 0.009, 0.0075)
    assert [agreement_limit(FLAT, gaps[:n]) for n in range(CALIBRATION_STEPS)] == [FLAT] * CALIBRATION_STEPS
    assert agreement_limit(FLAT, gaps) == pytest.approx(FACTOR * 0.009)
    assert agreement_limit(FLAT, (0.05, 0.06, 0.07)) == FLAT, "never more than the flat one"
    assert agreement_limit(FLAT, (0.0, 1e-6, 0.0)) == pytest.approx(0.25 * FLAT), "nor so little that chance exceeds it"
    assert agreement_limit(math.inf, gaps) == math.inf, "a caller who asks for no limit gets none"


def test_a_gap_of_ten_times_the_runs_own_stops_it_though_the_flat_limit_lets_it_pass():
    gaps, later = (0.008, 0.009, 0.0075), 10 * 0.009
    check_agreement(later, 0.3, FLAT, step=4)
    with pytest.raises(StaleEngineError, match="step 4: .* rounding explains 0.072"):
        check_agreement(later, 0.3, agreement_limit(FLAT, gaps), step=4)
    check_agreement(7 * 0.009, 0.3, agreement_limit(FLAT, gaps), step=4)


@pytest.mark.slow
def test_a_resumed_run_has_the_limit_of_the_one_that_was_not_interrupted(tmp_path, monkeypatch):
    def some(steps: int, **options) -> TrainConfig:
        return TrainConfig(
            output=str(tmp_path / "run"), generator="transformers", dtype="bfloat16", steps=steps, prompts_per_step=2,
            num_samples=4, max_new_tokens=8, save_every=1, report_to=(), **options,
        )  # fmt: skip

    first = set_up(some(CALIBRATION_STEPS + 1))
    run_steps(first)
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    gaps = tuple(row["mismatch/mean_abs_logprob"] for row in logged[:CALIBRATION_STEPS])
    assert first.completed.first_gaps == pytest.approx(gaps, rel=1e-6) and max(gaps) > 0
    resumed = set_up(some(CALIBRATION_STEPS + 2, resume=True))
    assert resumed.completed.first_gaps == first.completed.first_gaps
    assert resumed.limits_now == first.limits_now != resumed.limits
    run_steps(resumed)
    monkeypatch.setattr(Run, "both_sides", "another engine")
    elsewhere = set_up(some(CALIBRATION_STEPS + 3, resume=True))
    assert elsewhere.completed.first_gaps == (), "gaps of another engine say nothing"
    elsewhere.close()
