"""The output of `fastkl score`: a header and then one line for each completion, continued where a killed run stopped.

Windows of the input (read.py) are written at once and in order. A run that was killed left whole windows and perhaps a
part of one; the part is cut off, and the run goes on with that window. So what a resumed run writes is what it would
have written, to the byte: the same lines are scored together in the same batches.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from fastkl.errors import UserError
from fastkl.score_files.read import Window, settings_line


def start_output(path: Path, header: Mapping[str, Any], windows: Iterator[Window], resume: bool) -> Iterator[Window]:
    """Makes the output file ready to be appended to; returns the windows that are still to be scored.

    A new file gets the header. With `resume`, an old one is cut after its last whole window. UserError if it is not
    these settings' output of this input, if it exists and `resume` is not asked for, or if it cannot be written.
    """
    first_line = to_line({"settings": dict(header)})
    try:
        if not resume and holds_scores(path):
            raise UserError(
                f"output: {str(path)!r} exists; continue it with --resume, or choose another name with --output."
            )
        if resume and path.exists():
            with path.open("rb") as file:
                old = file.readline()
                if old.endswith(b"\n"):  # else nothing but a part of the header was written
                    check_header(path, old, header)
                    end, windows = whole_windows(path, len(old), file, windows)
                    os.truncate(path, end)
                    return windows
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(first_line)
    except OSError as failure:
        reason = failure.strerror or failure
        raise UserError(f"output: {str(path)!r} cannot be written ({reason}); choose another --output.") from failure
    return windows


def holds_scores(path: Path) -> bool:
    """Whether there is more in the file than the header that a call leaves which stopped at the first line."""
    if not path.exists():
        return False
    with path.open("rb") as file:
        return settings_line(file.readline() or b"{}") is None and path.stat().st_size > 0 or bool(file.readline())


def check_header(path: Path, line: bytes, header: Mapping[str, Any]) -> None:
    """UserError unless the output was begun with the same settings."""
    before = settings_line(line)
    if before is None:
        raise UserError(f"resume: {str(path)!r} was not written by `fastkl score`; choose another --output.")
    for name in {**header, **before}:
        if before.get(name) != header.get(name):
            raise UserError(
                f"{name}: {header.get(name)!r}, but {str(path)!r} was begun with {before.get(name)!r}; resume with "
                "that, or choose another --output."
            )


def whole_windows(
    path: Path, end: int, output: Iterable[bytes], windows: Iterator[Window]
) -> tuple[int, Iterator[Window]]:
    """(where the output's last whole window ends, the windows after it). output: its lines from byte `end` on."""
    lines = iter(output)
    for window in windows:
        size = 0
        for row in window.rows:
            line = next(lines, b"")
            if not line.endswith(b"\n"):
                return end, chain([window], windows)
            if not line.startswith(f'{{"line": {row.number},'.encode()):
                raise UserError(
                    f"resume: {str(path)!r} holds {line[:20].decode(errors='replace')!r}... where line {row.number} of "
                    "the input belongs; it is the output of another input. Choose another --output."
                )
            size += len(line)
        end += size
    if next(lines, b"").endswith(b"\n"):
        raise UserError(f"resume: {str(path)!r} has more lines than the input; it is the output of another input.")
    return end, iter(())


def to_line(record: Mapping[str, Any]) -> bytes:
    """One line of strict JSON."""
    return (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode(errors="replace")
