"""What a person sees while a run trains: a live panel on a terminal, one compact line per step anywhere else.

In: the metrics dict of each step, a sample completion now and then, notes. Out: text on standard output.
Plain lines are used when standard output is not a terminal that can redraw, and when CI or NO_COLOR is set.
What is shown of a step, and how it is written: metrics.py. Left out: files (loggers.py) and pictures (page/).
"""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Mapping, Sequence
from statistics import fmean
from types import TracebackType
from typing import Self

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from fastkl.errors import printable
from fastkl.report import metrics as table
from fastkl.report.metrics import STAGES
from fastkl.report.numbers import duration, finite, number, percent
from fastkl.rewards.built_in import reward_spans

Metrics = Mapping[str, float | int | None]


BARS = "▁▂▃▄▅▆▇"  # no full block: rows would touch


WIDE_COLUMNS = 120  # from here on, the sample stands beside the numbers


REFRESHES_PER_SECOND = 1  # pace of the clock; redrawing more often would take time from training


COLOURS = ("dodger_blue2", "gold3", "medium_turquoise", "dark_orange3", "orchid", "grey50")


STAGE_COLOURS = dict(zip((*STAGES, "other"), itertools.cycle(COLOURS), strict=False))


def blocks(values: Sequence[float], width: int) -> str:
    """The history of a number in at most `width` block characters, each the mean of its share of `values`."""
    values = [value for value in values if math.isfinite(value)]
    if not values or width < 1:
        return ""
    count = min(width, len(values))
    edges = [index * len(values) // count for index in range(count + 1)]
    means = [sum(values[start:end]) / (end - start) for start, end in zip(edges, edges[1:], strict=False)]
    low, high = min(means), max(means)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((mean - low) * scale)] for mean in means)


def stage_seconds(history: Sequence[Metrics]) -> dict[str, float]:
    """Mean seconds per step in each stage over `history`, and what is left of the step as "other"."""

    def mean(key: str) -> float:
        return sum(finite(step.get(key)) for step in history) / max(1, len(history))

    named = {stage: mean(f"time/{stage}_s") for stage in STAGES}
    return {**named, "other": max(0.0, mean("time/step_s") - sum(named.values()))}


def one_line(text: str) -> str:
    """Text safe for a terminal: line breaks shown as a sign, other control characters (escape codes too) as blanks."""
    return printable(" ⏎ ".join(text.splitlines()))


class View:
    """The display of one run; a context manager.

    title: what is trained, for the panel's border. total_steps: the last step's number. first_step: the first one
    that this process runs, above 1 for a resumed run. console: rich's, for tests; standard output by default.
    """

    def __init__(self, title: str, *, total_steps: int, first_step: int = 1, console: Console | None = None) -> None:
        self.title, self.total_steps, self.first_step = title, total_steps, first_step
        self._console = console or Console()
        self._history: list[Metrics] = []
        self._step_ends: list[float] = []  # seconds on the monotonic clock; the first entry is the start
        self._sample: tuple[str, str, str] | None = None  # prompt, completion, reward
        self._sample_step = 0
        self._live = Live(
            get_renderable=self._render,
            console=self._console,
            refresh_per_second=REFRESHES_PER_SECOND,
            vertical_overflow="crop",
        )
        self.is_live = can_redraw(self._console)

    def __enter__(self) -> Self:
        self._step_ends = [time.monotonic()]
        if self.is_live:
            self._live.start()
        else:
            self._print(f"{self.title}: steps {self.first_step} to {self.total_steps}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.is_live:
            self._live.stop()

    def step(self, metrics: Metrics) -> None:
        """Show one finished step's metrics (keys of metrics.jsonl; those that are missing are not shown)."""
        self._history.append(dict(metrics))
        self._step_ends.append(time.monotonic())
        if not self.is_live:
            self._print(self._plain_line(metrics))

    def sample(self, prompt: str, completion: str, reward: float) -> None:
        """Show one completion and its reward, with what earned it marked where the reward function is a known one."""
        self._sample = (one_line(prompt), one_line(completion), f"reward {number(reward)}")
        self._sample_step = self._last_step()
        if not self.is_live:
            self._print(f"  sample (reward {number(reward)}): {one_line(prompt + completion)}")

    def note(self, message: str) -> None:
        """Print a message that stays, above the panel."""
        if self.is_live:
            self._console.print(Text(printable(message)))
        else:
            self._print(message)

    def seconds_left(self) -> float | None:
        """Estimate from the last steps; None before the first one. The first step warms up, so it only counts alone."""
        taken = [end - start for start, end in zip(self._step_ends, self._step_ends[1:], strict=False)]
        if not taken:
            return None
        recent = taken[1:][-20:] or taken
        return fmean(recent) * max(0, self.total_steps - self._last_step())

    def _last_step(self) -> int:
        return int(self._history[-1]["step"] or 0) if self._history else self.first_step - 1

    def _print(self, line: str) -> None:
        """One plain line, written out at once; never fatal (the reader may be gone, the encoding may lack
        characters)."""
        stream = self._console.file
        encoding = getattr(stream, "encoding", None) or "utf-8"
        try:
            print(printable(line).encode(encoding, "replace").decode(encoding), file=stream, flush=True)
        except OSError:
            self._print = lambda line: None  # type: ignore[method-assign]

    def _plain_line(self, metrics: Metrics) -> str:
        line = f"step {metrics['step']:>{len(str(self.total_steps))}}/{self.total_steps}"
        for metric in table.METRICS:
            value = metrics.get(metric.key)
            if metric.plain and value is not None:
                line += metric.plain.format(text=metric.write(value), value=value)
        return f"{line}  left {duration(self.seconds_left() or 0)}"

    # The live panel, from top to bottom

    def _render(self) -> RenderableType:
        width = self._console.width
        numbers = Group(self._progress(), Text(), self._numbers(width), Text(), *self._stages(width))
        body: RenderableType = numbers
        if self._sample and width >= WIDE_COLUMNS:
            body = Table.grid(expand=True, padding=(0, 2))
            body.add_column(ratio=3)
            body.add_column(ratio=2)
            body.add_row(numbers, self._story(max_characters=2000))
        elif self._sample:
            lines_left = max(2, self._console.height - 12 - sum(metric.panel for metric in table.METRICS))
            story = self._story(max_characters=min(6, lines_left) * (width - 6))
            body = Group(numbers, Text(), Rule(style="dim", characters="╌"), story)
        title = Text.assemble(("fastkl ", "bold"), (self.title, "dim"), overflow="ellipsis", no_wrap=True)
        return Panel(
            body, title=title, title_align="left", border_style="bright_black", box=box.ROUNDED, padding=(0, 1)
        )

    def _progress(self) -> RenderableType:
        left = self.seconds_left()
        elapsed = time.monotonic() - self._step_ends[0] if self._step_ends else 0.0
        bar = ProgressBar(total=self.total_steps, completed=self._last_step(), complete_style="green")
        line = Table.grid(expand=True, padding=(0, 1))
        line.add_column(no_wrap=True)
        line.add_column(ratio=1)
        line.add_column(no_wrap=True)
        time_left = "first step" if left is None else f"{duration(left)} left" if left else "done"
        line.add_row(
            Text(f"step {self._last_step()}/{self.total_steps}", "bold"),
            bar,
            Text.assemble(duration(elapsed), (" · ", "dim"), (time_left, "bold")),
        )
        return line

    def _numbers(self, width: int) -> RenderableType:
        rows = Table(
            box=None,
            expand=True,
            padding=(0, 1, 0, 0),
            pad_edge=False,
            header_style="dim",
            show_header=bool(self._history),
        )
        rows.add_column("", no_wrap=True)
        rows.add_column("now", justify="right", no_wrap=True)
        rows.add_column("first", justify="right", no_wrap=True, style="dim")
        rows.add_column("", no_wrap=True, style="dim")
        rows.add_column("", ratio=1, no_wrap=True, style="cyan")
        spark_width = max(8, (width if width < WIDE_COLUMNS else width * 3 // 5) - 52)
        for metric in (metric for metric in table.METRICS if metric.panel):
            series = [value for step in self._history if (value := step.get(metric.key)) is not None]
            if not series:
                continue
            colour = "" if rows.row_count else "green"  # the first is what the run is about
            now, first = metric.write(series[-1]), metric.write(series[0])
            history = Text(blocks(series, spark_width), colour)
            rows.add_row(metric.name, Text(now, f"bold {colour}"), first, metric.unit, history)
        if not self._history:
            rows.add_row(Text("sampling the first completions …", "dim italic"))
        return rows

    def _stages(self, width: int) -> list[Text]:
        """The stacked bar of time per stage over the last ten steps, and its legend."""
        seconds = stage_seconds(self._history[-10:])
        total = sum(seconds.values())
        if not total:
            return []
        columns = (width if width < WIDE_COLUMNS else width * 3 // 5 - 1) - 4
        bar, legend, position, drawn = Text(no_wrap=True), Text.assemble(("time  ", "dim")), 0.0, 0
        for name, share in ((name, value / total) for name, value in seconds.items()):
            position += share * columns
            bar.append("━" * (round(position) - drawn), STAGE_COLOURS[name])
            drawn = round(position)
            if share >= 0.005:
                legend.append("■ ", STAGE_COLOURS[name]).append(f"{name} {percent(share)}  ")
        return [bar, legend]

    def _story(self, max_characters: int) -> Text:
        prompt, completion, reward = self._sample or ("", "", "")
        names = table.reward_names(self._history[-1] if self._history else ())
        text = prompt + completion
        story = Text.assemble((text, ""), overflow="fold")
        story.stylize("dim", 0, len(prompt))
        for start, end in reward_spans(names, text):
            story.stylize("not dim bold yellow", start, end)
        story.truncate(max_characters, overflow="ellipsis")
        return Text.assemble((f"a completion of step {self._sample_step}, ", "dim"), (reward, "green"), "\n", story)


def can_redraw(console: Console) -> bool:
    """Whether a live panel suits this output: a Unicode terminal that can move its cursor, unless CI or NO_COLOR is
    set."""
    asked_for_plain = any(os.environ.get(name, "") not in ("", "0", "false") for name in ("CI", "NO_COLOR"))
    return (
        console.is_terminal
        and not console.is_dumb_terminal
        and console.encoding.startswith("utf")
        and not asked_for_plain
    )
