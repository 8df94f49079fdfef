"""The page's tables of settings and numbers, and how both are written. What a run did not log is a dash or left out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from fastkl.config.settings import TrainConfig
from fastkl.report import metrics
from fastkl.report.metrics import Metric
from fastkl.report.numbers import number, percent
from fastkl.report.page.run_files import RunFiles
from fastkl.report.svg import every_kth

MAX_TABLE_ROWS = 40


def shown(value: float, write: Callable[[float], str] = number) -> str:
    """The number as written for people, or a dash where there is none."""
    return write(value) if math.isfinite(value) else "–"


def ratio(start: float, end: float) -> float:
    """end / start; NaN where that says nothing."""
    return end / start if math.isfinite(start + end) and start > 0 else math.nan


def change(metric: Metric, start: float, end: float) -> str:
    """The last value in terms of the first: 75 % for shares, else 1.20×; a dash where that says nothing."""
    return shown(ratio(start, end), percent if metric.is_share else "{:.2f}×".format)


def setting(value: Any) -> str:
    """A setting as it would be typed."""
    if isinstance(value, list | tuple):
        return ", ".join(setting(part) for part in value) or "none"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def setting_names(runs: Sequence[RunFiles]) -> list[str]:
    """The settings of all runs, but for those that say where a run is and not what it does."""
    return list(dict.fromkeys(name for run in runs for name in run.config if name not in ("output", "resume")))


def settings(runs: Sequence[RunFiles]) -> dict[str, Any] | None:
    """The configuration: for one run what differs from the defaults is marked; for several what differs among them."""
    names = setting_names(runs)
    if not names:
        return None
    defaults = {field.name: setting(field.default) for field in dataclasses.fields(TrainConfig)}
    rows = []
    for name in names:
        values = [setting(run.config[name]) if name in run.config else "–" for run in runs]
        changed = len(set(values)) > 1 if len(runs) > 1 else defaults.get(name, values[0]) != values[0]
        rows.append({"name": name, "values": values, "changed": changed})
    if len(runs) > 1:
        intro = "What differs among the runs stands first, in bold."
        rows.sort(key=lambda row: not row["changed"])
    else:
        intro = "What differs from the defaults is in bold."
    return {"intro": intro, "columns": [run.label for run in runs], "rows": rows}


def facts(run: RunFiles) -> list[tuple[str, str]]:
    """When, where and with what the run was trained, by the processes that worked on it; empty for older runs."""
    if not run.processes:
        return []
    first, last = run.processes[0], run.processes[-1]
    versions = last["versions"] if isinstance(last.get("versions"), dict) else {}
    found = [
        ("started", str(first.get("started", "")).replace("T", " ").replace("+00:00", " UTC")),
        ("last resumed", _resumed(last) if len(run.processes) > 1 else ""),
        ("machine", str(last.get("machine", ""))),
        ("numbers", str(last.get("dtype", ""))),
        ("versions", ", ".join(f"{name} {number_of}" for name, number_of in versions.items())),
        ("commit of fastkl", str(last.get("commit") or "")),
        ("memory", _memory(run)),
    ]
    return [(name, text) for name, text in found if text]


def _resumed(process: dict[str, Any]) -> str:
    when = str(process.get("started", "")).replace("T", " ").replace("+00:00", " UTC")
    return f"{when}, at step {process.get('first_step', '?')}"


def _memory(run: RunFiles) -> str:
    parts = [(run.ends("memory/peak_rss_gb")[1], "GB at most"), (run.ends("memory/peak_gpu_gb")[1], "GB on the GPU")]
    return ", ".join(f"{number(size)} {of}" for size, of in parts if math.isfinite(size))


def number_table(run: RunFiles, title: str) -> dict[str, Any]:
    """The terminal's metrics as a table, for readers without the charts: every k-th step, at most MAX_TABLE_ROWS."""
    columns = [metric for metric in metrics.METRICS if (metric.panel or metric.plain) and run.has(metric.key)]
    series = [run.series(metric.key) for metric in columns]
    rows = [
        [f"{run.steps[i]['step']}", *(shown(s[i], m.write) for m, s in zip(columns, series, strict=True))]
        for i in every_kth(list(range(len(run.steps))), MAX_TABLE_ROWS)
    ]
    return {"title": title, "columns": ["step", *(metric.heading for metric in columns)], "rows": rows}
