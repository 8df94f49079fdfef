"""What came out: the table for the terminal and for docs/reliability.md, and the JSON record behind it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results" / "cpu" / "faults.json"
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- begin: written by make faults -->\n", "<!-- end: written by make faults -->"


def line(row: Mapping[str, Any]) -> str:
    """A row for the terminal."""
    if row["skipped"]:
        return f"skipped  {row['fault']}: {row['skipped']}"
    mark = f"{len(row['failures'])} of {row['runs']} FAILED" if row["failures"] else "green   "
    return f"{mark} {row['fault']}: {row['runs']} × {row['injected']}; {row['outcome']} ({row['minutes']:.1f} min)"


def markdown(record: Mapping[str, Any]) -> str:
    """The table of the page."""
    rows, lines = record["rows"], list[str]()
    for place in dict.fromkeys(row["on"] for row in rows):
        here = [row for row in rows if row["on"] == place]
        minutes, count = sum(row["minutes"] for row in here), sum(row["runs"] for row in here)
        failed = sum(len(row["failures"]) for row in here)
        lines += [
            f"`make faults`, seed {record['seed']}: {count:,} faults in {minutes:.0f} minutes on one thread of "
            f"{place}; {failed or 'none'} came out wrong.",
            "",
        ]
    lines += [
        "| fault | how it is injected | times | what comes of it | minutes |",
        "|---|---|---:|---|---:|",
    ]
    for row in rows:
        times = f"{row['runs']:,}" if not row["skipped"] else "–"
        outcome = row["skipped"] and f"not tried: {row['skipped']}" or row["outcome"]
        wrong = f"**{len(row['failures'])} wrong**; " if row["failures"] else ""
        lines.append(f"| {row['fault']} | {row['injected']} | {times} | {wrong}{outcome} | {row['minutes']:.1f} |")
    return "\n".join(lines) + "\n"


def in_words(machine: Mapping[str, Any]) -> str:
    """The machine that a row comes from."""
    return (
        f"{machine['device']} ({machine['cores']} cores, Python {machine['python']}, "
        f"torch {machine['versions']['torch']}, {machine['date']})"
    )


def write(machine: Mapping[str, Any], seed: int, rows: Sequence[Mapping[str, Any]], order: Sequence[str]) -> None:
    """Puts the rows into bench/results and the table into the page; rows of other faults, recorded before with the same
    seed, stay. order: of the faults' names.
    """
    before = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"seed": seed, "rows": []}
    new = {row["name"] for row in rows}
    kept = [row for row in before["rows"] if before["seed"] == seed and row["name"] not in new]
    rows = [{**row, "on": in_words(machine)} for row in rows]
    rows = sorted([*kept, *rows], key=lambda row: order.index(row["name"]))
    record = {"machine": machine, "seed": seed, "rows": rows}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(head + BEGIN + markdown(record) + END + rest.partition(END)[2], encoding="utf-8")
