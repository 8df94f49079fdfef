"""The table of `fastkl eval`: a row for each measure, a column for each model, and the paired differences."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

from fastkl.evaluation.evaluate import Evaluation
from fastkl.evaluation.measures import mean_and_error
from fastkl.report.metrics import METRICS
from fastkl.report.numbers import number, percent


def differences(found: Mapping[str, Evaluation], first: str) -> dict[str, dict[str, tuple[float, float | None]]]:
    """By model and measure (mean difference from the first model, its standard error), paired by prompt.

    A prompt's difference is taken first, so what all models find hard about it cancels.
    """
    base = found[first].per_prompt
    return {
        name: {
            f"eval/{measure}": mean_and_error([a - b for a, b in zip(values, base[measure], strict=True)])
            for measure, values in evaluation.per_prompt.items()
            if len(values) == len(base.get(measure, ())) > 0
        }
        for name, evaluation in found.items()
        if name != first
    }


def as_table(found: Mapping[str, Evaluation], first: str) -> str:
    """The table as text; below it the differences from the first model, where there are several."""
    names = list(found)
    keys = list(dict.fromkeys(key for evaluation in found.values() for key in evaluation.metrics))
    rows = [["", *short_names(names)]]
    for key, label, write in measures(keys):
        metrics = [evaluation.metrics for evaluation in found.values()]
        cells = [(m.get(key), m.get(f"eval_error/{key.removeprefix('eval/')}")) for m in metrics]
        rows.append([label, *(cell(value, error, write) for value, error in cells)])
    lines = aligned(rows)
    compared = differences(found, first)
    if compared:
        rows = [["", *short_names(names)[1:]]]
        for key, label, write in measures(keys):
            if any(key in of_model for of_model in compared.values()):
                cells = [of_model.get(key, (None, None)) for of_model in compared.values()]
                rows.append([label, *(cell(value, error, write, sign="+") for value, error in cells)])
        lines += ["", f"Difference from {short_names(names)[0]}, paired by prompt:", *aligned(rows)]
    return "\n".join(lines)


def measures(keys: Sequence[str]) -> list[tuple[str, str, Callable[[float], str]]]:
    """(key, label, how it is written) of the measures among the keys, in the order of the table of metrics."""
    return [
        (key, label.removeprefix("held-out "), exact_percent if metric.write is percent else metric.write)
        for metric in METRICS
        if metric.key.startswith("eval/")
        for key, label in metric.labels(keys).items()
    ]


def exact_percent(share: float) -> str:
    """A share in percent, with the decimal that a standard error needs."""
    return f"{100 * share:.1f} %"


def cell(value: float | None, error: float | None, write: Callable[[float], str] = number, sign: str = "") -> str:
    """A number with its standard error."""
    if value is None:
        return "–"
    written = ("+" if sign and value >= 0 else "") + write(value)
    return written if error is None else f"{written} ± {write(error)}"


def short_names(names: Sequence[str]) -> list[str]:
    """The names without the folder that all of them are in."""
    folders = [os.path.dirname(name) for name in names]
    if len(names) < 2 or not all(folders) or len({os.path.isabs(name) for name in names}) == 2:
        return list(names)
    shared = os.path.commonpath(folders)
    return [os.path.relpath(name, shared) for name in names] if shared else list(names)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The rows with columns of one width, names to the left and numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in rows
    ]
