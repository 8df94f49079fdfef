"""fastkl's scoring functions beside those they replace in other projects: time, memory and error in one run on a CPU.

    pip install "trl==1.16.*" && pip install --no-deps verl openrlhf liger-kernel tensordict pyvers orjson
    python bench/drop_in.py

Every contender of a job gets the same inputs and gives the same outputs and gradients (drop_in_contenders.py). Each is
compared with float64 first; then they take turns, one call each per round. Memory is the peak beyond what was there
before the call (VmHWM after clearing refs), gradients included. The errors are measured on a small bfloat16 problem,
too. Projects that are not installed are left out, and said to be. Left out: GPUs (the projects' Triton kernels and
fastkl's), whole training steps (training.py), prime-rl (not on PyPI).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from drop_in_contenders import JOBS, Contender, Problem, Size, contenders
from torch import Tensor

from fastkl.microbench.run import peak_mib

ROOT = Path(__file__).resolve().parents[1]


def errors_of(contender: Contender, problem: Problem, exact: list[Tensor]) -> dict[str, float]:
    """Largest deviations from float64: of a score in nats, of a gradient as a part of its largest entry."""
    found = contender.call(problem, problem.leaves(contender.job))
    scores, gradients = 0.0, 0.0
    for x, truth in zip(found, exact, strict=True):
        difference = float((x.double() - truth).abs().max())
        if truth.dim() == 1:
            scores = max(scores, difference)
        else:
            gradients = max(gradients, difference / float(truth.abs().max()))
    return {"score_error": scores, "gradient_error": gradients}


def measure(job: str, group: list[Contender], large: Problem, small: Problem, rounds: int) -> list[dict]:
    """Errors of both problems, then peak memory and times in turns of the large one: one row per contender."""
    rows = [{"job": job, "project": c.project, "function": c.function} for c in group]
    for problem in (large, small):
        exact = problem.exact(job)
        for contender, row in zip(group, rows, strict=True):
            row[str(problem.size.dtype).removeprefix("torch.")] = errors_of(contender, problem, exact)
        del exact
    for contender, row in zip(group, rows, strict=True):
        leaves = large.leaves(job)
        row["peak_mib"] = peak_mib(lambda c=contender, x=leaves: c.call(large, x), "cpu")
    times: list[list[float]] = [[] for _ in group]
    for _ in range(rounds):
        for contender, seconds in zip(group, times, strict=True):
            leaves = large.leaves(job)
            start = time.perf_counter()
            contender.call(large, leaves)
            seconds.append(time.perf_counter() - start)
    for row, seconds in zip(rows, times, strict=True):
        row |= {"median_s": statistics.median(seconds), "min_s": min(seconds), "max_s": max(seconds)}
    return rows


def table(record: dict) -> str:
    """The page's tables (docs/drop-in.md), one per job."""
    lines = []
    for job, (given, scores, gradients) in record["jobs"].items():
        lines += [
            f"**{job}.** {given} → {scores}, and from these {gradients}:\n",
            "| | function | s | peak MiB | error, float32 | error, bfloat16 |",
            "|---|---|---:|---:|---:|---:|",
        ]
        for row in record["rows"]:
            if row["job"] == job:
                errors = [
                    f"{row[dtype]['score_error']:.0e}, {row[dtype]['gradient_error']:.0e}"
                    for dtype in ("float32", "bfloat16")
                ]
                lines.append(
                    f"| {row['project']} | `{row['function']}` | {row['median_s']:.2f} | {row['peak_mib']:.0f} "
                    f"| {errors[0]} | {errors[1]} |"
                )
        lines.append("")
    return "\n".join(lines)


def machine() -> dict[str, object]:
    """What the numbers were measured on and with."""
    versions = {}
    for name in ("torch", "trl", "verl", "openrlhf", "liger-kernel"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    return {
        "device": cpu.group(1) if cpu else platform.processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit.stdout.strip(),
        "command": " ".join(["python", os.path.relpath(__file__, ROOT), *sys.argv[1:]]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--rounds", type=int, default=7, help="timed calls per contender")
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results" / "drop_in.json")
    options = parser.parse_args()
    large = Size(options.rows, options.hidden, options.vocab, torch.float32)
    small = Size(64, 256, 4000, torch.bfloat16)
    found, left_out = contenders()
    rows = []
    for job in JOBS:
        group = [c for c in found if c.job == job]
        rows += measure(job, group, Problem(large), Problem(small), options.rounds)
    sizes = [{**asdict(size), "dtype": str(size.dtype)} for size in (large, small)]
    record = {"machine": machine(), "sizes": sizes, "jobs": JOBS, "left_out": left_out, "rows": rows}
    options.output.write_text(json.dumps(record, indent=1) + "\n")
    print(table(record))
    print(f"left out: {left_out}\nwritten to {options.output}")


if __name__ == "__main__":
    main()
