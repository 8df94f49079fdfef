"""Bar charts of benchmark results as SVG files, made of the report page's parts: a group of bars per shape and job, its
heading in words, and below them why a row may be doubtful."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

from fastkl.microbench.jobs import JOBS
from fastkl.report import svg

WIDTH, LEFT, BAR = 960, 250, 20
KINDS = {"fastkl": "s0", "PyTorch": "s2", "other projects": "s1"}


def roofline(results: Sequence[Any]) -> str:
    """How close each row comes to the least time that its job takes at the machine's measured speeds."""
    ends = {"matmul": "matrix products", "bandwidth": "memory traffic"}
    return bars(
        results,
        lambda r: r.percent_of_floor,
        lambda r: f"{r.percent_of_floor:.0f} % ({r.median_ms:.3g} ms; {ends[r.bound]})",
        "Share of the floor in %: the job's least time, by its matrix products or its memory traffic at the speeds "
        "measured here, over the median time of a call",
        line=100.0,
    )


def memory(results: Sequence[Any]) -> str:
    """Peak memory of each row."""
    return bars(
        [r for r in results if r.peak_mib is not None],
        lambda r: r.peak_mib,
        lambda r: f"{r.peak_mib:,.0f} MiB",
        "Peak memory of a call beyond its inputs in MiB, gradients included: less is better",
    )


def kind(name: str) -> str:
    """Whose row it is."""
    return "fastkl" if name.startswith("fastkl") else "PyTorch" if "PyTorch" in name else "other projects"


def bars(
    results: Sequence[Any], value: Callable[[Any], float], write: Callable[[Any], str], title: str,
    line: float | None = None,
) -> str:  # fmt: skip
    """One horizontal bar per result, in groups. line: a value to mark across all groups."""
    top = max([*map(value, results), line or 0.0]) or 1.0
    x = svg.Scale(0.0, top, LEFT, WIDTH - 220)
    doubts = list(dict.fromkeys(r.doubt for r in results if r.doubt))
    parts, y = [f'<text class="name" x="6" y="40">{escape(title)}</text>'], 56.0
    for (shape, job), group in groupby(results, key=lambda r: (r.shape, r.job)):
        y += 26
        heading = f"{shape}, job {job}: {JOBS[job].given} → {JOBS[job].wanted}"
        parts.append(f'<text class="name" x="6" y="{y - 8:.0f}">{escape(heading)}</text>')
        for r in group:
            mark = f" [{doubts.index(r.doubt) + 1}]" if r.doubt else ""
            wide, colour = x(value(r)) - LEFT, KINDS[kind(r.name)]
            parts += [
                f'<text x="{LEFT - 8}" y="{y + 12:.0f}" text-anchor="end">{escape(r.name + mark)}</text>',
                f'<rect class="layer {colour}" x="{LEFT}" y="{y:.0f}" width="{wide:.1f}" height="{BAR - 5}"/>',
                f'<text x="{LEFT + wide + 6:.1f}" y="{y + 12:.0f}">{escape(write(r))}</text>',
            ]
            y += BAR
    if line is not None:
        parts.append(f'<text x="{x(line):.0f}" y="52" text-anchor="middle">{line:g}</text>')
        parts.append(f'<line class="axis" x1="{x(line):.1f}" x2="{x(line):.1f}" y1="56" y2="{y:.0f}"/>')
    for number, doubt in enumerate(doubts, 1):
        y += 18
        parts.append(f'<text x="6" y="{y:.0f}">[{number}] {escape(doubt)}</text>')
    legend, _ = svg.draw_legend(list(KINDS.items()), WIDTH)
    return standalone(svg.document([legend, *parts], WIDTH, round(y) + 20, title, svg.NO_POINTS))


def standalone(chart: str) -> str:
    """The chart as a file of its own, with the page's colours for light and dark."""
    style = escape((Path(svg.__file__).parent / "page" / "style.css").read_text())
    opening, rest = str(chart).split(">", 1)
    return f'{opening} xmlns="http://www.w3.org/2000/svg"><style>{style}</style>{rest}'
