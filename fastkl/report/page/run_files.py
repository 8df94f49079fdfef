"""Reads run folders for the report.

In: folders with metrics.jsonl and, where there are any, config.yaml and samples.jsonl. Out: one `RunFiles` each. A run
may still be going, so a half-written last line, missing keys and missing samples are accepted; a folder that holds no
run at all is an error.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

from fastkl.audit.doctor import read_config
from fastkl.audit.json_lines import is_number, json_lines, rows_of_steps
from fastkl.audit.run_checks import RunRecord, SampleTotals
from fastkl.errors import UserError
from fastkl.report.metrics import Metric, reward_names
from fastkl.report.svg import every_kth

BROWSED_STEPS, BROWSED_SAMPLES, BROWSED_CHARACTERS = 12, 64, 300
"""Of how many steps the page holds how many completions for browsing, and half of the characters of each."""


@dataclass(slots=True)
class BrowsedStep:
    """Completions of a step that the page holds for browsing: its first ones, bounded in number and length."""

    num_samples: int = 0  # of the step
    samples: list[dict[str, Any]] = field(default_factory=list)

    def add(self, row: dict[str, Any]) -> None:
        """Takes in one of the step's lines."""
        self.num_samples += 1
        if len(self.samples) < BROWSED_SAMPLES:
            self.samples.append({key: _bounded(value) for key, value in row.items()})


def _bounded(value: Any) -> Any:
    """Long texts lose their middle: of a prompt the end is shown, of a completion the beginning."""
    if not isinstance(value, str) or len(value) <= 2 * BROWSED_CHARACTERS:
        return value
    return f"{value[:BROWSED_CHARACTERS]} … {value[-BROWSED_CHARACTERS:]}"


@dataclass(frozen=True, slots=True)
class RunFiles:
    """What the page shows of one run. Every list of steps is in order and holds each step once."""

    folder: Path
    label: str  # short and unique on the page
    config: dict[str, Any]
    steps: tuple[dict[str, Any], ...]  # the lines of metrics.jsonl
    before: dict[str, Any]  # its line of step 0, an evaluation before the training; empty where there was none
    first_samples: tuple[dict[str, Any], ...]  # the first step's lines of samples.jsonl
    last_samples: tuple[dict[str, Any], ...]
    browsed: dict[int, BrowsedStep]  # completions of some steps, by step
    processes: tuple[dict[str, Any], ...]  # the lines of environment.jsonl: when and with what it was trained
    record: RunRecord | None  # for the audit; None where a line is damaged

    def series(self, key: str) -> list[float]:
        """The metric at every step, NaN where it is missing or not finite."""
        return [_number(step.get(key)) for step in self.steps]

    def step_numbers(self) -> list[float]:
        """The steps' own numbers, the x axis of most charts."""
        return [float(step["step"]) for step in self.steps]

    def values(self, key: str) -> list[float]:
        """The metric's finite values, that before the training first."""
        return [value for value in (_number(self.before.get(key)), *self.series(key)) if math.isfinite(value)]

    def line(self, metric: Metric, key: str, at: str = "") -> tuple[list[float], list[float]]:
        """Steps and values of the metric's line; of a sparse one those that were measured, from step 0.

        at: another key, whose values are wanted at the same steps.
        """
        rows: Sequence[dict[str, Any]] = self.steps
        if metric.sparse:
            rows = [row for row in (self.before, *rows) if math.isfinite(_number(row.get(key)))]
        return [float(row["step"]) for row in rows], [_number(row.get(at or key)) for row in rows]

    def has(self, key: str) -> bool:
        """Whether the metric has a number anywhere."""
        return bool(self.values(key))

    def ends(self, key: str) -> tuple[float, float]:
        """First and last finite value; NaN twice where there is none."""
        values = self.values(key)
        return (values[0], values[-1]) if values else (math.nan, math.nan)

    def means(self, key: str) -> tuple[float, float]:
        """The means over the first and over the last tenth of the finite values; NaN twice where there is none."""
        values = self.values(key)
        window = max(1, len(values) // 10)
        return (fmean(values[:window]), fmean(values[-window:])) if values else (math.nan, math.nan)

    @property
    def window(self) -> int:
        """Steps that a mean over the beginning or the end of the run takes in: a tenth of them, at least one."""
        return max(1, len(self.steps) // 10)

    def median(self, key: str) -> float:
        """The median over steps; NaN without values."""
        values = self.values(key)
        return median(values) if values else math.nan

    def total(self, key: str) -> float:
        """The sum over steps."""
        return sum(value for value in self.series(key) if math.isfinite(value))

    def parts(self, metric: Metric) -> list[tuple[str, list[float]]]:
        """A family's members at every step, and what is left of their sum (`metric.whole`) as "other"."""
        layers = [(name, self.series(key)) for key, name in metric.labels(self.keys).items() if self.has(key)]
        if layers and self.has(metric.whole):
            steps = zip(self.series(metric.whole), *(values for _, values in layers), strict=True)
            rest = [max(0.0, total - sum(v for v in values if math.isfinite(v))) for total, *values in steps]
            layers.append(("other", rest))
        return layers

    @property
    def keys(self) -> list[str]:
        """The keys of all steps."""
        return list(dict.fromkeys(key for step in (self.before, *self.steps) for key in step))

    @property
    def kl_key(self) -> str:
        """The less noisy of the two measures of the same sequence KL that this run has."""
        return "kl/exact" if self.has("kl/exact") else "kl/mean"

    def key_of(self, metric: Metric) -> str:
        """The metric's key, or that of a less noisy measure of the same quantity that this run has."""
        return metric.exact if metric.exact and self.has(metric.exact) else metric.key

    @property
    def reward_names(self) -> list[str]:
        """The reward functions, from the metrics' names."""
        return reward_names(self.keys)

    @property
    def reward_functions(self) -> list[str]:
        """The same without what they log besides, where the samples say which is which."""
        given = self.last_samples[0].get("rewards") if self.last_samples else None
        return list(given) if isinstance(given, dict) else []


def load_runs(folders: Sequence[Path]) -> list[RunFiles]:
    """Read the runs, with labels that tell them apart: by kl_coef where that does it, else by folder."""
    if not folders:
        raise UserError("report: no run folder given; name one or more, such as runs/alliteration.")
    folders = list(dict.fromkeys(Path(folder).resolve() for folder in folders))
    configs = [read_config(folder / "config.yaml") for folder in folders]
    labels = _labels(folders, configs)
    return [_load(folder, label, config) for folder, label, config in zip(folders, labels, configs, strict=True)]


def _load(folder: Path, label: str, config: dict[str, Any]) -> RunFiles:
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"report: {folder} holds no metrics.jsonl; give the --output folder of a training run.")
    damaged: list[str] = []
    metrics = list(rows_of_steps(path, damaged))
    rows = {row["step"]: row for row in metrics}
    before = rows.pop(0, {})
    if not rows:
        raise UserError(f"report: {path} holds no finished step yet; try again once the run has logged one.")
    browsed = {step: BrowsedStep() for step in every_kth(sorted(rows), BROWSED_STEPS)}
    first, last, totals = _read_samples(folder / "samples.jsonl", browsed, damaged)
    record = None if damaged else RunRecord(config, metrics, totals)
    return RunFiles(
        *(folder, label, config, tuple(rows[step] for step in sorted(rows)), before, first, last),
        {step: found for step, found in browsed.items() if found.num_samples},
        _processes(folder / "environment.jsonl"),
        record,
    )


def _processes(path: Path) -> tuple[dict[str, Any], ...]:
    """The lines of environment.jsonl; none in runs of older versions."""
    lines = json_lines(path) if path.is_file() else ()
    return tuple(line for _, line in lines if isinstance(line, dict))


def _read_samples(
    path: Path, browsed: dict[int, BrowsedStep], damaged: list[str]
) -> tuple[tuple[dict[str, Any], ...], tuple[dict[str, Any], ...], SampleTotals]:
    """The samples of the first and of the last step, and what all add up to, in one pass that holds no more, except for
    what it puts into `browsed`."""
    first: list[dict[str, Any]] = []
    last: list[dict[str, Any]] = []
    totals = SampleTotals()
    for row in rows_of_steps(path, damaged) if path.is_file() else ():
        totals.add(row)
        if row["step"] in browsed:
            browsed[row["step"]].add(row)
        if not first or row["step"] == first[0]["step"]:
            first.append(row)
        if last and row["step"] != last[0]["step"]:
            last = []
        last.append(row)
    return tuple(first), tuple(last), totals


def _labels(folders: Sequence[Path], configs: Sequence[dict[str, Any]]) -> list[str]:
    coefficients = [config.get("kl_coef") for config in configs]
    if len(folders) > 1 and all(map(is_number, coefficients)) and len(set(coefficients)) == len(folders):
        return [f"β\u00a0=\u00a0{coefficient:g}" for coefficient in coefficients]
    if len({folder.name for folder in folders}) == len(folders):
        return [folder.name or str(folder) for folder in folders]
    shared = os.path.commonpath(folders)
    return [os.path.relpath(folder, shared) for folder in folders]


def _number(value: Any) -> float:
    return float(value) if is_number(value) else math.nan
