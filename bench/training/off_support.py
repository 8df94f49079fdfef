"""KL penalties under truncated sampling: what each charges, and what brings the policy home.

    python bench/training/off_support.py --seeds 0 1       writes bench/results/cpu/off_support.json

The default job (`fastkl train`) with kl_coef 1, min_p 0.1 and top_k 50 at a constant learning rate. It is rewarded in
the first half of its steps and not at all in the second half, so that the penalty alone is left there. Each penalty of
PENALTIES runs with each seed. k1 with twice the coefficient is there to compare rewards at nearly equal KL.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Mapping
from typing import Any

from bench.common import RESULTS, Steps, parser, run_alone, write
from fastkl.config.settings import TrainConfig
from fastkl.rewards.built_in import alliteration
from fastkl.training.loop import run_steps
from fastkl.training.setup import set_up

PENALTIES = {
    "k1": {"kl_estimator": "k1", "kl_placement": "reward"},
    "k1, coefficient 2": {"kl_estimator": "k1", "kl_placement": "reward", "kl_coef": 2.0},
    "k1_full": {"kl_estimator": "k1_full", "kl_placement": "reward"},
    "exact_full": {"kl_estimator": "exact_full", "kl_placement": "reward"},
    "exact_full, loss": {"kl_estimator": "exact_full", "kl_placement": "loss"},
}
SETTINGS: dict[str, Any] = {
    "kl_coef": 1.0,
    "min_p": 0.1,
    "top_k": 50,
    "lr_decay": "constant",
    "report_to": (),
    "save_every": 0,
    "sample_every": 0,
}
KEYS = {
    "reward": "reward/raw",
    "kl": "kl/mean",
    "kl_support": "kl/support",
    "kl_all_ids": "kl/exact",
    "kl_off_support": "kl/off_support",
    "distinct_2": "diversity/distinct_2",
    "well_formed": "grammar/well_formed",
    "update_s": "time/update_s",
    "step_s": "time/step_s",
}


def half(prompts: list[str], completions: list[str], trainer_state: Any, **_: Any) -> list[float]:
    """Alliteration in the first half of the run, nothing in the second."""
    if trainer_state.global_step > trainer_state.max_steps // 2:
        return [0.0] * len(completions)
    return list(alliteration(prompts, completions))


def train_once(penalty: str, seed: int, options: dict[str, Any]) -> dict[str, Any]:
    """One run; its numbers per step."""
    steps = Steps()
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            **SETTINGS | PENALTIES[penalty] | options, reward=(f"{__file__}:half",), seed=seed, output=f"{folder}/run"
        )
        run_steps(set_up(config, callbacks=[steps]))
    return {name: [row[key] for row in steps.metrics] for name, key in KEYS.items()}


def at_rest(values: list[float], last: int) -> float:
    """The mean of the five steps that end with step `last`."""
    return statistics.fmean(values[last - 5 : last])


def summary(results: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Means over the last five steps with the reward and the last five without it, over seeds."""
    found: dict[str, Any] = {}
    for penalty, runs in results.items():
        num_steps = len(runs[0]["reward"])
        for phase, last in (("rewarded", num_steps // 2), ("not rewarded", num_steps)):
            rows = {name: [round(at_rest(run[name], last), 3) for run in runs] for name in KEYS}
            found[f"{penalty}, {phase}"] = rows
    return found


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--seeds", type=int, nargs="*", default=[0, 1])
    p.add_argument("--penalties", nargs="*", default=list(PENALTIES), choices=list(PENALTIES))
    p.add_argument("--steps", type=int, default=40)
    p.add_argument("--prompts-per-step", type=int, default=8)
    p.add_argument("--generator", default="auto")
    runs(p.parse_args())


def runs(options: argparse.Namespace) -> None:
    """All penalties with one seed, then with the next; writes what is known after each run, and goes on from there if
    it was stopped."""
    names = ("steps", "prompts_per_step", "generator")
    changed = {name: getattr(options, name) for name in names}
    job, path = SETTINGS | changed, RESULTS / "cpu" / "off_support.json"
    results: dict[str, list[Any]] = {}
    if path.exists() and (before := json.loads(path.read_text()))["job"] == job:
        results = before["runs"]
    for i, seed in enumerate(options.seeds):
        for penalty in options.penalties:
            done = results.setdefault(penalty, [])
            if len(done) > i:
                continue
            done.append(run_alone(train_once, penalty, seed, changed))
            print(seed, summary({penalty: done[-1:]}), flush=True)
            known = {name: found for name, found in results.items() if found}
            write(path, {"job": job, "seeds": options.seeds[: i + 1], "summary": summary(known), "runs": known})


if __name__ == "__main__":
    main()
