"""The benchmark measures only what it has found right, and writes what it says it writes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from fastkl.microbench import jobs, run

TINY = jobs.Shape("tiny", 48, 16, 211, torch.float32)


def test_every_job_passes_its_check_and_is_written_with_its_floor(tmp_path):
    lines = []
    results = run.run_bench(tmp_path, device="cpu", shapes=(TINY,), repeats=2, say=lines.append)
    assert {r.job for r in results} == set("ABCDEFGHI")
    record = json.loads((tmp_path / "bench.json").read_text())
    assert len(record["rows"]) == len(results) and record["left_out"] == []
    for r in results:
        assert r.max_error < 1e-4
        assert 0 < r.p20_ms <= r.median_ms <= r.p80_ms
        assert r.floor_ms > 0 and r.percent_of_floor == pytest.approx(100 * r.floor_ms / r.median_ms)
    loss = next(r for r in results if r.name == "fastkl, gradient in the forward" and r.job == "F")
    assert loss.flops == 4 * 2 * 48 * 16 * 211
    for name in ("roofline.svg", "memory.svg"):
        assert (tmp_path / name).read_text().startswith("<svg")


def test_a_wrong_result_is_not_timed():
    row = next(jobs.rows_of(jobs.Problem(TINY, "cpu")))
    broken = replace(row, call=lambda: [x + 0.01 for x in row.call()])
    with pytest.raises(AssertionError, match="not timed"):
        run.measure(broken, run.ceilings(TINY, "cpu"), "cpu", 1)


def test_rows_beyond_the_time_budget_are_named_not_dropped_in_silence(tmp_path):
    lines = []
    assert run.run_bench(tmp_path, device="cpu", shapes=(TINY,), budget_s=0, say=lines.append) == []
    assert any(line.startswith("left out") and "tiny F plain PyTorch (time)" in line for line in lines)
