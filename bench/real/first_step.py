"""How long a newcomer waits: from a clone to the first completed step of a real model.

    python bench/real/model.py MODEL
    python bench/real/first_step.py MODEL

Clones the last commit into an empty folder, builds the environment there with `make setup` (the package manager's cache
counts as it is), and starts the recipe for sums. The first step is complete when its line of metrics.jsonl is written;
evaluation before the training is left out, loading and the start of vLLM are not. Writes
bench/results/cpu/first_step.json.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench import common

WAIT_S = 1800.0


def seconds(call: list[str], folder: Path) -> float:
    """Wall seconds of a command; the bench ends where it fails."""
    started = time.perf_counter()
    done = subprocess.run(call, cwd=folder, capture_output=True, text=True, env=environment())
    if done.returncode:
        sys.exit(f"{' '.join(call)} failed:\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}")
    return time.perf_counter() - started


def environment() -> dict[str, str]:
    """Without what names this checkout, or its environment."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}


def first_step(clone: Path, model: Path, run: Path) -> float:
    """Seconds from the command to the line of the first step."""
    recipe = "bench/real/sums.yaml"
    call = [".venv/bin/fastkl", "train", "--config", recipe, "--model", str(model), "--output", str(run)]
    started, lines = time.perf_counter(), run / "metrics.jsonl"
    with (run.parent / "log").open("w") as log:
        training = subprocess.Popen(
            [*call, "--eval-prompts", "", "--steps", "2"], cwd=clone, stdout=log, stderr=log, env=environment()
        )
        try:
            while not (lines.is_file() and lines.read_text().count("\n")):
                if training.poll() is not None or time.perf_counter() - started > WAIT_S:
                    sys.exit(f"the run ended or waited before its first step:\n{(run.parent / 'log').read_text()}")
                time.sleep(0.05)
            return time.perf_counter() - started
        finally:
            training.kill()
            training.wait()


def main() -> None:
    p = common.parser(__doc__, "cpu/first_step.json")
    p.add_argument("model", type=Path)
    given = p.parse_args()
    with tempfile.TemporaryDirectory(dir=common.ROOT.parent) as place:
        clone = Path(place, "fastkl")
        parts = {
            "clone": seconds(["git", "clone", "--quiet", str(common.ROOT), str(clone)], Path(place)),
            "make setup": seconds(["make", "setup"], clone),
            "fastkl train, to the first step": first_step(clone, given.model.resolve(), Path(place, "run")),
        }
    print({**parts, "together": sum(parts.values())})
    common.write(given.output, {"seconds": parts, "together": sum(parts.values())})


if __name__ == "__main__":
    main()
