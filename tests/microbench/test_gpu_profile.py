"""A step's profile, from spans that are written down by hand; and the stages of a step."""

from __future__ import annotations

import time
from types import SimpleNamespace

import torch

from bench.training.gpu_profile import covered, own_times, stage_summary, summary, top, within
from bench.training.gpu_stages import ANNOTATION, StageClock

FORWARD, BACKWARD = (0, 100, f"{ANNOTATION}forward"), (120, 220, f"{ANNOTATION}backward")
KERNELS = [(10, 40, "mm"), (30, 50, "add"), (150, 160, "mm")]


def test_the_gpu_is_busy_where_any_kernel_runs():
    assert covered(KERNELS) == 40 + 10
    assert covered([(0, 10, "a"), (2, 5, "b"), (10, 12, "c")]) == 12


def test_a_stage_counts_the_kernels_launches_and_waits_that_begin_in_it():
    host = [FORWARD, (5, 9, "cudaLaunchKernel"), (60, 90, "aten::_local_scalar_dense"), (130, 131, "cudaLaunchKernel")]
    found = stage_summary([FORWARD], sorted(host), KERNELS, steps=1)
    assert (found["kernels"], found["launches"], found["waits"]) == (2, 1, {"aten::_local_scalar_dense": 1})
    assert found["gpu_idle_share"] == 1 - 40 / 100
    assert within(KERNELS, [FORWARD, BACKWARD]) == KERNELS


def test_a_host_operation_keeps_the_time_that_is_not_its_parts():
    spans = [FORWARD, (0, 50, "linear"), (10, 30, "mm"), (30, 45, "add"), (60, 70, "mm")]
    assert [(name, end - start) for start, end, name in own_times(spans)] == [
        ("linear", 15), ("mm", 20), ("add", 15), ("mm", 10),
    ]  # fmt: skip


def test_the_longest_come_first_with_their_stages():
    first, second = top(KERNELS, [FORWARD, BACKWARD], steps=2)
    assert (first["name"], first["count"], first["ms"]) == ("mm", 1.0, 20e-6)
    assert set(first["stages_ms"]) == {"forward", "backward"}
    assert second["name"] == "add"


def test_a_profile_of_real_operations_has_its_stages():
    clock, work = StageClock(), SimpleNamespace(forward=lambda: torch.randn(64, 64) @ torch.randn(64, 64))
    clock.wrap(work, "forward", "forward")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        work.forward()
    found = summary(profile, 1)
    assert set(found["stages"]) == {"forward"}
    assert "aten::mm" in {row["name"] for row in found["top_host_operations_by_own_time"]}


def test_stages_add_up_over_calls_and_an_inner_one_is_not_counted_again():
    clock, work = StageClock(), SimpleNamespace(inner=lambda: time.sleep(0.02))
    work.outer = lambda: work.inner()
    clock.wrap(work, "inner", "inner")
    clock.wrap(work, "outer", "outer")
    work.outer()
    work.outer()
    assert set(found := clock.take()) == {"outer"}
    assert 0.04 <= found["outer"] < 0.2
    work.inner()
    assert set(clock.take()) == {"inner"}
