"""What several updates of one rollout buy: reward against wall-clock, and what a generated token costs.

    python bench/training/reuse.py [--seeds 0 1 2] [--steps 40]     writes bench/results/cpu/reuse.json
    python bench/training/reuse.py --table FILE                     the same as a table in Markdown

The default job of `fastkl train` (the storyteller, paid for alliteration) with --updates-per-rollout 1, 2 and 4, above
1 with --clip 0.2 0.2, everything else alike, the learning rate too: M minibatches of a rollout are M steps of the
optimizer. The contenders take turns, each run in a process of its own. Seconds are those of whole steps, added up:
generation, rewards, scores, updates, the push of the weights; what comes before the first step is left out.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from bench.common import Steps, parser, run_alone, take_turns
from fastkl.config.settings import TrainConfig
from fastkl.training.loop import train

CONTENDERS: dict[str, dict[str, Any]] = {
    "1 update": {},
    "2 updates": {"updates_per_rollout": 2, "clip": (0.2, 0.2)},
    "4 updates": {"updates_per_rollout": 4, "clip": (0.2, 0.2)},
}
SERIES = {"reward": "reward/raw", "kl": "kl/exact", "well_formed": "grammar/well_formed"}
END_STEPS = 5
MARKS = (0.25, 0.5, 0.75, 1.0)  # shares of the shortest run's seconds at which rewards are compared


def one_run(name: str, seed: int, steps: int, generator: str) -> dict[str, Any]:
    """One run: its series by step, and the seconds of a generated token."""
    clock = Steps()
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            seed=seed, steps=steps, generator=generator, report_to=(), save_every=0, sample_every=0,
            output=f"{folder}/run", **CONTENDERS[name],
        )  # fmt: skip
        train(config, callbacks=[clock])
    rows = clock.metrics
    tokens = sum(sample["num_tokens"] for samples in clock.samples for sample in samples)
    return {
        "seed": seed,
        "seconds": list(accumulate(row["time/step_s"] for row in rows)),
        **{key: [row[metric] for row in rows] for key, metric in SERIES.items()},
        "generated_tokens": tokens,
        "generate_us_per_token": 1e6 * sum(row["time/generate_s"] for row in rows) / tokens,
        "step_us_per_token": 1e6 * sum(row["time/step_s"] for row in rows) / tokens,
        "updates": sum(row.get("reuse/updates", 1) for row in rows),
    }


def line(name: str, runs: list[dict[str, Any]]) -> str:
    """What the last run came to."""
    run = runs[-1]
    return (
        f"{name}, seed {run['seed']}: reward {fmean(run['reward'][-END_STEPS:]):.2f} after {run['seconds'][-1]:.0f} s, "
        f"{run['step_us_per_token']:.0f} us per generated token"
    )


def reward_at(run: dict[str, Any], seconds: float) -> float:
    """The mean reward of the last END_STEPS steps that were over by then; the first step's before it is over."""
    over = [reward for reward, end in zip(run["reward"], run["seconds"], strict=True) if end <= seconds]
    return fmean(over[-END_STEPS:] or run["reward"][:1])


def mean_and_error(values: Sequence[float]) -> str:
    """The mean over seeds and its standard error."""
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return f"{fmean(values):.3g} ± {error:.2g}"


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """One row per contender: rewards at the same seconds, then where the runs end and what a token costs."""
    shortest = min(run["seconds"][-1] for runs in results.values() for run in runs)
    marks = [share * shortest for share in MARKS]
    columns = [*(f"reward after {mark:.0f} s" for mark in marks), "KL", "well formed", "s", "µs per generated token"]
    rows = []
    for name, runs in results.items():
        cells = [mean_and_error([reward_at(run, mark) for run in runs]) for mark in marks]
        cells += [mean_and_error([fmean(run[key][-END_STEPS:]) for run in runs]) for key in ("kl", "well_formed")]
        cells += [mean_and_error([run["seconds"][-1] for run in runs])]
        cells += [mean_and_error([run["step_us_per_token"] for run in runs])]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([f"| | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}", *rows])


def main(options: argparse.Namespace) -> None:
    """All runs, a seed after the other, the contenders in turn."""
    seeds = {name: iter(options.seeds) for name in CONTENDERS}

    def alone(name: str) -> dict[str, Any]:
        return run_alone(one_run, name, next(seeds[name]), options.steps, options.generator)

    job = {"seeds": options.seeds, "steps": options.steps, "generator": options.generator, "settings": CONTENDERS}
    take_turns([*CONTENDERS], len(options.seeds), alone, line, options.output, job)
    print(table(json.loads(options.output.read_text())["results"]))


if __name__ == "__main__":
    made = parser(__doc__ or "", "cpu/reuse.json")
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    made.add_argument("--steps", type=int, default=40)
    made.add_argument("--generator", default="auto")
    made.add_argument(
        "--table", type=Path, metavar="FILE", help="print the table of a results file, and measure nothing"
    )
    given = made.parse_args()
    if given.table:
        print(table(json.loads(given.table.read_text())["results"]))
    else:
        main(given)
