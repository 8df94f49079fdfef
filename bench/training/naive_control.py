"""The control: one training run twice, scored by fastkl and scored as most trainers score, and what each KL says.

    python bench/training/naive_control.py run [options of fastkl train]    writes bench/results/naive_control.json
    python bench/training/naive_control.py picture          draws docs/naive-control.png from it (needs chromium)

Both runs are the same `fastkl train`: the storyteller finishes stories that lack their last sentence, is paid for
alliteration and pays for every word, under top_k 20 and min_tokens 32. So it wants to end, and may not in the first 32
tokens. "support" is fastkl as it is: policy and reference are scored on the ids that could be drawn. "naive" scores
both over the whole vocabulary. The product has no switch for that: two functions of the training loop are replaced from
here, the one that says which ids could be drawn (it answers: all) and the one that stops a run whose generator and
trainer disagree (it only takes down what it would have said).
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from bench.common import ROOT, parser, read_lines, run_alone, write
from bench.training.pictures import DOCS, screenshot
from fastkl.audit.alarm import mean_and_error
from fastkl.report.page.charts import line_chart
from fastkl.report.page.svg import Series
from fastkl.training import loop

NUM_PROMPTS = 8
FIRST_STORY = 10_000_000  # seeds from here on were not in the storyteller's training
SETTINGS = {
    "--reward": ["alliteration", f"{__file__}:words"],
    "--reward-weights": ["1", "-0.3"],
    "--top-k": ["20"],
    "--min-tokens": ["32"],
    "--prompts-per-step": ["4"],
    "--steps": ["30"],
    "--lr": ["5e-4"],
    "--report-to": ["none"],
    "--save-every": ["0"],
    "--sample-every": ["0"],
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


@contextmanager
def naive_scoring() -> Iterator[list[str]]:
    """fastkl's training loop, scoring over the whole vocabulary; yields what its guard would have stopped it with."""
    from fastkl.rollout import agreement

    check, complaints = agreement.check_agreement, []

    def take_down(*args: Any) -> None:
        try:
            check(*args)
        except agreement.StaleEngineError as complaint:
            complaints.append(str(complaint))

    with (
        mock.patch.object(loop, "support_of", lambda *_: None),
        mock.patch.object(agreement, "check_agreement", take_down),
    ):
        yield complaints


def settings() -> list[str]:
    """SETTINGS as a command line; options given after them win."""
    return [part for name, values in SETTINGS.items() for part in (name, *values)]


def train_once(scorer: str, folder: str, options: list[str]) -> dict[str, Any]:
    """One run; its numbers per step."""
    from fastkl.cli import main

    prompts = Path(folder).with_suffix(".prompts.jsonl")
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in unfinished_stories()))
    command = ["train", "--prompts", str(prompts), *settings(), *options, "--output", folder]
    complaints: list[str] = []
    if scorer == "naive":
        with naive_scoring() as complaints:
            code = main(command)
    else:
        code = main(command)
    if code or (scorer == "naive" and not complaints):
        sys.exit(code or "the control was not scored naively: the loop's guard had nothing to say")
    return numbers(Path(folder)) | {"guard": complaints[0] if complaints else None}


def numbers(folder: Path) -> dict[str, Any]:
    """Per step: the KL estimate with its standard error over the step's completions, and the metrics in KEYS."""
    metrics, samples = (read_lines(folder / name) for name in ("metrics.jsonl", "samples.jsonl"))
    kls: dict[int, list[float]] = {}
    for sample in samples:
        kls.setdefault(sample["step"], []).append(sample["kl"])
    estimates = [mean_and_error(kls[row["step"]]) for row in metrics]
    last = sorted((s for s in samples if s["step"] == metrics[-1]["step"]), key=lambda s: s["reward"])
    return {
        "step": [row["step"] for row in metrics],
        "kl": [mean for mean, _ in estimates],
        "kl_error": [error for _, error in estimates],
        **{name: [row[key] for row in metrics] for name, key in KEYS.items()},
        "last_samples": [s["prompt"] + s["completion"] for s in last[:: max(1, len(last) // 3)]],  # across the rewards
    }


def run(options: list[str], result: Path) -> None:
    """Both runs, and the file."""
    with tempfile.TemporaryDirectory() as folder:
        runs = {scorer: run_alone(train_once, scorer, f"{folder}/{scorer}", options) for scorer in SCORERS}
    used = " ".join(["fastkl train", *settings(), *options]).replace(f"{ROOT}/", "")
    write(result, {"settings": used, "runs": runs})
    summary(runs)


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
    screenshot(figure, DOCS / "naive-control.png", height=505)


def main() -> None:
    p = parser(__doc__, "naive_control.json")
    p.add_argument("what", choices=("run", "picture"))
    arguments, options = p.parse_known_args()
    if arguments.what == "run":
        run(options, arguments.output)
    else:
        picture(arguments.output)


if __name__ == "__main__":
    main()
