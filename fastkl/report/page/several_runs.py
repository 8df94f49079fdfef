"""What the page says about several runs: the opening sentence, the table, the overlaid curves, where each ended.

In: several `RunFiles`. Out: plain dicts and markup for page.html.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from markupsafe import Markup

from fastkl.report import metrics
from fastkl.report.charts import frontier_chart, share_bars
from fastkl.report.metrics import Metric
from fastkl.report.numbers import duration, number, percent
from fastkl.report.page.one_run import FRONTIER_SIZES, metric_chart
from fastkl.report.page.run_files import RunFiles
from fastkl.report.page.tables import change, setting, setting_names, shown
from fastkl.report.svg import NUM_COLOURS, Series

WELL_FORMED = 0.9  # what the opening sentence calls text that stayed intact


def title(runs: Sequence[RunFiles]) -> str:
    """What is compared."""
    varied = differing(runs)
    return f"{len(runs)} runs compared" + (f" by {' and '.join(varied)}" if 0 < len(varied) <= 2 else "")


def differing(runs: Sequence[RunFiles]) -> list[str]:
    """Names of the settings in which the runs differ, the output folder apart."""
    return [name for name in setting_names(runs) if len({setting(run.config.get(name)) for run in runs}) > 1]


def lead(runs: Sequence[RunFiles]) -> Markup:
    """Who won, and at what cost to the text."""

    def reward(run: RunFiles) -> float:
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


Cell = Callable[[RunFiles], str]


def comparison(runs: Sequence[RunFiles]) -> dict[str, Any]:
    """The table: a row per run, each column from the last step unless it says otherwise."""
    columns = [column for metric in metrics.METRICS if metric.card for column in _columns(metric)]
    columns += [
        ("steps", lambda run: str(len(run.steps))),
        ("wall time", lambda run: duration(run.total("time/step_s"))),
    ]
    rows: list[dict[str, Any]] = [
        {"label": run.label, "colour": index % NUM_COLOURS, "cells": [cell(run) for _, cell in columns]}
        for index, run in enumerate(runs)
    ]
    kept = [i for i in range(len(columns)) if any(row["cells"][i] != "–" for row in rows)]
    for row in rows:
        row["cells"] = [row["cells"][i] for i in kept]
    intro = "At the last step of each run; the speed is the median."
    return {"intro": intro, "columns": ["run", *(columns[i][0] for i in kept)], "rows": rows}


def _columns(metric: Metric) -> list[tuple[str, Cell]]:
    def value(run: RunFiles) -> str:
        key = run.key_of(metric)
        return shown(run.median(key) if metric.summary == "median" else run.ends(key)[1], metric.write)

    found: list[tuple[str, Cell]] = [(metric.heading, value)]
    if metric.change:
        heading = "of its start" if metric.is_share else "change"
        found.append((heading, lambda run: change(metric, *run.ends(metric.key))))
    if metric.change and not metric.is_share:
        first = (f"{metric.name}, first step", lambda run: shown(run.ends(metric.key)[0], metric.write))
        found.insert(0, first)
    return found


def frontier(runs: Sequence[RunFiles]) -> dict[str, Any] | None:
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


def charts(runs: Sequence[RunFiles]) -> list[dict[str, Any]]:
    """The same chart for all runs, one line each, of every metric that the terminal's panel shows."""
    found = [_chart(runs, metric) for metric in metrics.METRICS if metric.panel]
    found += [_shares(runs, metric) for metric in metrics.METRICS if metric.whole]
    return [chart for chart in found if chart]


def _chart(runs: Sequence[RunFiles], metric: Metric) -> dict[str, Any] | None:
    key = metric.exact if metric.exact and all(run.has(metric.exact) for run in runs) else metric.key
    series = [Series(run.label, run.step_numbers(), run.series(key), i) for i, run in enumerate(runs) if run.has(key)]
    if not series:
        return None
    return {"title": metric.title, "caption": metric.about, "plot": metric_chart(metric.title, metric, series)}


def _shares(runs: Sequence[RunFiles], metric: Metric) -> dict[str, Any] | None:
    totals = {
        run.label: {name: sum(v for v in values if math.isfinite(v)) for name, values in run.parts(metric)}
        for run in runs
    }
    if not any(totals.values()):
        return None
    plot = share_bars(totals, title=metric.chart)
    return {"title": metric.chart, "caption": metrics.CAPTIONS[metric.chart], "plot": plot}
