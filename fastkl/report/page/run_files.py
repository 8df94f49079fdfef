"""Reads run folders for the report.

In: folders with metrics.jsonl and, where there are any, config.yaml and samples.jsonl. Out: one `RunFiles` each. A run
may still be going, so a half-written last line, missing keys and missing samples are accepted; a folder that holds no
run at all is an error.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from fastkl.audit.doctor import read_config
from fastkl.audit.json_lines import is_number, rows_of_steps
from fastkl.audit.run_checks import RunRecord, SampleTotals
from fastkl.errors import UserError
from fastkl.report.metrics import Metric, reward_names

LARGEST = 1e100  # what is beyond is a gap, like inf: sums of such numbers overflow, and so do axes


@dataclass(frozen=True, slots=True)
class RunFiles:
    """What the page shows of one run. Every list of steps is in order and holds each step once."""

    folder: Path
    label: str  # short and unique on the page
    config: dict[str, Any]
    steps: tuple[dict[str, Any], ...]  # the lines of metrics.jsonl
    first_samples: tuple[dict[str, Any], ...]  # the first step's lines of samples.jsonl
    last_samples: tuple[dict[str, Any], ...]
    record: RunRecord | None  # for the audit; None where a line is damaged

    def series(self, key: str) -> list[float]:
        """The metric at every step, NaN where it is missing or not finite."""
        return [_number(step.get(key)) for step in self.steps]

    def step_numbers(self) -> list[float]:
        """The steps' own numbers, the x axis of most charts."""
        return [float(step["step"]) for step in self.steps]

    def has(self, key: str) -> bool:
        """Whether the metric has a number anywhere."""
        return any(math.isfinite(value) for value in self.series(key))

    def ends(self, key: str) -> tuple[float, float]:
        """First and last finite value; NaN twice where there is none."""
        values = [value for value in self.series(key) if math.isfinite(value)]
        return (values[0], values[-1]) if values else (math.nan, math.nan)

    def median(self, key: str) -> float:
        """The median over steps; NaN without values."""
        values = [value for value in self.series(key) if math.isfinite(value)]
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
        return list(dict.fromkeys(key for step in self.steps for key in step))

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
    if not rows:
        raise UserError(f"report: {path} holds no finished step yet; try again once the run has logged one.")
    first, last, totals = _read_samples(folder / "samples.jsonl", damaged)
    record = None if damaged else RunRecord(config, metrics, totals)
    return RunFiles(folder, label, config, tuple(rows[step] for step in sorted(rows)), first, last, record)


def _read_samples(
    path: Path, damaged: list[str]
) -> tuple[tuple[dict[str, Any], ...], tuple[dict[str, Any], ...], SampleTotals]:
    """The samples of the first and of the last step, and what all add up to, in one pass that holds no more."""
    first: list[dict[str, Any]] = []
    last: list[dict[str, Any]] = []
    totals = SampleTotals()
    for row in rows_of_steps(path, damaged) if path.is_file() else ():
        totals.add(row)
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
    return float(value) if is_number(value) and abs(value) <= LARGEST else math.nan
