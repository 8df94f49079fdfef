"""What a person sees while a run trains: a live panel on a terminal, one compact line per step anywhere else.

In: the metrics dict of each step, a sample completion now and then, notes. Out: text on standard output.
Plain lines are used when standard output is not a terminal that can redraw, and when CI is set; NO_COLOR takes the
colours away and leaves the panel.
What is shown of a step, and how it is written: metrics.py. Left out: files (loggers.py) and pictures (page/).
"""

from __future__ import annotations

import itertools
import math
import os
import sys
import termios
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from statistics import fmean
from types import TracebackType
from typing import IO, Any, Self

from rich import box
from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from fastkl.errors import printable
from fastkl.report import conversation
from fastkl.report import metrics as table
from fastkl.report.metrics import STAGES
from fastkl.report.numbers import duration, finite, number, percent
from fastkl.rewards.built_in import reward_spans

Metrics = Mapping[str, float | int | None]


BARS = "▁▂▃▄▅▆▇"  # no full block: rows would touch


WIDE_COLUMNS = 120  # from here on, the sample stands beside the numbers


ROOMY_HEIGHT = 30  # from here on, blank lines part the panel's blocks


WARM_UP_RATIO = 1.3  # a first step that takes this much longer than the second is explained


PLAIN_CHARACTERS = 2000  # of a sample in plain lines


PROMPT_SHARE = 0.3  # of the room for a sample: the end of its prompt; the completion has the rest


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
    history = [step for step in history if step.get("step") != 0]  # that is no step but an evaluation

    def mean(key: str) -> float:
        return sum(finite(step.get(key)) for step in history) / max(1, len(history))

    named = {stage: mean(f"time/{stage}_s") for stage in STAGES}
    return {**named, "other": max(0.0, mean("time/step_s") - sum(named.values()))}


def warm_up(first: Metrics, second: Metrics) -> str:
    """Where the first step's time went, in a sentence, if it took much longer than the second; else nothing."""
    taken, usual = (finite(step.get("time/step_s")) for step in (first, second))
    if taken < WARM_UP_RATIO * usual or taken - usual < 1:
        return ""
    keys = {stage: f"time/{stage}_s" for stage in STAGES}
    stage = max(STAGES, key=lambda stage: finite(first.get(keys[stage])) - finite(second.get(keys[stage])))
    before, after = (finite(step.get(keys[stage])) for step in (first, second))
    return (
        f"The first step took {taken:.1f} s, the second {usual:.1f} s: it compiles and fills caches, most of it in "
        f"{stage} ({before:.1f} s, then {after:.1f} s)."
    )


def one_line(text: str) -> str:
    """Text safe for a terminal: line breaks shown as a sign, other control characters (escape codes too) as blanks."""
    return printable(" ⏎ ".join(text.splitlines()))


class View:
    """The display of one run; a context manager.

    title: what is trained, for the panel's border. total_steps: the last step's number. first_step: the first one
    that this process runs, above 1 for a resumed run. console: rich's, for tests; standard output by default.
    """

    def __init__(self, title: str, *, total_steps: int, first_step: int = 1, console: Console | None = None) -> None:
        self.title, self.total_steps, self.first_step = one_line(title), total_steps, first_step
        self._console = console or Console()
        self._history: list[Metrics] = []
        self._step_ends: list[float] = []  # seconds on the monotonic clock; the first entry is the start
        self._sample: Sample | None = None
        self._closing: list[str] = []
        self._unsaid: list[str] = []  # what came in the middle of another line, from the handler of a signal
        self._live = Live(
            get_renderable=self._render,
            console=self._console,
            refresh_per_second=REFRESHES_PER_SECOND,
            vertical_overflow="crop",
        )
        self.is_live = can_redraw(self._console)
        self._open = ExitStack()

    def __enter__(self) -> Self:
        self._step_ends = [time.monotonic()]
        if self.is_live:
            self._open.enter_context(keys_unechoed(self._console.file))
            self._open.enter_context(self._live)
        else:
            left = f"steps {self.first_step} to {self.total_steps}"
            self._print(f"{self.title}: {left if self.first_step <= self.total_steps else 'no step is left'}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):  # the terminal may be gone
            self._open.close()
        for line in self._closing:
            self._print(line)

    def recall(self, earlier: Iterable[Metrics]) -> None:
        """Takes in the steps of a resumed run that earlier processes have run, in order, or an evaluation of step 0."""
        self._history += [step for step in earlier if isinstance(step.get("step"), int)]

    def step(self, metrics: Metrics) -> None:
        """Show one finished step's metrics (keys of metrics.jsonl; those that are missing are not shown)."""
        self._history.append(dict(metrics))
        self._step_ends.append(time.monotonic())
        if not self.is_live:
            self._print(self._plain_line(metrics))
        if len(self._step_ends) == 3 and (why := warm_up(*self._history[-2:])):
            self.note(why)

    def samples(self, samples: Sequence[Mapping[str, Any]]) -> None:
        """Show the completion with the highest reward of a step's records of samples.jsonl, if any has a reward."""
        scored = [sample for sample in samples if sample["reward"] is not None]
        if not scored:
            return
        best = max(scored, key=lambda sample: float(sample["reward"]))
        alike = len(samples) > 1 and all(sample["reward"] == best["reward"] for sample in scored)
        self._sample = Sample(best, self._last_step(), "one" if alike else "best", len(samples))
        if not self.is_live:
            text = self._sample.text(PLAIN_CHARACTERS).plain.replace("\n", " ")
            self._print(f"  {self._sample.about}: {text}")

    def note(self, message: str) -> None:
        """Print a message that stays, above the panel. Raises nothing: signals' handlers call it, at any moment, and
        the terminal may be gone."""
        if self.is_live:
            with suppress(OSError, RuntimeError):
                self._console.print(Text(printable(message)))
        else:
            self._print(message)

    def close_with(self, message: str) -> None:
        """Print a message when the display ends, below everything."""
        self._closing.append(message)

    def seconds_left(self) -> float | None:
        """Estimate from the last steps. The first of them warms up, so there is none before the second."""
        taken = [end - start for start, end in zip(self._step_ends, self._step_ends[1:], strict=False)]
        steps = max(0, self.total_steps - self._last_step())
        return fmean(taken[1:][-20:]) * steps if taken[1:] else 0.0 if not steps else None

    def _last_step(self) -> int:
        return int(self._history[-1]["step"] or 0) if self._history else self.first_step - 1

    def _print(self, line: str) -> None:
        """One plain line, written out at once; never fatal (the reader may be gone, the disk may be full, the encoding
        may lack characters)."""
        stream = self._console.file
        encoding = getattr(stream, "encoding", None) or "utf-8"
        lines, self._unsaid = [*self._unsaid, printable(line).encode(encoding, "replace").decode(encoding)], []
        try:
            print("\n".join(lines), file=stream, flush=True)
        except RuntimeError:  # the handler of a signal that came while another line was being written
            self._unsaid = lines
        except OSError:
            self._print = lambda line: None  # type: ignore[method-assign]
            if stream is sys.stdout:
                sys.stdout = None  # otherwise the interpreter would try again at its end, and exit with 120

    def _plain_line(self, metrics: Metrics) -> str:
        line = f"step {metrics['step']:>{len(str(self.total_steps))}}/{self.total_steps}"
        line += "".join(table.written("plain", metrics))
        left = self.seconds_left()
        return line if left is None else f"{line}  left {duration(left)}"

    # The live panel, from top to bottom

    def _render(self) -> RenderableType:
        width, height = self._console.width, self._console.height
        gap = [Text()] if height >= ROOMY_HEIGHT else []
        numbers = Group(
            self._progress(), *gap, self._numbers(width), *self._waiting(), *self._brief(), *gap, *self._stages(width)
        )
        body: RenderableType = numbers
        if self._sample and width >= WIDE_COLUMNS:
            body = Table.grid(expand=True, padding=(0, 2))
            body.add_column(ratio=3)
            body.add_column(ratio=2)
            lines_left = height - self._closing_rows(width) - 4  # borders, heading, the cursor's own line
            body.add_row(numbers, self._story(max_characters=max(2, lines_left) * (width * 2 // 5 - 6)))
        elif self._sample:
            options = self._console.options.update(width=width - 4, height=None)
            above = len(self._console.render_lines(numbers, options)) + 2 * len(gap)
            lines_left = height - above - self._closing_rows(width) - 5  # borders, rule, heading, the cursor's own line
            story = self._story(max_characters=max(1, min(12, lines_left)) * (width - 6))
            body = Group(numbers, *gap, Rule(style="dim", characters="╌"), story)
        title = Text.assemble(("fastkl ", "bold"), (self.title, "dim"), overflow="ellipsis", no_wrap=True)
        return Panel(
            body, title=title, title_align="left", border_style="bright_black", box=box.ROUNDED, padding=(0, 1)
        )

    def _closing_rows(self, width: int) -> int:
        return sum(max(1, math.ceil(cell_len(line) / width)) for line in self._closing)

    def _progress(self) -> RenderableType:
        left = self.seconds_left()
        elapsed = time.monotonic() - self._step_ends[0] if self._step_ends else 0.0
        bar = ProgressBar(total=self.total_steps, completed=self._last_step(), complete_style="green")
        line = Table.grid(expand=True, padding=(0, 1))
        line.add_column(no_wrap=True)
        line.add_column(ratio=1)
        line.add_column(no_wrap=True)
        warming = "first step" if len(self._step_ends) < 2 else "time left after the next step"
        time_left = warming if left is None else f"{duration(left)} left" if left else "done"
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
        return rows

    def _waiting(self) -> list[Text]:
        """What takes so long at first."""
        if len(self._step_ends) > 1:
            return []
        return [Text("sampling the first completions … the first step warms up and takes longer", "dim italic")]

    def _brief(self) -> list[Text]:
        """The small numbers of the last step, one after another."""
        parts = table.written("brief", self._history[-1]) if self._history else []
        return [Text(" · ".join(map(one_line, parts)), "dim")] if parts else []

    def _stages(self, width: int) -> list[Text]:
        """The stacked bar of time per stage over the last ten steps, and its legend; without colours the legend."""
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
                swatch = "" if self._console.no_color else "■ "
                legend.append(swatch, STAGE_COLOURS[name]).append(f"{name} {percent(share)}  ")
        return [legend] if self._console.no_color else [bar, legend]

    def _story(self, max_characters: int) -> Text:
        if self._sample is None:
            return Text()
        return Text.assemble((self._sample.about, "dim"), "\n", self._sample.text(max_characters))


@dataclass(frozen=True, slots=True)
class Sample:
    """A completion on display."""

    record: Mapping[str, Any]  # its record of samples.jsonl
    step: int
    rank: str  # "best", or "one" where all of the step have the same reward
    among: int

    @property
    def about(self) -> str:
        """Which one it is, and what it earned."""
        given = {name: value for name, value in (self.record.get("rewards") or {}).items() if value is not None}
        parts = ", ".join(f"{one_line(str(name))} {number(value)}" for name, value in given.items())
        each = f" ({parts})" if len(given) > 1 else ""
        cut = ", cut at the length limit" if self.record.get("finish_reason") == "length" else ""
        which = f"{self.rank} of {self.among}" if self.among > 1 else "the completion"
        return f"step {self.step}, {which}, reward {number(self.record['reward'])}{each}{cut}"

    def text(self, max_characters: int) -> Text:
        """The end of the prompt, dim, and the completion, with what earned its reward marked where that is known."""
        role, prompt = conversation.prompt_turns(self.record)[-1]
        completion = one_line(conversation.completion_text(self.record))
        room = max(int(max_characters * PROMPT_SHARE), max_characters - len(completion) - 40)
        shown = Text(overflow="fold").append((f"{role}: " if role else "") + ending(one_line(prompt), room), "dim")
        if not conversation.continues(self.record):
            shown.append(f"\n{conversation.ANSWERS}: ", "dim")
        begin = len(shown)
        shown.append(completion)
        chat, names = conversation.is_chat(self.record), list(self.record.get("rewards") or ())
        whole = completion if chat else shown.plain
        for start, end in reward_spans(names, whole):
            shown.stylize("not dim bold yellow", *(at + begin * chat for at in (start, end)))
        shown.truncate(max_characters, overflow="ellipsis")
        return shown


def ending(text: str, most: int) -> str:
    """The text; the end of one that is longer than `most` characters."""
    return text if len(text) <= most else f"…{text[len(text) - most + 1 :]}"


@contextmanager
def keys_unechoed(stream: IO[str]) -> Iterator[None]:
    """While it lasts, the terminal does not write ^C into the panel. Nothing for what is no terminal of ours."""
    with ExitStack() as stack:
        with suppress(OSError, ValueError, termios.error):
            file = stream.fileno()
            before = termios.tcgetattr(file)
            if os.tcgetpgrp(file) == os.getpgrp():  # a background process must not touch it
                quiet = termios.tcgetattr(file)
                quiet[3] &= ~termios.ECHOCTL
                termios.tcsetattr(file, termios.TCSADRAIN, quiet)
                stack.callback(restore_keys, file, before)
        yield


def restore_keys(file: int, settings: list[Any]) -> None:
    """Sets the terminal as it was, unless it has gone or we are in the background by now."""
    with suppress(OSError, termios.error):
        if os.tcgetpgrp(file) == os.getpgrp():
            termios.tcsetattr(file, termios.TCSADRAIN, settings)


def can_redraw(console: Console) -> bool:
    """Whether a live panel suits this output: a Unicode terminal that can move its cursor, unless CI is set."""
    in_ci = os.environ.get("CI", "") not in ("", "0", "false")
    return console.is_terminal and not console.is_dumb_terminal and console.encoding.startswith("utf") and not in_ci
