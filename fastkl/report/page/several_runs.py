"""What the page says about several runs: the opening sentence, the table, the overlaid curves, where each ended.

In: several `RunFiles`. Out: plain dicts and markup for page.html. Runs that differ in the seed alone are one
group, with one line, one colour and one row: their mean, with what it is worth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from markupsafe import Markup

from fastkl.report import metrics
from fastkl.report.charts import frontier_chart, share_bars
from fastkl.report.metrics import Metric
from fastkl.report.numbers import duration, number, percent
from fastkl.report.page.one_run import FRONTIER_SIZES, metric_chart
from fastkl.report.page.run_files import RunFiles
from fastkl.report.page.tables import ratio, setting, setting_names, shown
from fastkl.report.svg import NUM_COLOURS, Series

WELL_FORMED = 0.9  # what the opening sentence calls text that stayed intact


def title(runs: Sequence[RunFiles]) -> str:
    """What is compared."""
    varied = differing(runs)
    return f"{len(runs)} runs compared" + (f" by {' and '.join(varied)}" if 0 < len(varied) <= 2 else "")


def differing(runs: Sequence[RunFiles]) -> list[str]:
    """Names of the settings in which the runs differ, the output folder apart."""
    return [name for name in setting_names(runs) if len({setting(run.config.get(name)) for run in runs}) > 1]


@dataclass(frozen=True, slots=True)
class Seeds:
    """Runs with the same settings but for the seed; often a single one."""

    label: str
    runs: tuple[RunFiles, ...]

    def has(self, key: str) -> bool:
        """Whether every run has the metric."""
        return all(run.has(key) for run in self.runs)

    def mean(self, value: Callable[[RunFiles], float]) -> float:
        """The value's mean over the runs."""
        return fmean(map(value, self.runs))

    def end(self, key: str) -> float:
        """The metric at the end of the runs: the mean over their last steps, a tenth of them."""
        return self.mean(lambda run: run.means(key)[1])

    def steps(self) -> list[float]:
        """Those that all runs have."""
        return sorted(set.intersection(*(set(run.step_numbers()) for run in self.runs)))

    def series(self, key: str) -> list[list[float]]:
        """The metric at `steps`, of each run."""
        found = [dict(zip(run.step_numbers(), run.series(key), strict=True)) for run in self.runs]
        return [[run[step] for step in self.steps()] for run in found]

    def line(self, key: str, colour: int, metric: Metric | None = None) -> Series:
        """The mean over the runs at every step that all have; the band is one standard deviation.

        metric: the key's, where it may be a sparse one.
        """
        lines = [run.line(metric, key) if metric else (run.step_numbers(), run.series(key)) for run in self.runs]
        found = [dict(zip(*line, strict=True)) for line in lines]
        steps = sorted(set.intersection(*map(set, found)))
        columns = [[run[step] for run in found] for step in steps]
        spread = list(map(deviation, columns)) if len(self.runs) > 1 else ()
        return Series(self.label, steps, [fmean(column) for column in columns], colour, spread)


def deviation(values: Sequence[float]) -> float:
    """The standard deviation, with n - 1; NaN where a value is none."""
    return stdev(values) if math.isfinite(sum(values)) else math.nan


def by_seed(runs: Sequence[RunFiles]) -> list[Seeds]:
    """The runs in groups that differ in the seed alone, in the order of their first members."""
    varied = differing(runs)
    others = [name for name in varied if name != "seed"]
    found: dict[tuple[str, ...], list[RunFiles]] = {}
    for run in runs:
        key = tuple(setting(run.config.get(name)) for name in others)
        found.setdefault(key if "seed" in varied else (str(run.folder),), []).append(run)
    return [Seeds(_label(others, members), tuple(members)) for members in found.values()]


def _label(names: Sequence[str], members: Sequence[RunFiles]) -> str:
    if len(members) == 1:
        return members[0].label
    known = {"kl_coef": "β"}
    config = members[0].config
    parts = [f"{known.get(name, name)}\u00a0=\u00a0{setting(config.get(name))}" for name in names]
    return ", ".join([*parts, f"{len(members)} seeds"])


def lead(runs: Sequence[Seeds]) -> Markup:
    """Who won, and at what cost to the text."""

    def reward(run: Seeds) -> float:
        return run.end("reward/raw")

    scored = [run for run in runs if run.has("reward/raw")]
    if not scored:
        return Markup("")
    best = max(scored, key=reward)
    best_form = best.end("grammar/well_formed")
    cost = f", with {percent(best_form)} of its sentences well formed" if math.isfinite(best_form) else ""
    text = Markup("The highest reward, <b>{}</b>, is that of <b>{}</b>{}.")
    parts = [text.format(number(reward(best)), best.label, cost)]
    intact = [run for run in scored if run.end("grammar/well_formed") >= WELL_FORMED]
    if intact and max(intact, key=reward) is not best:
        kept = max(intact, key=reward)
        text = Markup(
            "Of the runs that keep at least {} of their sentences well formed, <b>{}</b> has the highest: <b>{}</b>."
        )
        parts.append(text.format(percent(WELL_FORMED), kept.label, number(reward(kept))))
    return Markup(" ").join(parts)


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the table of runs."""

    heading: str
    value: Callable[[RunFiles], float]
    write: Callable[[float], str] = number

    def cell(self, run: Seeds) -> str:
        """The value; of several seeds the mean and its standard error."""
        values = [self.value(one) for one in run.runs]
        if len(set(values)) == 1 or not math.isfinite(sum(values)):
            return shown(fmean(values), self.write)
        return f"{self.write(fmean(values))} ± {self.write(deviation(values) / math.sqrt(len(values)))}"


def comparison(runs: Sequence[Seeds]) -> dict[str, Any]:
    """The table: a row per run, each column from the last step unless it says otherwise."""
    columns = [column for metric in metrics.METRICS if metric.card for column in _columns(metric)]
    columns += [
        Column("steps", lambda run: len(run.steps), "{:.0f}".format),
        Column("wall time", lambda run: run.total("time/step_s"), duration),
    ]
    rows: list[dict[str, Any]] = [
        {"label": run.label, "colour": index % NUM_COLOURS, "cells": [column.cell(run) for column in columns]}
        for index, run in enumerate(runs)
    ]
    kept = [i for i in range(len(columns)) if any(row["cells"][i] != "–" for row in rows)]
    for row in rows:
        row["cells"] = [row["cells"][i] for i in kept]
    intro = "At the last step of each run; the speed is the median."
    if any(len(run.runs) > 1 for run in runs):
        intro += " Of several seeds: the mean and its standard error."
    return {"intro": intro, "columns": ["run", *(columns[i].heading for i in kept)], "rows": rows}


def _columns(metric: Metric) -> list[Column]:
    def value(run: RunFiles) -> float:
        key = run.key_of(metric)
        return run.median(key) if metric.summary == "median" else run.ends(key)[1]

    found = [Column(metric.heading, value, metric.write)]
    if metric.change:
        write = percent if metric.is_share else "{:.2f}×".format
        heading = "of its start" if metric.is_share else "change"
        found.append(Column(heading, lambda run: ratio(*run.ends(metric.key)), write))
    if metric.change and not metric.is_share:
        found.insert(0, Column(f"{metric.name}, first step", lambda run: run.ends(metric.key)[0], metric.write))
    return found


def frontier(runs: Sequence[Seeds]) -> dict[str, Any] | None:
    """Every run's path from the original model to its end, reward over KL."""
    usable = [(i, run, run.runs[0].kl_key) for i, run in enumerate(runs)]
    usable = [(i, run, key) for i, run, key in usable if run.has("reward/raw") and run.has(key)]
    if not usable:
        return None
    paths = [Series(run.label, run.line(key, i).y, run.line("reward/raw", i).y, i) for i, run, key in usable]
    steps = [run.steps() for _, run, _ in usable]
    heading = "Where each run ended, and how it got there"
    wide, narrow = (
        frontier_chart(paths, steps, title=heading, width=width, height=height) for width, height in FRONTIER_SIZES
    )
    intro = "Each line is a run, from the original model at the left to its last step, the dot. Up and left is better."
    return {"title": heading, "intro": intro, "wide": wide, "narrow": narrow}


def charts(runs: Sequence[Seeds]) -> list[dict[str, Any]]:
    """The same chart for all runs, one line each, of every metric that the terminal's panel shows."""
    found = [_chart(runs, metric) for metric in metrics.METRICS if metric.panel]
    found += [_shares([one for run in runs for one in run.runs], metric) for metric in metrics.METRICS if metric.whole]
    return [chart for chart in found if chart]


def _chart(runs: Sequence[Seeds], metric: Metric) -> dict[str, Any] | None:
    key = metric.exact if metric.exact and all(run.has(metric.exact) for run in runs) else metric.key
    series = [run.line(key, i, metric) for i, run in enumerate(runs) if run.has(key)]
    if not series:
        return None
    seeds = " Mean over the seeds; the band is one standard deviation." if any(line.spread for line in series) else ""
    return {"title": metric.title, "caption": metric.about + seeds, "plot": metric_chart(metric.title, metric, series)}


def _shares(runs: Sequence[RunFiles], metric: Metric) -> dict[str, Any] | None:
    totals = {
        run.label: {name: sum(v for v in values if math.isfinite(v)) for name, values in run.parts(metric)}
        for run in runs
    }
    if not any(totals.values()):
        return None
    plot = share_bars(totals, title=metric.chart)
    return {"title": metric.chart, "caption": metrics.CAPTIONS[metric.chart], "plot": plot}
