"""A recipe with several seeds: what SmolLM2-135M-Instruct answers rightly before and after, and what it forgets.

    python bench/real/model.py MODEL
    python bench/real/recipe.py MODEL [--recipe bench/real/sums.yaml] [--seeds 0 1 2]

Each run is `fastkl train --config RECIPE --model MODEL --seed S`, one after another, with its held-out questions and
the loss on stories that nobody trained on. Writes bench/results/cpu/recipe_NAME.json after every run.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

import yaml

from bench import common
from fastkl.storyteller.grammar import story

HERE = Path(__file__).parent
STORIES = range(10**6, 10**6 + 40)
PASS = 0.99
BY_STEP = {
    "reward": "reward/raw", "kl": "kl/exact", "entropy": "entropy", "no_signal": "groups/no_signal",
    "length": "completion/mean_length", "seconds": "time/step_s",
}  # fmt: skip
HELD_OUT = {
    "pass@1": "eval/pass@1", "pass@1_error": "eval_error/pass@1", "kl": "eval/kl", "nats_per_token": "eval/loss",
}  # fmt: skip


def one_run(recipe: str, model: str, seed: int, more: dict[str, Any]) -> dict[str, Any]:
    """Its series by step, and the measurements of the held-out questions and stories by step."""
    from fastkl.config.files import load_config
    from fastkl.training.loop import train

    with tempfile.TemporaryDirectory() as place:
        text, run = Path(place, "stories.txt"), Path(place, "run")
        text.write_text("\n".join(story(i) for i in STORIES))
        settings = yaml.safe_load(Path(recipe).read_text())
        given = Path(place, "run.yaml")
        chosen = {"model": model, "seed": seed, "eval_text": str(text), "output": str(run), "report_to": []}
        given.write_text(yaml.safe_dump({**settings, **chosen, **more}))
        train(load_config(given))
        rows, answers = common.read_lines(run / "metrics.jsonl"), common.read_lines(run / "eval_samples.jsonl")
    held = [row for row in rows if "eval/pass@1" in row]
    return {
        "seed": seed,
        **{name: [row[key] for row in rows if key in row] for name, key in BY_STEP.items()},
        "held_out": {row["step"]: {name: row[key] for name, key in HELD_OUT.items()} for row in held},
        "by_kind": by_kind(answers),
    }


def by_kind(answers: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The share of held-out sums that is right, by step and kind, and how many there are: a share of all tells neither
    what was learned nor what is missing."""
    right: dict[str, dict[int, list[bool]]] = {}
    for answer in answers:
        found = right.setdefault(kind_of(answer["columns"]), {}).setdefault(answer["step"], [])
        found.append(answer["reward"] >= PASS)
    return {
        kind: {"questions": len(steps[0]), "right": {step: statistics.fmean(of) for step, of in steps.items()}}
        for kind, steps in sorted(right.items())
    }


def kind_of(columns: dict[str, Any]) -> str:
    """Such as "2 digits, difference below 0"."""
    of = columns["metadata"]
    below = " below 0" if columns["answer"].startswith("-") else ""
    return f"{of['num_digits']} digits, {'sum' if '+' in of['expression'] else 'difference'}{below}"


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds, with the standard error of the share that is right."""
    first, last = ([list(run["held_out"].values())[at] for run in runs] for at in (0, -1))
    right = [of["pass@1"] for of in last]
    return {
        "pass@1": [statistics.fmean(of["pass@1"] for of in first), statistics.fmean(right)],
        "error": statistics.stdev(right) / len(right) ** 0.5 if len(right) > 1 else last[0]["pass@1_error"],
        "nats_per_token": [statistics.fmean(of["nats_per_token"] for of in found) for found in (first, last)],
        "kl": statistics.fmean(of["kl"] for of in last),
        "minutes": statistics.fmean(sum(run["seconds"]) for run in runs) / 60,
    }


def main() -> None:
    p = common.parser(__doc__)
    p.add_argument("model", type=Path)
    p.add_argument("--recipe", type=Path, default=HERE / "sums.yaml")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings other than the recipe's")
    p.add_argument("--output", type=Path)
    given = p.parse_args()
    more = {name: yaml.safe_load(value) for name, _, value in (pair.partition("=") for pair in given.set)}
    output = given.output or common.RESULTS / "cpu" / f"recipe_{given.recipe.stem}.json"
    runs: list[dict[str, Any]] = []
    for seed in given.seeds:
        runs.append(common.run_alone(one_run, str(given.recipe), str(given.model), seed, more))
        found = summary(runs)
        common.write(output, {"recipe": given.recipe.name, "set": more, "summary": found, "runs": runs})
        print(f"seed {seed}: {found}", flush=True)


if __name__ == "__main__":
    main()
