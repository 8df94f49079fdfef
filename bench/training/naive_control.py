"""The control: one training run twice, scored by fastkl and scored as most trainers score, and what each KL says.

    python bench/training/naive_control.py run        writes bench/results/naive_control.json
    python bench/training/naive_control.py picture    draws docs/naive-control.png from it (needs chromium)

Both runs are the same `fastkl train`: the storyteller finishes stories that lack their last sentence, is paid for
alliteration and pays for every word, under top_k 20 and min_tokens 32. So it wants to end, and may not in the first 32
tokens. "support" is fastkl as it is: policy and reference are scored on the ids that could be drawn. "naive" scores
both over the whole vocabulary. The product has no switch for that; it is set on the run, between set-up and the first
step, together with a limit that lets generator and trainer disagree.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.common import ROOT, Steps, parser, run_alone, write
from bench.training.pictures import screenshot
from fastkl.audit.alarm import mean_and_error
from fastkl.config.settings import TrainConfig
from fastkl.report.charts import line_chart
from fastkl.report.svg import Series
from fastkl.rollout.agreement import StaleEngineError, check_agreement
from fastkl.training.loop import run_steps
from fastkl.training.setup import set_up

NUM_PROMPTS = 8
FIRST_STORY = 10_000_000  # seeds from here on were not in the storyteller's training
SETTINGS: dict[str, Any] = {
    "reward": ("alliteration", f"{__file__}:words"),
    "reward_weights": (1.0, -0.3),
    "top_k": 20,
    "min_tokens": 32,
    "kl_estimator": "k1",
    "kl_placement": "reward",
    "prompts_per_step": 4,
    "steps": 30,
    "lr": 5e-4,
    "report_to": (),
    "save_every": 0,
    "sample_every": 0,
}
SCORERS = ("support", "naive")
KEYS = {
    "kl_exact_all_ids": "kl/exact",
    "kl_exact_scored": "kl/support",
    "reward": "reward/raw",
    "well_formed": "grammar/well_formed",
    "distinct_2": "diversity/distinct_2",
    "mean_length": "completion/mean_length",
    "entropy": "entropy",
    "gap": "mismatch/mean_abs_logprob",
    "alarm": "kl/alarm",
}


def words(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """How many words the completion has."""
    return [float(len(completion.split())) for completion in completions]


def unfinished_stories() -> list[str]:
    """Stories of the grammar without their last sentence."""
    from fastkl.storyteller import story

    stories = [story(FIRST_STORY + i) for i in range(NUM_PROMPTS)]
    return [" ".join(re.split(r"(?<=[.!?]) +(?=[A-Z\"])", text)[:-1]) for text in stories]


def train_once(scorer: str, folder: str, options: dict[str, Any]) -> dict[str, Any]:
    """One run; its numbers per step."""
    prompts = Path(folder).with_suffix(".prompts.jsonl")
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in unfinished_stories()))
    steps = Steps()
    run = set_up(TrainConfig(**SETTINGS | options, prompts=str(prompts), output=folder), callbacks=[steps])
    limit = run.limits.agreement_nats
    if scorer == "naive":
        all_ids = dataclasses.replace(run.objective.sampling, top_k=0, min_tokens=0)
        run.objective = dataclasses.replace(run.objective, sampling=all_ids)
        run.limits = dataclasses.replace(run.limits, agreement_nats=math.inf)
    run_steps(run)
    complaint = guard(steps.metrics[0], limit)
    if scorer == "naive" and not complaint:
        sys.exit("the control was not scored naively: the loop's guard has nothing to say")
    return numbers(steps) | {"guard": complaint}


def guard(metrics: Mapping[str, Any], limit: float) -> str | None:
    """What the training loop would have stopped a step with, had it been asked."""
    try:
        check_agreement(metrics["mismatch/mean_abs_logprob"], metrics["mismatch/max_abs_logprob"], limit, step=1)
    except StaleEngineError as complaint:
        return str(complaint)
    return None


def numbers(steps: Steps) -> dict[str, Any]:
    """Per step: the KL estimate with its standard error over the step's completions, and the metrics in KEYS."""
    estimates = [mean_and_error([sample["kl"] for sample in samples]) for samples in steps.samples]
    last = sorted(steps.samples[-1], key=lambda s: s["reward"])
    return {
        "step": [row["step"] for row in steps.metrics],
        "kl": [mean for mean, _ in estimates],
        "kl_error": [error for _, error in estimates],
        **{name: [row[key] for row in steps.metrics] for name, key in KEYS.items()},
        "last_samples": [s["prompt"] + s["completion"] for s in last[:: max(1, len(last) // 3)]],  # across the rewards
    }


def summary(runs: dict[str, Any]) -> None:
    """The last step of each run, and how far below zero its estimate has been, in standard errors."""
    for scorer, r in runs.items():
        lowest = min((kl / error for kl, error in zip(r["kl"], r["kl_error"], strict=True) if error), default=0.0)
        cells = [f"{name} {r[name][-1]:.3g}" for name in ("kl", "kl_error", *KEYS)]
        print(f"{scorer}: lowest estimate {lowest:.1f} standard errors; last step: {', '.join(cells)}")


def picture(result: Path) -> None:
    """The estimate of both runs, step by step, the naive run's true distance, and the line that no KL crosses."""
    runs = json.loads(result.read_text())["runs"]
    support, naive = (runs[scorer] for scorer in SCORERS)
    lines = [
        Series("fastkl: estimate", support["step"], support["kl"], 0, spread=[2 * e for e in support["kl_error"]]),
        Series("naive: estimate", naive["step"], naive["kl"], 1, spread=[2 * e for e in naive["kl_error"]]),
        Series("naive: true KL, all ids", naive["step"], naive["kl_exact_all_ids"], 4),
        Series("no KL is below zero", [1, max(support["step"])], [0.0, 0.0], 3),
    ]
    chart = line_chart(
        lines, title="KL estimate", y_label="nats per completion", include_zero=True, width=860, height=400
    )
    caption = (
        "The KL of policy and reference, estimated from the samples, in two runs that differ in the scoring alone. "
        "Bands: two standard errors."
    )
    title = "The same run, scored twice: top_k 20, min_tokens 32"
    figure = f"<figure><figcaption><h3>{title}</h3><p>{caption}</p></figcaption>{chart}</figure>"
    screenshot(figure, ROOT / "docs" / "naive-control.png", height=505)


def main() -> None:
    p = parser(__doc__, "naive_control.json")
    p.add_argument("what", choices=("run", "picture"))
    p.add_argument("--steps", type=int, default=SETTINGS["steps"])
    p.add_argument("--generator", default="auto")
    p.add_argument("--seed", type=int, default=0)
    given = p.parse_args()
    if given.what == "picture":
        picture(given.output)
        return
    options = {"steps": given.steps, "generator": given.generator, "seed": given.seed}
    with tempfile.TemporaryDirectory() as folder:
        runs = {scorer: run_alone(train_once, scorer, f"{folder}/{scorer}", options) for scorer in SCORERS}
    used = SETTINGS | options | {"reward": ("alliteration", "bench/training/naive_control.py:words")}
    write(given.output, {"settings": used, "runs": runs})
    summary(runs)


if __name__ == "__main__":
    main()
