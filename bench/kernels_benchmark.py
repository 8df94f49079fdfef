"""The kernel matrix under pytest-benchmark: one test per job and implementation, the same rows as `fastkl bench`.

    pytest bench/kernels_benchmark.py [--benchmark-json=kernels.json] [-k "F and fastkl"]

Each row is compared with float64 before it is timed; bytes, operations, floor, peak memory and error go into the JSON
as extra_info. Peers that are not installed have no rows (the table of `fastkl bench` says so).
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from fastkl.microbench import jobs, run

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = run.GPU_SHAPES if DEVICE == "cuda" else run.CPU_SHAPES


@cache
def rows(shape: jobs.Shape) -> dict[str, jobs.Row]:
    """The rows of one shape, by name; their inputs are made once."""
    return {f"{row.job} {row.name}": row for row in run.all_rows(jobs.Problem(shape, DEVICE))}


@cache
def ceiling(shape: jobs.Shape) -> dict[str, float]:
    """The machine's ceilings for one shape, measured once per run."""
    return run.ceilings(shape, DEVICE)


def names(shape: jobs.Shape) -> list[str]:
    """Row names without making the full-size inputs."""
    tiny = jobs.Shape(shape.name, 64, 8, 8, shape.dtype, shape.softcap)
    return [f"{row.job} {row.name}" for row in run.all_rows(jobs.Problem(tiny, DEVICE))]


CASES = [pytest.param(shape, name, id=f"{shape.name} {name}") for shape in SHAPES for name in names(shape)]


@pytest.mark.parametrize(("shape", "name"), CASES)
def test_row(benchmark, shape: jobs.Shape, name: str) -> None:
    row = rows(shape)[name]
    result = run.measure(row, ceiling(shape), DEVICE, repeats=1)  # raises if the result is wrong

    def call() -> None:
        row.call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{shape.name} {row.job}"
    for key in ("flops", "bytes", "floor_ms", "peak_mib", "max_error"):
        benchmark.extra_info[key] = getattr(result, key)
    benchmark.pedantic(call, rounds=20 if DEVICE == "cuda" else 5, warmup_rounds=3 if DEVICE == "cuda" else 0)
