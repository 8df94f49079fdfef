"""Bar charts of benchmark results as SVG text, without a plotting library."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

ROW, LEFT, WIDTH = 22, 330, 520
COLOURS = {"fastkl": "#2563eb", "plain": "#9ca3af"}


def bars(results: Sequence[Any], field: str, title: str) -> str:
    """One horizontal bar per result, in order. field: the attribute to draw; results without it are left out."""
    shown = [(r, getattr(r, field)) for r in results if getattr(r, field) is not None]
    top = max([value for _, value in shown], default=1.0) or 1.0
    height = 50 + ROW * len(shown)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 90}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="10" y="24" font-size="15">{escape(title)}</text>',
    ]
    for index, (result, value) in enumerate(shown):
        y = 40 + ROW * index
        colour = COLOURS.get(result.name.split(",")[0].split(" ")[0], "#f59e0b")
        label = escape(f"{result.shape}  {result.job}  {result.name}")
        lines += [
            f'<text x="{LEFT - 8}" y="{y + 13}" text-anchor="end">{label}</text>',
            f'<rect x="{LEFT}" y="{y}" width="{WIDTH * value / top:.1f}" height="{ROW - 6}" fill="{colour}"/>',
            f'<text x="{LEFT + WIDTH * value / top + 6:.1f}" y="{y + 13}">{value:.0f}</text>',
        ]
    return "\n".join([*lines, "</svg>", ""])
