"""How much memory a run has taken so far: this process with its children (an engine runs in one), and the GPU."""

from __future__ import annotations

import re
import resource
from pathlib import Path

import torch

PROC = Path("/proc")


def peak_rss_bytes() -> int:
    """The largest resident size so far of this process and of each process below it that still runs, added up."""
    found = [peak for process in ("self", *descendants("self")) if (peak := _high_water_bytes(process))]
    return sum(found) or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_gpu_bytes() -> int | None:
    """The largest sum of the tensors that this process has had on the GPU; None without one. An engine in a process
    of its own has its share besides (--gpu-memory-utilization)."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def descendants(process: str) -> list[str]:
    """The ids of the processes that `process` has started, and of those that they have."""
    found: list[str] = []
    for task in (PROC / process / "task").glob("*/children"):
        for child in _read(task).split():
            found += [child, *descendants(child)]
    return found


def _high_water_bytes(process: str) -> int:
    peak = re.search(r"^VmHWM:\s*(\d+) kB", _read(PROC / process / "status"), re.M)
    return 1024 * int(peak[1]) if peak else 0


def _read(path: Path) -> str:
    """Empty where the process has ended meanwhile, or the system does not say."""
    try:
        return path.read_text()
    except OSError:
        return ""
