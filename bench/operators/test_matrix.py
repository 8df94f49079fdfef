"""The operator matrix under pytest-benchmark: one test per shape, job and implementation, the rows of `fastkl bench`.

    pytest bench/operators --benchmark-only [--benchmark-json=operators.json] [-k "F and fastkl"]

Each row is compared with float64 before it is timed; bytes, operations, floor, peak memory, error and what speaks
against the row go into the JSON as extra_info. Peers that are not installed have no rows (`fastkl bench` says so).
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from fastkl.microbench import jobs, measure, run

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = jobs.GPU_SHAPES if DEVICE == "cuda" else jobs.CPU_SHAPES
ROUNDS, WARM_UPS = (20, 3) if DEVICE == "cuda" else (5, 1)


@cache
def rows(shape: jobs.Shape) -> dict[str, jobs.Row]:
    """The rows of one shape, by name; their inputs are made once."""
    return {f"{row.job} {row.name}": row for row in run.all_rows(jobs.Problem(shape, DEVICE))}


@cache
def ceilings(shape: jobs.Shape) -> dict[str, float]:
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
    error = run.checked_error(row)

    def call() -> None:
        row.call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{shape.name} {row.job}: {jobs.JOBS[row.job].given} -> {jobs.JOBS[row.job].wanted}"
    benchmark.extra_info |= run.floor(row, ceilings(shape)) | {"max_error": error, "doubt": row.doubt}
    benchmark.extra_info["peak_mib"] = measure.peak_mib(row.call, DEVICE)
    benchmark.pedantic(call, rounds=ROUNDS, warmup_rounds=WARM_UPS)
