"""Pieces of SVG that the charts are made of: scales, axes, legends, lines, and what the pointer shows.

Colours are classes (s0..s5 for series, r0..r9 for the ramp over steps) that style.css sets for light and dark. A NaN
is a gap. Coordinates are in the SVG's own units, about one CSS pixel each. Standard library only.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from fastkl.report.numbers import percent, scientific

NUM_COLOURS = 6


NUM_RAMP = 10


CHARACTER_WIDTH = 6.3  # of the charts' font


BOLD_CHARACTER_WIDTH = 8.0  # at most, of most letters


NO_POINTS = '{"lines": []}'  # a chart that has nothing to add under the pointer


class Svg(str):
    """An <svg> element that a page template takes as it is, without escaping."""

    __slots__ = ()

    def __html__(self) -> str:
        return self


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a chart."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    spread: Sequence[float] = field(default_factory=tuple)  # draws a band y - spread .. y + spread
    filled: tuple[Sequence[float], ...] = ()  # draws an area between y and this other curve


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps numbers to SVG coordinates; `warp` is the identity or a signed square root."""

    low: float
    high: float
    start: float
    end: float
    warp: Callable[[float], float] = float

    def __call__(self, value: float) -> float:
        low, high = self.warp(self.low), self.warp(self.high)
        return self.start + (self.warp(value) - low) / (high - low) * (self.end - self.start)


def colour_class(index: int) -> str:
    """The class of the index-th series' colour."""
    return f"s{index % NUM_COLOURS}"


def shares(values: Sequence[float]) -> list[float]:
    """The values as shares of their sum; what is negative or not a number counts as nothing."""
    values = [value if math.isfinite(value) and value > 0 else 0.0 for value in values]
    return [value / (sum(values) or 1.0) for value in values]


def signed_root(value: float) -> float:
    """The square root, with the sign kept: spreads small KLs out, takes slightly negative estimates."""
    return math.copysign(math.sqrt(abs(value)), value)


def ticks(low: float, high: float, count: int = 5, whole: bool = False) -> list[float]:
    """About `count` round numbers in [low, high], 1, 2 or 5 times a power of ten apart; `whole` for whole numbers."""
    raw = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    step = max(1.0, step) if whole else step
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def root_ticks(high: float) -> list[float]:
    """Round numbers that lie about evenly on a square-root axis from 0 to `high`."""
    top = 10.0 ** math.ceil(math.log10(high))
    kept = [0.0]
    for mark in sorted(factor * top / 10**power for power in range(4) for factor in (1, 0.5, 0.2)):
        if mark <= high and math.sqrt(mark) - math.sqrt(kept[-1]) >= 0.13 * math.sqrt(high):
            kept.append(mark)
    return kept


def value_range(values: Sequence[float], *, share: bool = False) -> tuple[float, float]:
    """Axis limits: 0..1 for shares; else the values with some air, from 0 where that costs little."""
    values = [value for value in values if math.isfinite(value)]
    if share or not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    if 0 <= low < 0.6 * high:
        low = 0.0
    air = max(0.06 * (high - low), 0.03 * max(abs(low), abs(high)), 1e-9)
    return (low if low == 0 else low - air), high + air


def every_kth(values: list[Any], most: int) -> list[Any]:
    """At most about `most` of the values, evenly spaced, the last one always among them."""
    stride = max(1, math.ceil(len(values) / max(2, most)))
    kept = values[::stride]
    return kept if not values or (len(values) - 1) % stride == 0 else [*kept, values[-1]]


def thinned(line: Series, most: int) -> Series:
    """The line with at most about `most` of its points."""
    keep = every_kth(list(range(len(line.x))), most)

    def pick(values: Sequence[float]) -> list[float]:
        return [values[index] for index in keep] if len(values) else []

    return Series(line.label, pick(line.x), pick(line.y), line.colour, pick(line.spread), tuple(map(pick, line.filled)))


def document(parts: Sequence[str], width: int, height: int, description: str, points: str) -> Svg:
    """The <svg> around the parts of a chart."""
    return Svg(
        f'<svg class="plot" viewBox="0 0 {width} {height}" role="img" tabindex="0" aria-label="{escape(description)}" '
        f'data-points="{escape(points)}"><rect class="paper" width="{width}" height="{height}"/>{"".join(parts)}</svg>'
    )


def tick_texts(marks: Sequence[float]) -> list[str]:
    """The ticks with just the digits that tell them apart: 0.5, 1.0, 1.5; very small steps as 2e-6."""
    marks = [mark + 0.0 for mark in marks]  # no -0
    step = min((b - a for a, b in itertools.pairwise(marks)), default=1.0)
    if step < 1e-4:
        return [scientific(mark, 0) if mark else "0" for mark in marks]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [f"{mark:,.{decimals}f}" for mark in marks]


def draw_axes(x: Scale, y: Scale, x_label: str, y_label: str, x_ticks: Sequence[float], *, share: bool = False) -> str:
    """Grid, ticks and the names of both axes: y's above it, x's below its right end. share: y is in percent."""
    parts = [f'<text class="label" x="{x.start - 40}" y="{y.end - 15:.0f}">{escape(y_label)}</text>']
    y_ticks = ticks(y.low, y.high, 5)
    for tick, text in zip(y_ticks, [percent(tick) for tick in y_ticks] if share else tick_texts(y_ticks), strict=True):
        at = f"{y(tick):.1f}"
        parts.append(f'<line class="grid" x1="{x.start}" x2="{x.end}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text class="tick" x="{x.start - 7}" y="{at}" dy=".34em" text-anchor="end">{text}</text>')
    for tick, text in zip(x_ticks, tick_texts(x_ticks), strict=True):
        at = f"{x(tick):.1f}"
        parts.append(f'<line class="tickmark" x1="{at}" x2="{at}" y1="{y.start}" y2="{y.start + 4}"/>')
        parts.append(f'<text class="tick" x="{at}" y="{y.start + 16}" text-anchor="middle">{text}</text>')
    parts.append(f'<line class="axis" x1="{x.start}" x2="{x.end}" y1="{y.start}" y2="{y.start}"/>')
    parts.append(f'<text class="label" x="{x.end}" y="{y.start + 31}" text-anchor="end">{escape(x_label)}</text>')
    return "".join(parts)


def shortened(name: str, most: int = 28) -> str:
    """The name, without its middle where it is longer than `most` characters."""
    return name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[-most // 2 :]}"


def draw_legend(names: Sequence[tuple[str, str]], width: int) -> tuple[str, float]:
    """Swatches and names in as many rows as they need, and the height they take; nothing for a single name."""
    if len(names) < 2:
        return "", 0.0
    x, y, parts = 6.0, 9.0, []
    for name, colour in ((shortened(name), colour) for name, colour in names):
        wide = 22 + CHARACTER_WIDTH * len(name)
        if x > 6 and x + wide > width:
            x, y = 6.0, y + 17
        parts.append(f'<rect class="swatch {colour}" x="{x:.0f}" y="{y - 5:.0f}" width="12" height="8" rx="2"/>')
        parts.append(f'<text class="name" x="{x + 17:.0f}" y="{y + 3:.0f}">{escape(name)}</text>')
        x += wide + 14
    return "".join(parts), y + 8


def path_data(xs: Sequence[float], ys: Sequence[float], x: Scale, y: Scale) -> str:
    """The points joined by lines, with a new start after every gap."""
    commands, pen_down = [], False
    for x_value, y_value in zip(xs, ys, strict=True):
        if math.isfinite(x_value + y_value):
            commands.append(f"{'L' if pen_down else 'M'}{x(x_value):.1f} {y(y_value):.1f}")
        pen_down = math.isfinite(x_value + y_value)
    return "".join(commands)


def draw_line(line: Series, x: Scale, y: Scale, css: str = "") -> str:
    """A line, broken at gaps; a point without neighbours is a dot."""
    shade = colour_class(line.colour)
    dash = " dashed" if line.colour >= NUM_COLOURS else ""
    joined = f'<path class="line {shade}{dash} {css}" d="{path_data(line.x, line.y, x, y)}"/>'
    alone = [
        f'<circle class="dot {shade}" cx="{x(line.x[i]):.1f}" cy="{y(line.y[i]):.1f}" r="3"/>'
        for i in range(len(line.y))
        if math.isfinite(line.y[i] + line.x[i])
        and not any(0 <= j < len(line.y) and math.isfinite(line.y[j] + line.x[j]) for j in (i - 1, i + 1))
    ]
    return joined + "".join(alone)


def draw_area(line: Series, x: Scale, y: Scale) -> str:
    """The band around a line, or the area between it and another."""
    if line.spread:
        upper = [value + spread for value, spread in zip(line.y, line.spread, strict=True)]
        lower = [value - spread for value, spread in zip(line.y, line.spread, strict=True)]
    elif line.filled:
        upper, lower = list(line.y), list(line.filled[0])
    else:
        return ""
    whole = [i for i in range(len(upper)) if math.isfinite(upper[i] + lower[i])]
    if len(whole) < 2:
        return ""
    there = path_data([line.x[i] for i in whole], [upper[i] for i in whole], x, y)
    back = path_data([line.x[i] for i in whole[::-1]], [lower[i] for i in whole[::-1]], x, y).replace("M", "L", 1)
    return f'<path class="band {colour_class(line.colour)}" d="{there}{back}Z"/>'


def last_point(line: Series) -> tuple[float, float] | None:
    """The last finite (x, y)."""
    points = [(x, y) for x, y in zip(line.x, line.y, strict=True) if math.isfinite(x + y)]
    return points[-1] if points else None


def spread_out(positions: Sequence[float], gap: float) -> list[float]:
    """Move text baselines apart until neighbours are `gap` away, keeping their order."""
    order = sorted(range(len(positions)), key=positions.__getitem__)
    moved = list(positions)
    for above, below in zip(order, order[1:], strict=False):
        moved[below] = max(moved[below], moved[above] + gap)
    shift = (sum(moved) - sum(positions)) / max(1, len(positions))
    return [position - shift for position in moved]


def end_labels(series: Sequence[Series], x: Scale, y: Scale, write: Callable[[float], str]) -> list[str]:
    """Each line's last value beside its end."""
    ends = [(line, end) for line in series if (end := last_point(line)) is not None]
    heights = spread_out([y(end[1]) for _, end in ends], 12)
    return [
        f'<text class="end {colour_class(line.colour)}" x="{x.end + 5}" y="{at:.1f}" dy=".34em">{write(end[1])}</text>'
        for (line, end), at in zip(ends, heights, strict=True)
    ]


def hover_points(
    series: Sequence[Series], x: Scale, y: Scale, text: Callable[[int, int], str], *, nearest: bool = False
) -> str:
    """What the pointer shows, as JSON: per series its name and [x, y, text, step], x and y in the SVG's coordinates.

    text: (series, point) to what is said of it. nearest: the pointer looks for the nearest point, not the nearest step.
    """
    lines = []
    for number_of_line, line in enumerate(series):
        found = [
            [round(x(a), 1), round(y(b), 1), text(number_of_line, index), a]
            for index, (a, b) in enumerate(zip(line.x, line.y, strict=True))
            if math.isfinite(a + b)
        ]
        lines.append({"label": line.label, "points": found})
    return json.dumps({"nearest": nearest, "top": y.end, "bottom": y.start, "lines": lines}, ensure_ascii=False)


def in_words(line: Series, write: Callable[[float], str]) -> str:
    """The line's first and last value, for screen readers."""
    values = [value for value in line.y if math.isfinite(value)]
    return f"{line.label} from {write(values[0])} to {write(values[-1])}" if values else f"{line.label}: no values"
