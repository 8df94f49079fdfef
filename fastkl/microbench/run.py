"""`fastkl bench`: the scoring operators against plain PyTorch and their peers, with the floor beside every time.

In: a machine. Out: a table, bench.json, and two pictures (roofline.svg, memory.svg). Every row is checked against
float64 before it is timed. The ceilings (device copy, matrix product of the head's shape) are measured in the same run;
a row's floor is its least work over those ceilings. Left out: whole training steps (bench/training/steps.py).
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fastkl.microbench.jobs import CPU_SHAPES, GPU_SHAPES, JOBS, Problem, Row, Shape, errors, own_rows
from fastkl.microbench.measure import machine, peak_mib, times_ms
from fastkl.microbench.peers import missing_peers, peer_rows
from fastkl.microbench.pictures import memory, roofline

GPU_JOBS = "DFB,CEA,HIJ,G"
"""In groups: each group runs for every shape before the next begins, so that the least important rows are left out when
time runs out."""

TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 6e-2}
"""Largest error of a score, in nats, and of a gradient, as a part of its largest entry."""

COLUMNS = """\
median ms, p20, p80  wall time of one call (on a GPU with the L2 cache flushed before it), and how much it varies
% floor              the least time for the job over the median: its matrix products, or the traffic of its logits, at
                     the speeds that this machine reaches for this very shape; 100 leaves nothing to gain
peak MiB             memory of a call beyond its inputs, gradients included
error                largest deviation from float64: of a score in nats, of a gradient relative to its largest entry
A row that ends in words is doubtful, for the reason given."""


@dataclass(frozen=True)
class Result:
    """What was measured. Times in ms; peak memory beyond what was allocated before the call."""

    job: str
    name: str
    shape: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    floor_ms: float
    percent_of_floor: float
    bound: str  # which ceiling makes the floor: "matmul" or "bandwidth"
    flops: float
    bytes: float
    peak_mib: float | None
    max_error: float
    repeats: int
    doubt: str  # why the row may mislead; empty if nothing is known against it

    def line(self) -> str:
        """Its line of the table."""
        peak = "-" if self.peak_mib is None else f"{self.peak_mib:.0f}"
        return (
            f"  {self.name:<34}{self.median_ms:>11.2f}{self.p20_ms:>9.2f}{self.p80_ms:>9.2f}"
            f"{self.percent_of_floor:>9.0f}{peak:>10}{self.max_error:>10.1e}  {self.doubt}".rstrip()
        )


def checked_error(row: Row) -> float:
    """The largest deviation from float64 in the first rows; raises if it is too large: a wrong answer has no speed."""
    off = errors(row.call(), row.expected()).values()
    error = max(off)
    if not all(value <= TOLERANCE[row.shape.dtype] for value in off):
        raise AssertionError(f"job {row.job}, {row.name}: error {error:.2e} against float64, not timed")
    return error


def ceilings(shape: Shape, device: str) -> dict[str, float]:
    """Bytes per second of a copy (read + written), and operations per second of the head's own matrix product."""
    x = torch.randn(1 << (28 if device == "cuda" else 24), device=device)
    y = torch.empty_like(x)
    copy_ms = min(times_ms(lambda: y.copy_(x), device, 0.1))
    hidden = torch.randn(shape.rows, shape.hidden, device=device).to(shape.dtype)
    weight = torch.randn(shape.vocab, shape.hidden, device=device).to(shape.dtype)
    logits = torch.empty(shape.rows, shape.vocab, device=device, dtype=shape.dtype)
    product_ms = min(times_ms(lambda: torch.mm(hidden, weight.t(), out=logits), device, 0.2))
    return {
        "copy_bytes_per_s": 8 * x.numel() / copy_ms * 1e3,
        "matmul_flops_per_s": 2 * shape.rows * shape.hidden * shape.vocab / product_ms * 1e3,
        "head_product_ms": product_ms,
    }


def floor(row: Row, ceiling: dict[str, float]) -> dict[str, Any]:
    """The row's least work, and the least time that it takes here."""
    s = row.shape
    flops = row.head_products * 2 * s.rows * s.hidden * s.vocab
    logits_bytes = row.logit_passes * s.rows * s.vocab * s.dtype.itemsize
    moved = logits_bytes + min(row.head_products, 2) * (s.rows + s.vocab) * s.hidden * s.dtype.itemsize
    product, traffic = flops / ceiling["matmul_flops_per_s"], moved / ceiling["copy_bytes_per_s"]
    bound = "matmul" if product > traffic else "bandwidth"
    return {"floor_ms": 1e3 * max(product, traffic), "bound": bound, "flops": flops, "bytes": moved}


def measure(row: Row, ceiling: dict[str, float], device: str, seconds: float) -> Result:
    """Checks, then times for `seconds`, then takes the peak memory. Raises if the check fails."""
    error = checked_error(row)
    times = times_ms(row.call, device, seconds)
    low, median, high = quantile(times, 0.2), statistics.median(times), quantile(times, 0.8)
    least = floor(row, ceiling)
    share = 100 * least["floor_ms"] / median
    return Result(
        row.job, row.name, row.shape.name, median, low, high, percent_of_floor=share, **least,
        peak_mib=peak_mib(row.call, device), max_error=error, repeats=len(times),
        doubt=doubt(row, times, share),
    )  # fmt: skip


def doubt(row: Row, times: list[float], percent_of_floor: float) -> str:
    """Why the row may mislead: what it leaves out of the job, and what the measurement itself shows."""
    found = [row.doubt] if row.doubt else []
    if len(times) < 3:
        found.append(f"timed {'once' if len(times) == 1 else 'twice'} only")
    if quantile(times, 0.8) > 1.25 * quantile(times, 0.2):
        found.append("times vary: the machine was busy, or the call is short")
    if percent_of_floor > 105:
        found.append("faster than its floor, which was measured at a busier moment")
    return "; ".join(found)


def all_rows(problem: Problem, jobs: str = "".join(JOBS), compiled: bool = False) -> list[Row]:
    """Our rows, plain PyTorch's and the peers', in the order of `jobs`; or those that torch.compile serves."""
    rows = [row for row in (*own_rows(problem), *peer_rows(problem)) if row.job in jobs and row.compiled == compiled]
    return sorted(rows, key=lambda row: jobs.index(row.job))


def quantile(values: list[float], q: float) -> float:
    """The value at rank q."""
    return sorted(values)[round(q * (len(values) - 1))]


def run_bench(
    output: str | os.PathLike[str] = "bench/results/kernels",
    *,
    device: str | None = None,
    shapes: tuple[Shape, ...] | None = None,
    jobs: str | None = None,
    seconds: float | None = None,
    budget_s: float = 150.0,
    say: Callable[[str], None] = print,
) -> list[Result]:
    """Runs the matrix, prints the table, writes bench.json, roofline.svg and memory.svg into `output`.

    seconds: how long a row is timed. Starts no row once `budget_s` seconds have passed, and says which it left out, as
    it does of peers that cannot be had or fail. A wrong result of our own raises.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    shapes = shapes or (GPU_SHAPES if device == "cuda" else CPU_SHAPES)
    jobs = jobs or (GPU_JOBS if device == "cuda" else "".join(JOBS))
    seconds = (1.0 if device == "cuda" else 0.4) if seconds is None else seconds
    started, results, measured, left_out, origin = time.perf_counter(), [], {}, [], machine(device)
    say(f"{origin['device']}, {origin['threads']} threads, torch {torch.__version__}\n\n{COLUMNS}\n")
    for line in missing_peers(device):
        say(f"no rows of {line}")
    say(f"{'':<36}{'median ms':>11}{'p20':>9}{'p80':>9}{'% floor':>9}{'peak MiB':>10}{'error':>10}")
    groups = [(group, False) for group in jobs.split(",")] + [(jobs.replace(",", ""), True)]
    for (group, compiled), shape in itertools.product(groups, shapes):
        rows = all_rows(Problem(shape, device), group, compiled)
        if not rows:
            continue
        if shape.name not in measured:
            measured[shape.name] = ceilings(shape, device)
        say(f"-- {shape.name}: N {shape.rows}, H {shape.hidden}, V {shape.vocab}; "
            f"one head product takes {measured[shape.name]['head_product_ms']:.1f} ms")  # fmt: skip
        for letter, of_job in itertools.groupby(rows, key=lambda row: row.job):
            say(f"{letter} {JOBS[letter].given} -> {JOBS[letter].wanted}")
            for row in of_job:
                label = f"{shape.name} {row.job} {row.name}"
                if time.perf_counter() - started > budget_s:
                    left_out.append(f"{label} (time)")
                    continue
                try:
                    results.append(measure(row, measured[shape.name], device, seconds))
                except Exception as error:
                    if row.name.startswith("fastkl"):
                        raise
                    left_out.append(f"{label} ({type(error).__name__}: {str(error)[:100]})")
                    continue
                say(results[-1].line())
        write(Path(output), {"machine": origin, "ceilings": measured, "left_out": left_out}, results)
    if left_out:
        say(f"left out (the budget is {budget_s:.0f} s): " + "; ".join(left_out))
    say(f"written: {output}/bench.json, roofline.svg, memory.svg")
    return results


def write(folder: Path, record: dict[str, object], results: list[Result]) -> None:
    """The files, with all results so far."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench.json").write_text(json.dumps({**record, "rows": [asdict(r) for r in results]}, indent=1))
    (folder / "roofline.svg").write_text(roofline(results))
    (folder / "memory.svg").write_text(memory(results))
