"""What a person sees while a file is scored: a progress bar on a terminal, a plain line now and then elsewhere.

Everything goes to standard error, since standard output may carry the scores.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from fastkl.errors import printable
from fastkl.report.numbers import duration, percent
from fastkl.report.terminal import can_redraw

PLAIN_EVERY_S = 10.0


class ScoreView:
    """The display of one scoring; a context manager.

    total_bytes: the input's size; None where nobody knows. console: rich's, for tests; standard error by default.
    """

    def __init__(self, total_bytes: int | None, console: Console | None = None) -> None:
        self.total_bytes = total_bytes
        self._console = console or Console(stderr=True)
        self.is_live = can_redraw(self._console)
        self._progress = Progress(
            TextColumn("scoring"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[status]}"),
            console=self._console,
            refresh_per_second=4,
            expand=True,
        )
        self._task = self._progress.add_task("", total=total_bytes, status="loading")
        self._lines = self._malformed = self._tokens = self._outside = 0
        self._start_bytes: int | None = None  # where this call began to work
        self._bytes = 0
        self._start = self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        if self.is_live:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.is_live:
            self._progress.stop()

    def note(self, message: str) -> None:
        """A message that stays."""
        message = printable(message)
        if self.is_live:
            self._progress.console.print(Text(message))
        else:
            print(message, file=self._console.file, flush=True)

    def loaded(self) -> None:
        """The models are ready: the clock of speed and time left starts."""
        self._start = time.monotonic()

    def tokens(self, count: int, outside: int) -> None:
        """`count` more tokens of completions are scored, of which `outside` are not among the ids that the sampling
        settings allow."""
        self._tokens, self._outside = self._tokens + count, self._outside + outside
        self._show()

    def window(self, start_bytes: int, end_bytes: int, num_lines: int, malformed: int) -> None:
        """One more window of the input is written, with `num_lines` lines, some of them `malformed`."""
        if self._start_bytes is None:
            self._start_bytes = start_bytes
        self._bytes = end_bytes
        self._lines, self._malformed = self._lines + num_lines - malformed, self._malformed + malformed
        self._show()

    def finished(self, where: str) -> None:
        """The last message."""
        seconds = time.monotonic() - self._start
        skipped = f" ({self._malformed:,} skipped)" if self._malformed else ""
        done = f"{self._lines:,} lines{skipped}, {self._tokens:,} tokens in {duration(seconds)}"
        self.note(f"{done} → {where}" if self._lines + self._malformed else f"nothing left to score → {where}")
        if self._outside:
            self.note(
                f"outside_support: {self._outside:,} of the tokens ({percent(self._outside / self._tokens)}) are not "
                "among the ids that the sampling settings allow; they are scored as if they were. Where these are more "
                "than rounding explains, the completions were drawn by other settings, or by another model."
            )

    def status(self) -> str:
        """Where things stand."""
        seconds = max(1e-9, time.monotonic() - self._start)
        parts = [f"{self._lines:,} lines", f"{self._tokens / seconds:,.0f} tokens/s"]
        if self.total_bytes and self._bytes:
            parts += [percent(self._bytes / self.total_bytes), f"{duration(self.seconds_left(seconds))} left"]
        return "  ".join(parts)

    def seconds_left(self, seconds: float) -> float:
        """From the bytes that this call has done and those that remain."""
        done = self._bytes - (self._start_bytes or 0)
        return seconds * ((self.total_bytes or 0) - self._bytes) / max(1, done)

    def _show(self) -> None:
        if self.is_live:
            self._progress.update(self._task, completed=self._bytes, status=self.status())
        elif time.monotonic() - self._last_line >= PLAIN_EVERY_S:
            self._last_line = time.monotonic()
            self.note(f"scoring: {self.status()}")
