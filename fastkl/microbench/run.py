"""`fastkl bench`: the scoring kernels against plain PyTorch and their peers, with the physical floor beside every time.

In: a machine. Out: a table, bench.json, and two pictures (roofline.svg, memory.svg). Every row is checked against
float64 before it is timed. The ceilings (device copy, matrix product of the head's shape) are measured in the same run;
a row's floor is its minimal work over those ceilings. Left out: whole training steps (bench/training.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from fastkl.microbench.jobs import CPU_SHAPES, GPU_SHAPES, Problem, Row, Shape, rows_of
from fastkl.microbench.peers import missing_peers, peer_rows
from fastkl.microbench.pictures import memory, roofline

JOBS = "ABCDEFGHI"


GPU_JOBS = "DFB,CEA,HI,G"
"""In groups: each group runs for every shape before the next begins, so that what time cuts off matters least."""


TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 6e-2}
"""Largest error of a score, in nats, and of a gradient, as a part of its largest entry."""


@dataclass(frozen=True)
class Result:
    """What was measured. Times in ms; peak memory beyond what lived before the call."""

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


def error_of(row: Row) -> float:
    """The largest deviation from float64 in the first rows; gradients relative to their largest entry."""
    worst = 0.0
    got, expected = row.call(), row.expected()
    for x, truth in zip(got, expected, strict=True):
        difference = float((x[: len(truth)].double() - truth.double()).abs().max())
        is_gradient = truth.dim() == 2
        worst = max(worst, difference / float(truth.abs().max()) if is_gradient else difference)
    return worst


def timed(call: Callable[[], object], device: str, repeats: int, warmups: int = 1) -> list[float]:
    """Wall times in ms; on a GPU device events, with the L2 cache flushed before each."""
    flush = torch.empty(256 << 20, dtype=torch.int8, device=device) if device == "cuda" else None
    times = []
    for i in range(warmups + repeats):
        if flush is None:
            start = time.perf_counter()
            call()
            elapsed = (time.perf_counter() - start) * 1e3
        else:
            flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            elapsed = begin.elapsed_time(end)
        if i >= warmups:
            times.append(elapsed)
    return times


def peak_mib(call: Callable[[], object], device: str) -> float | None:
    """Peak memory of a call beyond what was there before it; None where it cannot be read."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        ctypes.CDLL(None).malloc_trim(0)  # hands freed memory back, which would otherwise hide what the call takes
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark of this process
        before = _status_kib("VmRSS")
        call()
        return max(0.0, (_status_kib("VmHWM") - before) / 1024)
    except (OSError, AttributeError):
        return None


def _status_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def ceilings(shape: Shape, device: str) -> dict[str, float]:
    """Bytes per second of a copy (read + written), and operations per second of the head's own matrix product."""
    x = torch.randn(1 << (28 if device == "cuda" else 24), device=device)
    y = torch.empty_like(x)
    copy_ms = min(timed(lambda: y.copy_(x), device, 5))
    hidden = torch.randn(shape.rows, shape.hidden, device=device).to(shape.dtype)
    weight = torch.randn(shape.vocab, shape.hidden, device=device).to(shape.dtype)
    logits = torch.empty(shape.rows, shape.vocab, device=device, dtype=shape.dtype)
    product_ms = min(timed(lambda: torch.mm(hidden, weight.t(), out=logits), device, 5))
    return {
        "copy_bytes_per_s": 8 * x.numel() / copy_ms * 1e3,
        "matmul_flops_per_s": 2 * shape.rows * shape.hidden * shape.vocab / product_ms * 1e3,
        "head_product_ms": product_ms,
    }


def measure(row: Row, ceiling: dict[str, float], device: str, repeats: int) -> Result:
    """Checks, then times. Raises if the check fails: a wrong answer has no speed."""
    error = error_of(row)
    if not error <= TOLERANCE[row.shape.dtype]:
        raise AssertionError(f"job {row.job}, {row.name}: error {error:.2e} against float64, not timed")
    times = timed(row.call, device, repeats, warmups=3 if device == "cuda" else 1)
    s = row.shape
    flops = row.head_products * 2 * s.rows * s.hidden * s.vocab
    logits_bytes = row.logit_passes * s.rows * s.vocab * s.dtype.itemsize
    head_bytes = min(row.head_products, 2) * (s.rows + s.vocab) * s.hidden * s.dtype.itemsize
    moved = logits_bytes + head_bytes
    product, traffic = flops / ceiling["matmul_flops_per_s"], moved / ceiling["copy_bytes_per_s"]
    floor, bound = max(product, traffic) * 1e3, "matmul" if product > traffic else "bandwidth"
    median = statistics.median(times)
    low, high = _quantile(times, 0.2), _quantile(times, 0.8)
    peak = peak_mib(row.call, device)
    return Result(
        row.job, row.name, s.name, median, low, high, floor, 100 * floor / median, bound, flops, moved, peak, error,
        repeats,
    )  # fmt: skip


def all_rows(problem: Problem, jobs: str = JOBS, compiled: bool = False) -> list[Row]:
    """Our rows, plain PyTorch's and the peers', in the order of `jobs`; or those that torch.compile serves."""
    rows = [row for row in (*rows_of(problem), *peer_rows(problem)) if row.job in jobs and row.compiled == compiled]
    return sorted(rows, key=lambda row: jobs.index(row.job))


def _quantile(values: list[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[round(q * (len(ordered) - 1))]


def run_bench(
    output: str | os.PathLike = "bench/results/kernels",
    *,
    device: str | None = None,
    shapes: tuple[Shape, ...] | None = None,
    jobs: str | None = None,
    repeats: int | None = None,
    budget_s: float = 150.0,
    say: Callable[[str], None] = print,
) -> list[Result]:
    """Runs the matrix, prints the table, writes bench.json, roofline.svg and memory.svg into `output`.

    Stops adding rows once `budget_s` seconds have passed, and says which it left out, as it does of peers that cannot
    be had or fail. A wrong result of our own raises.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    shapes = shapes or (GPU_SHAPES if device == "cuda" else CPU_SHAPES)
    jobs = jobs or (GPU_JOBS if device == "cuda" else JOBS)
    repeats = repeats or (20 if device == "cuda" else 5)
    started, results, measured, left_out, origin = time.perf_counter(), [], {}, [], provenance(device)
    say(machine(device))
    for line in missing_peers(device):
        say(f"no rows of {line}")
    say(f"{'job':<4}{'implementation':<34}{'median ms':>11}{'p20':>9}{'p80':>9}{'% floor':>9}{'peak MiB':>10}  error")
    groups = [(group, False) for group in jobs.split(",")] + [(jobs.replace(",", ""), True)]
    for (group, compiled), shape in itertools.product(groups, shapes):
        rows = all_rows(Problem(shape, device), group, compiled)
        if not rows:
            continue
        if shape.name not in measured:
            measured[shape.name] = ceilings(shape, device)
        say(f"-- {shape.name}: N {shape.rows}, H {shape.hidden}, V {shape.vocab}; "
            f"head product {measured[shape.name]['head_product_ms']:.1f} ms")  # fmt: skip
        for row in rows:
            label = f"{shape.name} {row.job} {row.name}"
            if time.perf_counter() - started > budget_s:
                left_out.append(f"{label} (time)")
                continue
            try:
                result = measure(row, measured[shape.name], device, repeats)
            except Exception as error:
                if row.name.startswith("fastkl"):
                    raise
                left_out.append(f"{label} ({type(error).__name__}: {str(error)[:100]})")
                continue
            results.append(result)
            peak = "-" if result.peak_mib is None else f"{result.peak_mib:.0f}"
            say(f"{result.job:<4}{result.name:<34}{result.median_ms:>11.2f}{result.p20_ms:>9.2f}{result.p80_ms:>9.2f}"
                f"{result.percent_of_floor:>9.0f}{peak:>10}{result.max_error:>10.1e}")  # fmt: skip
        _write(Path(output), {**origin, "ceilings": measured, "left_out": left_out}, results)
    if left_out:
        say(f"left out (the budget is {budget_s:.0f} s): " + "; ".join(left_out))
    say(f"written: {output}/bench.json, roofline.svg, memory.svg")
    return results


def _write(folder: Path, record: dict[str, object], results: list[Result]) -> None:
    """The files, complete as far as it went."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench.json").write_text(json.dumps({**record, "rows": [asdict(r) for r in results]}, indent=1))
    (folder / "roofline.svg").write_text(roofline(results))
    (folder / "memory.svg").write_text(memory(results))


def provenance(device: str) -> dict[str, object]:
    """Where numbers come from: machine, versions, command, commit."""
    packages = "torch", "triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy", "quack-kernels"
    versions = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    commit = ""
    with contextlib.suppress(OSError):
        git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    command = " ".join(["python", *(os.path.relpath(a) if os.path.isabs(a) else a for a in sys.argv)])
    return {"machine": machine(device), "versions": versions, "command": command, "commit": commit}


def machine(device: str) -> str:
    """The machine in words."""
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"
