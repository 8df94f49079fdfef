"""JSONL as bytes: a line ends at \\n and nowhere else (texts may hold U+2028), a byte order mark is passed over.

Standard library only.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeGuard

from fastkl.errors import UserError

LARGEST = 1e100
"""What is beyond is no measurement, and its square is no float."""


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether it is a finite number up to LARGEST (NaN compares false)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """(number from 1, value) of each line that is not blank; the value is the exception where the line is no JSON."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line := line.removeprefix(codecs.BOM_UTF8).strip():
                    try:
                        value = json.loads(line)
                    except (ValueError, RecursionError) as failure:
                        value = failure
                    yield number, value
    except OSError as failure:
        raise UserError(f"{str(path)!r} cannot be read ({failure.strerror}).") from failure


def rows_of_steps(path: Path, damaged: list[str]) -> Iterator[dict[str, Any]]:
    """The objects of a run's file that have a step. The first damaged line goes to `damaged`; the file's last line may
    be one, since it may still be being written."""
    pending = ""
    for number, row in json_lines(path):
        if pending and not damaged:
            damaged.append(pending)
        pending = f"line {number} of {str(path)!r} is damaged ({row})" if isinstance(row, Exception) else ""
        if isinstance(row, dict) and type(row.get("step")) is int:
            yield row
