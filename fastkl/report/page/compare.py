"""What the report says about several runs: the table, the overlaid curves, and where each ended.

In: several `Run`. Out: plain dicts and `Markup` for page.html.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from markupsafe import Markup

from fastkl.report.numbers import duration, number, percent
from fastkl.report.page.charts import Series, frontier_chart, line_chart, share_bars
from fastkl.report.page.content import FRONTIER_SIZES, middle, ratio, seconds, setting, shown, stage_times
from fastkl.report.page.runs import Run

WELL_FORMED = 0.9  # what the opening sentence calls text that stayed intact


def title(runs: Sequence[Run]) -> str:
    """What is compared."""
    varied = differing(runs)
    return f"{len(runs)} runs compared" + (f" by {' and '.join(varied)}" if 0 < len(varied) <= 2 else "")


def differing(runs: Sequence[Run]) -> list[str]:
    """Names of the settings in which the runs differ, the output folder apart."""
    names = dict.fromkeys(name for run in runs for name in run.config if name not in ("output", "resume"))
    return [name for name in names if len({setting(run.config.get(name)) for run in runs}) > 1]


def lead(runs: Sequence[Run]) -> Markup:
    """Who won, and at what cost to the text."""

    def reward(run: Run) -> float:
        return run.ends("reward/raw")[1]

    scored = [run for run in runs if run.has("reward/raw")]
    if not scored:
        return Markup("")
    best = max(scored, key=reward)
    best_form = best.ends("grammar/well_formed")[1]
    cost = f", with {percent(best_form)} of its sentences well formed" if math.isfinite(best_form) else ""
    text = Markup("The highest reward, <b>{}</b>, is that of <b>{}</b>{}.")
    parts = [text.format(number(reward(best)), best.label, cost)]
    intact = [run for run in scored if run.ends("grammar/well_formed")[1] >= WELL_FORMED]
    if intact and max(intact, key=reward) is not best:
        kept = max(intact, key=reward)
        text = Markup(
            "Of the runs that keep at least {} of their sentences well formed, <b>{}</b> has the highest: <b>{}</b>."
        )
        parts.append(text.format(percent(WELL_FORMED), kept.label, number(reward(kept))))
    return Markup(" ").join(parts)


def comparison(runs: Sequence[Run]) -> dict[str, Any]:
    """The table: a row per run, each column from the last step unless it says otherwise."""

    def last(key: str, write: Callable[[float], str]) -> Callable[[Run], str]:
        return lambda run: shown(run.ends(key)[1], write)

    def times(run: Run) -> str:
        return shown(ratio(*run.ends("reward/raw")), lambda value: f"{value:.2f}×")

    columns: list[tuple[str, Callable[[Run], str]]] = [
        ("reward, first step", lambda run: shown(run.ends("reward/raw")[0])),
        ("reward", last("reward/raw", number)),
        ("change", times),
        ("KL, nats", lambda run: shown(run.ends(run.kl_key)[1])),
        ("distinct-2", last("diversity/distinct_2", percent)),
        ("of its start", lambda run: shown(ratio(*run.ends("diversity/distinct_2")), percent)),
        ("well formed", last("grammar/well_formed", percent)),
        ("tokens/s", lambda run: shown(middle(run, "throughput/tokens_per_second"))),
        ("steps", lambda run: str(len(run.steps))),
        ("wall time", lambda run: duration(seconds(run))),
    ]
    rows: list[dict[str, Any]] = [
        {"label": run.label, "colour": index % 6, "cells": [cell(run) for _, cell in columns]}
        for index, run in enumerate(runs)
    ]
    kept = [i for i in range(len(columns)) if any(row["cells"][i] != "–" for row in rows)]
    for row in rows:
        row["cells"] = [row["cells"][i] for i in kept]
    intro = "At the last step of each run; tokens per second are the median."
    return {"intro": intro, "columns": ["run", *(columns[i][0] for i in kept)], "rows": rows}


def frontier(runs: Sequence[Run]) -> dict[str, Any] | None:
    """Every run's path from the original model to its end, reward over KL."""
    usable = [(i, run) for i, run in enumerate(runs) if run.has("reward/raw") and run.has(run.kl_key)]
    if not usable:
        return None
    paths = [Series(run.label, run.series(run.kl_key), run.series("reward/raw"), i) for i, run in usable]
    steps = [run.step_numbers() for _, run in usable]
    heading = "Where each run ended, and how it got there"
    wide, narrow = (
        frontier_chart(paths, steps, title=heading, width=width, height=height) for width, height in FRONTIER_SIZES
    )
    intro = "Each line is a run, from the original model at the left to its last step, the dot. Up and left is better."
    return {"title": heading, "intro": intro, "wide": wide, "narrow": narrow}


def charts(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The same chart for all runs, one line each."""

    def chart(heading: str, caption: str, y_label: str, key: str, **more: Any) -> dict[str, Any] | None:
        series = [
            Series(run.label, run.step_numbers(), run.series(key), index)
            for index, run in enumerate(runs)
            if run.has(key)
        ]
        if not series:
            return None
        return {
            "title": heading,
            "caption": caption,
            "plot": line_chart(series, title=heading, y_label=y_label, **more),
        }

    kl_key = "kl/exact" if all(run.has("kl/exact") for run in runs) else "kl/mean"
    found = [
        chart("Reward", "Mean per completion.", "reward", "reward/raw"),
        chart("KL from the original", "Summed over a completion.", "nats per completion", kl_key, include_zero=True),
        chart("Well-formed sentences", "Share of all sentences.", "share", "grammar/well_formed", share=True),
        chart("Distinct-2", "Different word pairs among all.", "share", "diversity/distinct_2", share=True),
        chart("Policy cross entropy", "Of the completions, under the policy.", "nats per token", "lm_cross_entropy"),
        chart("Original cross entropy", "Of the completions, under the original model.", "nats per token",
              "original_lm_cross_entropy"),
        chart("Entropy", "Of the policy's next-token distribution.", "nats per token", "entropy"),
        chart("Speed", "Completion tokens over the whole step's time.", "tokens per second",
              "throughput/tokens_per_second", include_zero=True),
        _time_chart(runs),
    ]  # fmt: skip
    return [chart for chart in found if chart]


def _time_chart(runs: Sequence[Run]) -> dict[str, Any] | None:
    totals = {
        run.label: {name: sum(v for v in values if math.isfinite(v)) for name, values in stage_times(run)}
        for run in runs
    }
    if not any(totals.values()):
        return None
    heading = "Where the time goes"
    return {"title": heading, "caption": "Each stage's share of all steps.", "plot": share_bars(totals, title=heading)}
