"""What the page says about one run: the opening sentence, what to know first, the cards, the charts.

In: `RunFiles`. Out: plain dicts and markup for page.html. Whatever a run did not log is left out, never shown as zero.
"""

from __future__ import annotations

import math
from typing import Any

from markupsafe import Markup

from fastkl.report import metrics
from fastkl.report.charts import frontier_chart, line_chart, sparkline, stacked_shares
from fastkl.report.metrics import Metric
from fastkl.report.numbers import duration, number, percent
from fastkl.report.page.run_files import RunFiles
from fastkl.report.page.tables import change, ratio, setting, shown
from fastkl.report.svg import Series, Svg

SAME_AXIS = 10.0  # reward functions whose values differ by more have axes of their own


FRONTIER_SIZES = ((1120, 470), (400, 380))  # of the frontier, for wide and narrow pages


def lead(run: RunFiles) -> Markup:
    """The run in a sentence or four."""
    config, (start, end) = run.config, run.means("reward/raw")
    parts = []
    if {"model", "reward", "kl_coef"} <= config.keys():
        text = Markup("<b>{}</b>, trained for <b>{}</b> with a KL penalty of <b>β = {}</b>.")
        parts.append(text.format(config["model"], setting(config["reward"]), setting(config["kl_coef"])))
    if math.isfinite(start):
        times = ratio(start, end)
        text = Markup("Mean reward went from {} to <b>{}</b>{}, at a KL of <b>{}</b> nats from the original model{}.")
        factor = f" ({times:.1f}×)" if math.isfinite(times) else ""
        over = f" (means of the first and the last {run.window} steps)" if run.window > 1 else ""
        parts.append(text.format(number(start), number(end), factor, shown(run.means(run.kl_key)[1]), over))
    held_start, held = run.ends("eval/reward")
    if held_start != held and math.isfinite(held):
        text = Markup("The reward on held-out prompts went from {} to <b>{}</b>.")
        parts.append(text.format(number(held_start), number(held)))
    well_formed, (varied_start, varied) = run.means("grammar/well_formed")[1], run.means("diversity/distinct_2")
    if math.isfinite(well_formed):
        parts.append(Markup("<b>{}</b> of the sentences are well formed.").format(percent(well_formed)))
    if math.isfinite(ratio(varied_start, varied)):
        text = Markup("The text keeps <b>{}</b> of its first variety (distinct\u20112).")
        parts.append(text.format(percent(ratio(varied_start, varied))))
    return Markup(" ").join(parts)


def notices(run: RunFiles) -> list[str]:
    """What a reader must know before trusting the numbers."""
    found = []
    total, done = run.config.get("steps"), run.steps[-1]["step"]
    if isinstance(total, int) and done < total:
        found.append(f"{run.label}: {done} of {total} steps done; the run is still going or was stopped.")
    if run.config.get("fork"):
        found.append(f"{run.label}: forked from {run.config['fork']}, whose steps are its first ones.")
    skipped = run.ends("steps/skipped")[1]
    if skipped > 0:
        found.append(f"{run.label}: {skipped:.0f} steps were skipped because a loss or a gradient was not finite.")
    groups = run.total("groups/skipped")
    if groups > 0:
        found.append(f"{run.label}: {groups:.0f} prompt groups had fewer than two scorable samples and were left out.")
    return found


def cards(run: RunFiles) -> list[dict[str, Any]]:
    """The headline numbers, from first to last step."""
    found = [_card(run, metric) for metric in metrics.METRICS if metric.card and run.has(run.key_of(metric))]
    if seconds := run.total("time/step_s"):
        tokens = run.ends("tokens/generated")[1]
        more = f"{len(run.steps)} steps of {number(run.median('time/step_s'))} s"
        more += f", {tokens:,.0f} tokens" if math.isfinite(tokens) else ""
        found.append({"what": "Wall time", "start": "", "end": duration(seconds), "more": more, "spark": ""})
    return found


def _card(run: RunFiles, metric: Metric) -> dict[str, Any]:
    key = run.key_of(metric)
    (start, end), first, more = run.ends(key), "", metric.unit
    if metric.summary == "median":
        end, more = run.median(key), f"{more}, median"
    elif len(run.steps) > 1:
        first = metric.write(start)
    if metric.change and math.isfinite(ratio(start, end)):
        more = change(metric, start, end) + (" of the start" if metric.is_share else " the start")
    return {
        "what": metric.title,
        "start": first,
        "end": metric.write(end),
        "more": more,
        "spark": sparkline(run.values(key)),
    }


def frontier(run: RunFiles) -> dict[str, Any] | None:
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


def charts(run: RunFiles) -> list[dict[str, Any]]:
    """The charts over steps that the table of metrics asks for."""
    headings = dict.fromkeys(metric.chart for metric in metrics.METRICS if metric.chart)
    found = [found for heading in headings for found in _charts(run, heading)]
    return [_held_out_reward(run), *found] if run.has("eval/reward") else found


def _held_out_reward(run: RunFiles) -> dict[str, Any]:
    """The reward on held-out prompts, beside that of the training where the functions are the same."""
    held = next(metric for metric in metrics.METRICS if metric.key == "eval/reward")
    series = [_series(run, held, held.key, "held out", 1)]
    title, caption = held.title, "The band is one standard error."
    if not run.config.get("eval_reward"):
        series.insert(0, Series("training", run.step_numbers(), run.series("reward/raw"), 0))
        title, caption = "Held-out against training reward", f"Mean per completion. {caption}"
    return {"title": title, "caption": caption, "plot": metric_chart(title, held, series)}


Drawn = tuple[Metric, str, str]  # a metric, one of its keys, that key's label


def _charts(run: RunFiles, heading: str) -> list[dict[str, Any]]:
    """The chart with this heading; several where members of a family do not fit one axis."""
    drawn: list[Drawn] = [
        (metric, key, label)
        for metric in metrics.METRICS
        if metric.chart == heading
        for key, label in metric.labels(run.keys).items()
        if run.has(key)
    ]
    if not drawn or (len(drawn) == 1 and drawn[0][0].is_family):  # a family of one is what another chart shows
        return []
    if not drawn[0][0].is_family or drawn[0][0].whole:
        return [_chart(run, heading, drawn)]
    named = {one[2] for one in drawn} & set(run.reward_functions)
    parted = on_axes_of_their_own(run, [one for one in drawn if one[2] in named or not named])
    parted = [] if len(named) == 1 else parted  # which is the reward itself
    charts = [_chart(run, heading if len(part) > 1 else f"Reward: {part[0][2]}", part) for part in parted]
    return charts + [_chart(run, one[2], [one]) for one in drawn if named and one[2] not in named]


def on_axes_of_their_own(run: RunFiles, drawn: list[Drawn]) -> list[list[Drawn]]:
    """The lines in groups, each for one chart: none is more than SAME_AXIS times larger than another beside it."""
    sizes = {key: max(map(abs, run.values(key))) for _, key, _ in drawn}
    groups: list[list[Drawn]] = []
    for one in sorted(drawn, key=lambda one: -sizes[one[1]]):
        if groups and (not sizes[one[1]] or sizes[groups[-1][0][1]] <= SAME_AXIS * sizes[one[1]]):
            groups[-1].append(one)
        else:
            groups.append([one])
    return groups


def _chart(run: RunFiles, heading: str, drawn: list[Drawn]) -> dict[str, Any]:
    first = drawn[0][0]
    if first.whole:
        plot = stacked_shares(run.parts(first), run.step_numbers(), title=heading)
    else:
        series = [_series(run, metric, key, label, colour) for colour, (metric, key, label) in enumerate(drawn)]
        plot = metric_chart(heading, first, series)
    return {"title": heading, "caption": metrics.CAPTIONS.get(heading, first.about), "plot": plot}


def _series(run: RunFiles, metric: Metric, key: str, label: str, colour: int) -> Series:
    has_band = run.has(metric.band) and key == metric.key
    band = run.line(metric, key, at=metric.band)[1] if has_band else ()
    filled = (run.series(metric.area_to),) if run.has(metric.area_to) else ()
    return Series(label, *run.line(metric, key), colour, band, filled)


def metric_chart(heading: str, metric: Metric, series: list[Series]) -> Svg:
    """Lines over steps with the metric's axis."""
    y_label = "share" if metric.is_share else metric.unit
    return line_chart(series, title=heading, y_label=y_label, share=metric.is_share, include_zero=metric.from_zero)
