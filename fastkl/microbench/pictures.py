"""Bar charts of benchmark results as SVG text, without a plotting library."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

ROW, GAP, LEFT, WIDTH = 20, 10, 330, 520


COLOURS = {"fastkl": "#2563eb", "plain": "#9ca3af", "compiled": "#6b7280"}


OTHERS = "#f59e0b"


def roofline(results: Sequence[Any]) -> str:
    """How close each row comes to its roof: the time that its least work takes at the measured ceilings."""
    title = "share of the roof in %: matrix products (m) or memory traffic (b) at the measured ceilings"
    return _bars(results, [r.percent_of_floor for r in results], title, [r.bound[0] for r in results], line=100.0)


def memory(results: Sequence[Any]) -> str:
    """Peak memory of each row."""
    values = [r.peak_mib for r in results]
    return _bars(results, values, "peak memory beyond the inputs in MiB, gradients included (less is better)")


def _bars(
    results: Sequence[Any],
    values: Sequence[float | None],
    title: str,
    marks: Sequence[str] = (),
    line: float | None = None,
) -> str:
    """One horizontal bar per result that has a value, in order, with room between jobs. line: a value to mark."""
    every = zip(results, values, marks or [""] * len(values), strict=True)
    shown = [(result, value, mark) for result, value, mark in every if value is not None]
    top = max([v for _, v, _ in shown] + ([] if line is None else [line]), default=0.0) or 1.0
    lines, y, job = [], 40, None
    for result, value, mark in shown:
        y += GAP if job not in (None, (result.shape, result.job)) else 0
        job = result.shape, result.job
        colour = COLOURS.get(result.name.split(",")[0].split(" ")[0], OTHERS)
        label = escape(f"{result.shape}  {result.job}  {result.name}")
        width = WIDTH * value / top
        lines += [
            f'<text x="{LEFT - 8}" y="{y + 12}" text-anchor="end">{label}</text>',
            f'<rect x="{LEFT}" y="{y}" width="{width:.1f}" height="{ROW - 5}" fill="{colour}"/>',
            f'<text x="{LEFT + width + 6:.1f}" y="{y + 12}">{value:.0f} {mark}</text>',
        ]
        y += ROW
    if line is not None:
        x = LEFT + WIDTH * line / top
        lines.append(f'<line x1="{x:.1f}" y1="34" x2="{x:.1f}" y2="{y}" stroke="#dc2626" stroke-dasharray="4 3"/>')
    size = f'width="{LEFT + WIDTH + 90}" height="{y + 14}"'
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="10" y="22" font-size="14">{escape(title)}</text>',
    ]
    return "\n".join([*head, *lines, "</svg>", ""])
