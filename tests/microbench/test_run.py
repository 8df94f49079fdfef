"""The benchmark measures only what it has found right, and writes what it says it writes."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec
from xml.etree import ElementTree

import pytest
import torch

from fastkl.microbench import jobs, pictures, run

TINY = jobs.Shape("tiny", 48, 16, 211, torch.float32)


@pytest.mark.slow
def test_every_job_passes_its_check_and_is_written_with_its_floor(tmp_path):
    lines = []
    results = run.run_bench(tmp_path, device="cpu", shapes=(TINY,), seconds=0.0, say=lines.append)
    assert {r.job for r in results} == set("ABCDEFGHI")
    record = json.loads((tmp_path / "bench.json").read_text())
    assert len(record["rows"]) == len(results) and record["left_out"] == []
    for r in results:
        assert r.max_error < 1e-4 and r.repeats >= 1
        assert 0 < r.p20_ms <= r.median_ms <= r.p80_ms
        assert r.floor_ms > 0 and r.percent_of_floor == pytest.approx(100 * r.floor_ms / r.median_ms)
    loss = next(r for r in results if r.name == "fastkl, gradient in the forward" and r.job == "F")
    assert loss.flops == 4 * 2 * 48 * 16 * 211
    for name in ("roofline.svg", "memory.svg"):
        picture = ElementTree.parse(tmp_path / name).getroot()
        assert picture.tag == "{http://www.w3.org/2000/svg}svg"


@pytest.mark.slow
def test_a_teacher_of_another_width_has_rows_of_its_own_that_count_its_wider_head(tmp_path):
    """Of TRL, too, where it is installed: its chunked divergence runs anywhere."""
    shape = replace(TINY, name="tiny <- wider", ref_hidden=24)
    results = run.run_bench(tmp_path, device="cpu", shapes=(shape,), seconds=0.0, say=lambda line: None)
    names = {r.name for r in results}
    assert {r.job for r in results} == {"J"}
    assert {"fastkl, autograd", "fastkl, gradient in the forward", "plain PyTorch"} <= names
    assert ("TRL chunked divergence" in names) == (find_spec("trl") is not None)
    for r in results:
        assert r.max_error < 1e-4 and r.flops == 2 * 48 * 211 * (3 * 16 + 24)


@pytest.mark.slow
@pytest.mark.parametrize("off", [0.01, float("nan")])
def test_a_wrong_result_is_not_timed(off):
    row = next(jobs.own_rows(jobs.Problem(TINY, "cpu")))
    broken = replace(row, call=lambda: [x + off for x in row.call()])
    with pytest.raises(AssertionError, match="not timed"):
        run.measure(broken, run.ceilings(TINY, "cpu"), "cpu", 0.0)


@pytest.mark.slow
def test_rows_beyond_the_time_budget_are_named_not_dropped_in_silence(tmp_path):
    lines = []
    assert run.run_bench(tmp_path, device="cpu", shapes=(TINY,), budget_s=0, say=lines.append) == []
    assert any(line.startswith("left out") and "tiny F plain PyTorch (time)" in line for line in lines)


def result(name: str, **fields) -> run.Result:
    given = {
        "job": "F", "name": name, "shape": "tiny", "median_ms": 4.0, "p20_ms": 4.0, "p80_ms": 4.0, "floor_ms": 2.0,
        "percent_of_floor": 50.0, "bound": "matmul", "flops": 1.0, "bytes": 1.0, "peak_mib": 8.0, "max_error": 0.0,
        "repeats": 5, "doubt": "",
    }  # fmt: skip
    return run.Result(**(given | fields))


@pytest.mark.slow
def test_table_and_picture_say_in_words_what_is_timed_and_why_a_row_is_doubtful(tmp_path):
    lines = []
    run.run_bench(tmp_path, device="cpu", shapes=(TINY,), jobs="A", seconds=0.0, say=lines.append)
    assert "A logits of the policy -> log-probs, entropy" in lines
    assert any("% floor" in line and "the least time for the job over the median" in line for line in lines)
    doubted = result("other", doubt="returns log-probs alone, so it does less than the job")
    assert doubted.line().endswith(doubted.doubt)
    for draw in (pictures.roofline, pictures.memory):
        texts = [element.text for element in ElementTree.fromstring(draw([result("fastkl"), doubted])).iter()]
        assert f"tiny, job F: {jobs.JOBS['F'].given} → {jobs.JOBS['F'].wanted}" in texts
        assert {"other [1]", f"[1] {doubted.doubt}", "fastkl"} <= set(texts)


def test_a_measurement_that_shows_its_own_doubt_says_so():
    row = next(jobs.own_rows(jobs.Problem(TINY, "cpu")))
    assert run.doubt(row, [1.0, 1.1, 1.1, 3.0], 90.0) == ""
    assert run.doubt(row, [1.0, 1.0, 1.5, 1.5], 90.0).startswith("times vary")
    assert run.doubt(row, [1.0], 90.0) == "timed once only"
    assert run.doubt(replace(row, doubt="less"), [1.0] * 5, 120.0).startswith("less; faster than its floor")


def test_a_bar_is_as_long_as_its_value():
    drawn = ElementTree.fromstring(pictures.memory([result("a", peak_mib=10.0), result("b", peak_mib=2.5)]))
    bars = [e for e in drawn.iter("{http://www.w3.org/2000/svg}rect") if e.get("class", "").startswith("layer")]
    assert float(bars[0].get("width")) == pytest.approx(4 * float(bars[1].get("width")), abs=0.5)
