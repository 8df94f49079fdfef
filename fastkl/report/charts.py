"""Whole charts, each a small piece of SVG, for the report page and the microbenchmark.

In: numbers (NaN is a gap). Out: one <svg>, complete without a script: axes, legend, a description for
screen readers; what the pointer shows waits in its `data-points` attribute.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from fastkl.report import svg
from fastkl.report.numbers import number, percent
from fastkl.report.svg import Scale, Series, Svg

MAX_POINTS = 600  # on one chart, all series together: keeps the page small; longer ones show every k-th step


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    y_label: str,
    share: bool = False,
    include_zero: bool = False,
    width: int = 420,
    height: int = 280,
) -> Svg:
    """Lines over steps, with a legend where there is more than one. Single points are drawn as dots.

    share: the values are shares of 1, drawn from 0 to 100 %. include_zero: the y axis reaches 0.
    """
    series = [svg.thinned(one, MAX_POINTS // max(1, len(series))) for one in series]
    xs = [x for one in series for x in one.x]
    ys = [
        y + sign * s
        for one in series
        for y, s in zip(one.y, one.spread or [0.0] * len(one.y), strict=True)
        for sign in (-1, 1)
    ]
    low, high = svg.value_range(ys + [0.0] * include_zero, share=share)
    legend, top = svg.draw_legend([(one.label, svg.colour_class(one.colour)) for one in series], width)
    x_low, x_high = (min(xs), max(xs)) if max(xs) > min(xs) else (min(xs) - 1, max(xs) + 1)
    x, y = Scale(x_low, x_high, 46, width - 54), Scale(low, high, height - 36, top + 29)
    write = percent if share else number
    parts = [legend, svg.draw_axes(x, y, "step", y_label, svg.ticks(x_low, x_high, 5, whole=True), share=share)]
    parts += [svg.draw_area(one, x, y) for one in series]
    parts += [svg.draw_line(one, x, y) for one in series]
    parts += svg.end_labels(series, x, y, write)
    described = "; ".join(svg.in_words(one, write) for one in series)
    points = svg.hover_points(series, x, y, lambda line, index: write(series[line].y[index]))
    return svg.document(parts, width, height, f"{title}: {described}", points)


def frontier_chart(
    paths: Sequence[Series], steps: Sequence[Sequence[float]], *, title: str, width: int, height: int
) -> Svg:
    """Reward (y) against KL (x), one path per run. One run: a dot per step, coloured by step. Several: ends, named.

    The KL axis is a square-root axis where runs differ much in KL, as in Gao et al., "Scaling laws for reward model
    overoptimization" (2022).
    """
    most = MAX_POINTS // max(1, len(paths))
    paths = [svg.thinned(path, most) for path in paths]
    steps = [svg.every_kth(list(of_run), most) for of_run in steps]
    one = len(paths) == 1
    x, x_ticks = _kl_scale(paths, 50, width - (24 if one else 64))
    low, high = svg.value_range([value for path in paths for value in path.y])
    y = Scale(low, high, height - 40, 34)
    x_label = "KL, nats per completion" + (" (square-root axis)" if x.warp is svg.signed_root else "")
    parts = [svg.draw_axes(x, y, x_label, "reward per completion", x_ticks)]
    parts += [svg.draw_line(path, x, y, css="faint") for path in paths]
    parts += (
        [_step_dots(paths[0], steps[0], x, y), _ramp_legend(steps[0], width, y.start)]
        if one
        else _ends(paths, x, y, width)
    )
    described = "; ".join(f"{path.label}: {_ends_in_words(path)}" for path in paths)

    def text(line: int, index: int) -> str:
        path = paths[line]
        return f"step {steps[line][index]:g}: reward {number(path.y[index])}, KL {number(path.x[index])}"

    points = svg.hover_points(paths, x, y, text, nearest=True)
    return svg.document(parts, width, height, f"{title}: {described}", points)


def stacked_shares(
    layers: Sequence[tuple[str, Sequence[float]]],
    steps: Sequence[float],
    *,
    title: str,
    width: int = 420,
    height: int = 280,
) -> Svg:
    """Each step's parts as shares of their sum, stacked from the bottom. layers: (name, values), one value per step."""
    keep = svg.every_kth(list(range(len(steps))), MAX_POINTS // max(1, len(layers)))
    steps = [steps[index] for index in keep]
    columns = [svg.shares([values[index] for _, values in layers]) for index in keep]
    legend, top = svg.draw_legend([(name, svg.colour_class(index)) for index, (name, _) in enumerate(layers)], width)
    x_low, x_high = (steps[0], steps[-1]) if len(steps) > 1 else (steps[0] - 0.5, steps[0] + 0.5)
    x, y = Scale(x_low, x_high, 46, width - 54), Scale(0, 1, height - 36, top + 29)
    edges, drawn = (steps, columns) if len(steps) > 1 else ([x_low, x_high], columns * 2)  # one step fills the chart
    x_ticks = svg.ticks(x_low, x_high, 5, whole=True)
    axes = svg.draw_axes(x, y, "step", "share of the step's time", x_ticks, share=True)
    parts, tops = [legend, axes], []
    for index in range(len(layers)):
        below, above = ([sum(column[:count]) for column in drawn] for count in (index, index + 1))
        outline = svg.path_data(edges, above, x, y) + svg.path_data(edges[::-1], below[::-1], x, y).replace("M", "L", 1)
        parts.append(f'<path class="layer {svg.colour_class(index)}" d="{outline}Z"/>')
        tops.append(Series(layers[index][0], steps, above[: len(steps)], index))
    described = ", ".join(f"{name} {percent(share)}" for (name, _), share in zip(layers, columns[-1], strict=True))
    points = svg.hover_points(tops, x, y, lambda line, index: percent(columns[index][line]))
    return svg.document(parts, width, height, f"{title}, last step: {described}", points)


def share_bars(totals: Mapping[str, Mapping[str, float]], *, title: str, width: int = 420) -> Svg:
    """One stacked bar per run. totals: seconds by run and stage."""
    names = list(dict.fromkeys(name for stages in totals.values() for name in stages))
    legend, top = svg.draw_legend([(name, svg.colour_class(index)) for index, name in enumerate(names)], width)
    parts, described, y = [legend], [], top + 14.0
    for label, stages in totals.items():
        parts.append(f'<text class="name" x="6" y="{y + 10:.0f}">{escape(label)}</text>')
        left = 6.0
        parted = svg.shares([stages.get(name, 0.0) for name in names])
        for index, share in enumerate(parted):
            wide = share * (width - 12)
            box = f'x="{left:.1f}" y="{y + 16:.0f}" width="{wide:.1f}" height="14"'
            parts.append(f'<rect class="layer {svg.colour_class(index)}" {box}/>')
            if wide > 34:
                middle = left + wide / 2
                parts.append(f'<text class="inside" x="{middle:.1f}" y="{y + 26.5:.1f}">{percent(share)}</text>')
            left += wide
        described.append(f"{label}: " + ", ".join(f"{n} {percent(s)}" for n, s in zip(names, parted, strict=True)))
        y += 44
    return svg.document(parts, width, max(280, round(y)), f"{title}: {'; '.join(described)}", svg.NO_POINTS)


def sparkline(values: Sequence[float]) -> Svg:
    """The course of a number at a glance: no axes, no text."""
    values = svg.every_kth([value for value in values if math.isfinite(value)], 80)
    if len(values) < 2:
        return Svg("")
    low, high = min(values), max(values)
    x, y = Scale(0, len(values) - 1, 1, 119), Scale(low, high if high > low else low + 1, 26, 4)
    line = f'<path class="line s0" d="{svg.path_data(range(len(values)), values, x, y)}"/>'
    stretch = 'viewBox="0 0 120 30" preserveAspectRatio="none"'
    return Svg(f'<svg class="spark" {stretch} aria-hidden="true">{line}</svg>')


def _kl_scale(paths: Sequence[Series], start: float, end: float) -> tuple[Scale, list[float]]:
    """The KL axis and its ticks: a square-root axis where the runs' last KLs are more than a factor of 8 apart."""
    values = [x for path in paths for x, y in zip(path.x, path.y, strict=True) if math.isfinite(x + y)]
    low, high = min([0.0, *values]), max([1e-6, *values]) * 1.04
    last = [abs(point[0]) for path in paths if (point := svg.last_point(path))]
    if len(last) > 1 and max(last) > 8 * min(last):
        return Scale(low, high, start, end, svg.signed_root), svg.root_ticks(high)
    return Scale(low, high, start, end), svg.ticks(low, high, max(5, round((end - start) / 110)))


def _finite_points(path: Series) -> list[tuple[int, float, float]]:
    return [(i, x, y) for i, (x, y) in enumerate(zip(path.x, path.y, strict=True)) if math.isfinite(x + y)]


def _step_dots(path: Series, steps: Sequence[float], x: Scale, y: Scale) -> str:
    """A dot for every step, coloured from first to last."""
    span = max(1.0, steps[-1] - steps[0])
    parts = []
    for index, kl, reward in _finite_points(path):
        shade = round((steps[index] - steps[0]) / span * (svg.NUM_RAMP - 1))
        parts.append(f'<circle class="dot r{shade}" cx="{x(kl):.1f}" cy="{y(reward):.1f}" r="5"/>')
    return "".join(parts)


def _ends(paths: Sequence[Series], x: Scale, y: Scale, width: int) -> list[str]:
    """A large dot where each run ended, with the run's name beside it."""
    ended = [(path, point) for path in paths if (point := svg.last_point(path))]
    heights = svg.spread_out([y(reward) for _, (_, reward) in ended], 13)
    parts = []
    for (path, (kl, reward)), height in zip(ended, heights, strict=True):
        colour = svg.colour_class(path.colour)
        parts.append(f'<circle class="dot {colour}" cx="{x(kl):.1f}" cy="{y(reward):.1f}" r="6"/>')
        label = svg.shortened(path.label)
        left = x(kl) + 14 + svg.BOLD_CHARACTER_WIDTH * len(label) > width
        at, anchor = (x(kl) - 11, "end") if left else (x(kl) + 11, "start")
        name = f'<text class="end {colour}" x="{at:.1f}" y="{height:.1f}" dy=".34em" text-anchor="{anchor}">'
        parts.append(f"{name}{escape(label)}</text>")
    return parts


def _ramp_legend(steps: Sequence[float], width: int, bottom: float) -> str:
    """The colours of the steps, lower right, where a frontier leaves room."""
    left, top = width - 24 - 130, bottom - 22
    boxes = [
        f'<rect class="swatch r{index}" x="{left + 13 * index}" y="{top}" width="13.5" height="8"/>'
        for index in range(svg.NUM_RAMP)
    ]
    first = f'<text class="tick" x="{left}" y="{top - 5}">step {steps[0]:g}</text>'
    last = f'<text class="tick" x="{left + 130}" y="{top - 5}" text-anchor="end">step {steps[-1]:g}</text>'
    return "".join([*boxes, first, last])


def _ends_in_words(path: Series) -> str:
    found = _finite_points(path)
    if not found:
        return "no values"
    (_, kl_first, reward_first), (_, kl_last, reward_last) = found[0], found[-1]
    return f"reward {number(reward_first)} to {number(reward_last)}, KL {number(kl_first)} to {number(kl_last)}"
