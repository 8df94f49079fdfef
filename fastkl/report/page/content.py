"""What the report says about one run: the opening sentence, the cards, the charts, the settings and the numbers.

In: `Run`. Out: plain dicts and `Markup` for page.html. Whatever a run did not log is left out, never shown as zero.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from markupsafe import Markup

from fastkl.config.settings import TrainConfig
from fastkl.report.numbers import duration, number, percent
from fastkl.report.page.charts import Series, frontier_chart, line_chart, sparkline, stacked_shares
from fastkl.report.page.runs import Run
from fastkl.report.page.svg import every_kth

Write = Callable[[float], str]


MAX_TABLE_ROWS = 40


FRONTIER_SIZES = ((1120, 470), (400, 380))  # of the frontier, for wide and narrow pages


STAGES = {
    "generate": "time/generate_s",
    "reward": "time/reward_s",
    "score": "time/score_s",
    "update": "time/update_s",
    "sync": "time/sync_s",
}


COLUMNS: tuple[tuple[str, str, Write], ...] = (
    ("reward", "reward/raw", number),
    ("KL, nats", "kl/mean", number),
    ("policy cross entropy", "lm_cross_entropy", number),
    ("original cross entropy", "original_lm_cross_entropy", number),
    ("entropy", "entropy", number),
    ("distinct-2", "diversity/distinct_2", percent),
    ("well formed", "grammar/well_formed", percent),
    ("tokens/s", "throughput/tokens_per_second", number),
    ("step, s", "time/step_s", number),
)


def shown(value: float, write: Write = number) -> str:
    """The number as written for people, or a dash where there is none."""
    return write(value) if math.isfinite(value) else "–"


def ratio(start: float, end: float) -> float:
    """end / start; NaN where that says nothing."""
    return end / start if math.isfinite(start + end) and start > 0 else math.nan


def lead(run: Run) -> Markup:
    """The run in a sentence or three."""
    config, (start, end) = run.config, run.ends("reward/raw")
    parts = []
    if {"model", "reward", "kl_coef"} <= config.keys():
        text = Markup("<b>{}</b>, trained for <b>{}</b> with a KL penalty of <b>β = {}</b>.")
        parts.append(text.format(config["model"], setting(config["reward"]), setting(config["kl_coef"])))
    if math.isfinite(start):
        times = ratio(start, end)
        text = Markup("Mean reward went from {} to <b>{}</b>{}, at a KL of <b>{}</b> nats from the original model.")
        factor = f" ({times:.1f}×)" if math.isfinite(times) else ""
        parts.append(text.format(number(start), number(end), factor, shown(run.ends(run.kl_key)[1])))
    well_formed, (varied_start, varied) = run.ends("grammar/well_formed")[1], run.ends("diversity/distinct_2")
    if math.isfinite(well_formed):
        parts.append(Markup("<b>{}</b> of the sentences are well formed.").format(percent(well_formed)))
    if math.isfinite(ratio(varied_start, varied)):
        text = Markup("The text keeps <b>{}</b> of its first variety (distinct\u20112).")
        parts.append(text.format(percent(ratio(varied_start, varied))))
    return Markup(" ").join(parts)


def notices(run: Run) -> list[str]:
    """What a reader must know before trusting the numbers."""
    found = []
    total, done = run.config.get("steps"), run.steps[-1]["step"]
    if isinstance(total, int) and done < total:
        found.append(f"{run.label}: {done} of {total} steps done; the run is still going or was stopped.")
    skipped = run.ends("steps/skipped")[1]
    if skipped > 0:
        found.append(f"{run.label}: {skipped:.0f} steps were skipped because a loss or a gradient was not finite.")
    groups = sum(value for value in run.series("groups/skipped") if math.isfinite(value))
    if groups > 0:
        found.append(f"{run.label}: {groups:.0f} prompt groups had fewer than two scorable samples and were left out.")
    return found


def seconds(run: Run) -> float:
    """Time in all steps together."""
    return sum(value for value in run.series("time/step_s") if math.isfinite(value))


def middle(run: Run, key: str) -> float:
    """The median over steps; NaN without values."""
    values = [value for value in run.series(key) if math.isfinite(value)]
    return median(values) if values else math.nan


def cards(run: Run) -> list[dict[str, Any]]:
    """The headline numbers, from first to last step."""

    def change(what: str, key: str, write: Write, more: Callable[[float, float], str]) -> dict[str, Any]:
        start, end = run.ends(key)
        several = len(run.steps) > 1
        text = {"what": what, "start": write(start) if several else "", "end": write(end), "more": more(start, end)}
        return {**text, "spark": sparkline(run.series(key))}

    def kept(start: float, end: float) -> str:
        return f"{percent(ratio(start, end))} of the start" if math.isfinite(ratio(start, end)) else ""

    def times(start: float, end: float) -> str:
        return f"{ratio(start, end):.2f}× the start" if math.isfinite(ratio(start, end)) else "mean per completion"

    found = [
        change(what, key, write, more)
        for what, key, write, more in (
            ("Reward", "reward/raw", number, times),
            ("KL from the original", run.kl_key, number, lambda *_: "nats per completion"),
            ("Distinct-2", "diversity/distinct_2", percent, kept),
            ("Well formed", "grammar/well_formed", percent, lambda *_: "share of sentences"),
        )
        if run.has(key)
    ]
    speed = middle(run, "throughput/tokens_per_second")
    if math.isfinite(speed):
        spark = sparkline(run.series("throughput/tokens_per_second"))
        more = f"median; {shown(middle(run, 'time/step_s'))} s per step"
        found.append({"what": "Tokens per second", "start": "", "end": number(speed), "more": more, "spark": spark})
    if seconds(run):
        tokens = run.ends("tokens/generated")[1]
        more = f"{len(run.steps)} steps" + (f", {tokens:,.0f} tokens" if math.isfinite(tokens) else "")
        found.append({"what": "Wall time", "start": "", "end": duration(seconds(run)), "more": more, "spark": ""})
    return found


def frontier(run: Run) -> dict[str, Any] | None:
    """Reward against KL, a dot per step, in two shapes: for wide and for narrow pages."""
    if not (run.has("reward/raw") and run.has(run.kl_key)):
        return None
    path = Series(run.label, run.series(run.kl_key), run.series("reward/raw"))
    title = "Each step's reward and its distance from the original model"
    wide, narrow = (
        frontier_chart([path], [run.step_numbers()], title=title, width=width, height=height)
        for width, height in FRONTIER_SIZES
    )
    measured = "exact at every position, summed" if run.kl_key == "kl/exact" else "estimated from the samples"
    intro = (
        "What the reward cost: every dot is one step, its mean reward over its mean KL from the original model "
        f"({measured} over a completion). Up is better; up and to the left is better still."
    )
    return {"title": title, "intro": intro, "wide": wide, "narrow": narrow}


def charts(run: Run) -> list[dict[str, Any]]:
    """The charts over steps of one run."""

    def line(label: str, key: str, colour: int, **more: Any) -> Series:
        return Series(label, run.step_numbers(), run.series(key), colour, **more)

    def chart(title: str, caption: str, y_label: str, *lines: tuple[str, str], **more: Any) -> dict[str, Any] | None:
        series = [line(label, key, colour) for colour, (label, key) in enumerate(lines) if run.has(key)]
        if not series:
            return None
        return {"title": title, "caption": caption, "plot": line_chart(series, title=title, y_label=y_label, **more)}

    functions = [(name, f"reward/{name}") for name in run.reward_names]
    found = [
        _reward_chart(run),
        chart("KL from the original", "What the policy has moved, summed over a completion.", "nats per completion",
              ("estimate (k1)", "kl/mean"), ("exact", "kl/exact"), include_zero=True),
        _cross_entropy_chart(run),
        chart("Diversity and grammar", "Different word pairs among all; well-formed sentences among all.", "share",
              ("distinct-2", "diversity/distinct_2"), ("well formed", "grammar/well_formed"), share=True),
        chart("Entropy", "Of the policy's next-token distribution.", "nats per token", ("entropy", "entropy")),
        chart("Length", "Mean length of a completion.", "tokens",
              ("length", "completion/mean_length"), include_zero=True),
        chart("Reward functions", "Each function's own mean, before weights.", "mean", *functions)
        if len(functions) > 1 else None,
        _time_chart(run),
        chart("Speed", "Completion tokens over the whole step's time.", "tokens per second",
              ("speed", "throughput/tokens_per_second"), include_zero=True),
        chart("Generator against trainer", "Mean gap between their log-probs of the same tokens.", "nats per token",
              ("gap", "mismatch/mean_abs_logprob"), include_zero=True),
    ]  # fmt: skip
    return [chart for chart in found if chart]


def _reward_chart(run: Run) -> dict[str, Any] | None:
    if not run.has("reward/raw"):
        return None
    steps = run.step_numbers()
    spread = run.series("reward/std") if run.has("reward/std") else ()
    series = [Series("reward", steps, run.series("reward/raw"), 0, spread=spread)]
    if run.has("reward/penalized"):
        series.append(Series("after the KL penalty", steps, run.series("reward/penalized"), 1))
    caption = "Mean per completion; the band is one standard deviation." if spread else "Mean per completion."
    return {"title": "Reward", "caption": caption, "plot": line_chart(series, title="Reward", y_label="reward")}


def _cross_entropy_chart(run: Run) -> dict[str, Any] | None:
    policy, original = run.series("lm_cross_entropy"), run.series("original_lm_cross_entropy")
    if not (run.has("lm_cross_entropy") and run.has("original_lm_cross_entropy")):
        return None
    series = [
        Series("under the policy", run.step_numbers(), policy, 0),
        Series("under the original", run.step_numbers(), original, 1, filled=(policy,)),
    ]
    title, caption = "Cross entropies", "Of the completions, under both models; the area between is the KL per token."
    return {"title": title, "caption": caption, "plot": line_chart(series, title=title, y_label="nats per token")}


def stage_times(run: Run) -> list[tuple[str, list[float]]]:
    """Seconds per step in each stage, and what is left of the step as "other"."""
    layers = [(name, run.series(key)) for name, key in STAGES.items() if run.has(key)]
    if layers and run.has("time/step_s"):
        named = [sum(v for v in step if math.isfinite(v)) for step in zip(*(part for _, part in layers), strict=True)]
        rest = [max(0.0, total - known) for total, known in zip(run.series("time/step_s"), named, strict=True)]
        layers.append(("other", rest))
    return layers


def _time_chart(run: Run) -> dict[str, Any] | None:
    layers = stage_times(run)
    if not layers:
        return None
    title, caption = "Where the time goes", "Each stage's share of a step."
    return {"title": title, "caption": caption, "plot": stacked_shares(layers, run.step_numbers(), title=title)}


def setting(value: Any) -> str:
    """A setting as it would be typed."""
    if isinstance(value, list | tuple):
        return ", ".join(setting(part) for part in value) or "none"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def settings(runs: Sequence[Run]) -> dict[str, Any] | None:
    """The configuration: for one run what differs from the defaults is marked; for several what differs among them."""
    names = list(dict.fromkeys(name for run in runs for name in run.config if name not in ("output", "resume")))
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


def number_table(run: Run, title: str) -> dict[str, Any]:
    """The metrics as a table, for readers without the charts: every k-th step, at most MAX_TABLE_ROWS."""
    columns = [(name, run.series(key), write) for name, key, write in COLUMNS if run.has(key)]
    rows = [
        [f"{run.steps[index]['step']}", *(shown(values[index], write) for _, values, write in columns)]
        for index in every_kth(list(range(len(run.steps))), MAX_TABLE_ROWS)
    ]
    return {"title": title, "columns": ["step", *(name for name, _, _ in columns)], "rows": rows}
