"""What runs came to, as a table for the README and a JSON file beside it.

    python bench/training/summary.py OUTPUT.json RUN_FOLDER...

"start" is the first step (the untrained policy's samples), "end" the mean over the last five steps.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import fmean
from typing import Any

from bench.common import read_lines, write
from fastkl.config.files import load_config

END_STEPS = 5
COLUMNS = {
    "reward/raw": "reward",
    "kl/exact": "KL (nats)",
    "diversity/distinct_2": "distinct-2",
    "grammar/well_formed": "well formed",
    "lm_cross_entropy": "policy CE",
    "original_lm_cross_entropy": "original CE",
}


def summary(folder: Path) -> dict[str, Any]:
    """Start and end of one run, its settings that differ between runs, and its wall time."""
    rows, samples = (read_lines(folder / name) for name in ("metrics.jsonl", "samples.jsonl"))
    config = load_config(folder / "config.yaml")
    last = rows[-END_STEPS:]
    return {
        "run": folder.name,
        "kl_coef": config.kl_coef,
        "advantage": config.advantage,
        "reward": config.reward,
        "seed": config.seed,
        "lr": config.lr,
        "steps": len(rows),
        "start": {key: rows[0][key] for key in COLUMNS if key in rows[0]},
        "end": {key: fmean(row[key] for row in last) for key in COLUMNS if key in rows[0]},
        "median_step_s": sorted(row["time/step_s"] for row in rows)[len(rows) // 2],
        "wall_s": sum(row["time/step_s"] for row in rows),
        "last_sample": next(s["completion"] for s in samples if s["step"] == rows[-1]["step"]),
    }


def main(output: Path, folders: list[Path]) -> None:
    found = [summary(folder) for folder in folders]
    print("| run | " + " | ".join(COLUMNS.values()) + " |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    for run in found:
        cells = [f"{run['start'][key]:.3g} → {run['end'][key]:.3g}" for key in COLUMNS if key in run["start"]]
        print(f"| {run['run']} | " + " | ".join(cells) + " |")
    write(output, {"runs": found})


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
