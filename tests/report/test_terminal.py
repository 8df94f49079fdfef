"""The terminal view: what the panel and the plain lines say, on wide, narrow and dumb outputs."""

from __future__ import annotations

import io
import itertools
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from fastkl.cli import main
from fastkl.errors import UserError
from fastkl.report import terminal as view_module
from fastkl.report.numbers import duration, number, percent
from fastkl.report.page.stories import pieces
from fastkl.report.terminal import View, blocks, can_redraw, one_line, stage_seconds
from fastkl.rewards.built_in import alliterating_runs, alliteration, reward_spans
from fastkl.score_files.progress import ScoreView

METRICS: dict[str, Any] = {
    "step": 3,
    "reward/raw": 5.25,
    "reward/alliteration": 5.25,
    "kl/mean": 3.5,
    "lm_cross_entropy": 1.31,
    "original_lm_cross_entropy": 1.42,
    "entropy": 1.3,
    "diversity/distinct_2": 0.61,
    "grammar/well_formed": 0.97,
    "throughput/tokens_per_second": 3123.0,
    "time/generate_s": 1.0,
    "time/reward_s": 0.0,
    "time/score_s": 0.5,
    "time/update_s": 2.0,
    "time/sync_s": 0.1,
    "time/step_s": 4.0,
}
TEXT = " there was a big brown bear. It sat by the silver sea."


class Clock:
    """Replaces time.monotonic: each call to `pass_` moves it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(view_module.time, "monotonic", lambda: self.now)

    def pass_(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture(autouse=True)
def quiet_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CI", "NO_COLOR", "FORCE_COLOR", "TERM", "TTY_COMPATIBLE", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def terminal(width: int, height: int = 24) -> Console:
    return Console(width=width, height=height, force_terminal=True, file=io.TextIOWrapper(io.BytesIO(), "utf-8"))


def panel(width: int, height: int = 24, steps: int = 3) -> list[str]:
    """The live panel's lines, without styles, after some steps and a sample."""
    shown = View("storyteller → alliteration", total_steps=40, console=terminal(width, height))
    shown._step_ends = [0.0]
    for step in range(1, steps + 1):
        shown.step(METRICS | {"step": step, "reward/raw": 5.25 * step / steps})
    shown.sample("Once upon a time", TEXT, 5.0)
    plain = Console(width=width, height=height, file=io.StringIO())
    plain.print(shown._render())
    return plain.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [60, 80, 119, 160, 240])
def test_panel_fits_every_width_and_shows_every_number(width: int) -> None:
    lines = panel(width)
    assert {cell_len(line) for line in lines} == {width}
    assert len(lines) <= 24
    text = "\n".join(lines)
    for piece in (
        "step 3/40",
        "5.25",
        "3.50",
        "1.31",
        "1.42",
        "1.30",
        "61 %",
        "97 %",
        "3,123",
        "generate 25 %",
        "other 10 %",
    ):
        assert piece in text, piece
    assert "Once upon a time there was a big" in text and "a completion of step 3, reward 5.00" in text


def test_panel_before_the_first_step_says_what_is_going_on() -> None:
    shown = View("run", total_steps=40, first_step=11, console=terminal(80))
    plain = Console(width=80, file=io.StringIO())
    plain.print(shown._render())
    text = plain.file.getvalue()
    assert "step 10/40" in text and "sampling the first completions" in text and "first step" in text


def test_time_bar_has_each_stage_in_proportion() -> None:
    shown = View("run", total_steps=40, console=terminal(84))
    shown.step(METRICS)
    bar, legend = shown._stages(84)
    lengths = {str(span.style): span.end - span.start for span in bar.spans}
    assert lengths == {"dodger_blue2": 20, "medium_turquoise": 10, "dark_orange3": 40, "orchid": 2, "grey50": 8}
    assert "reward" not in legend.plain and "update 50 %" in legend.plain


def test_stage_seconds_are_means_and_name_the_rest() -> None:
    history = [{"time/generate_s": 1.0, "time/step_s": 4.0}, {"time/generate_s": 3.0, "time/step_s": None}]
    assert stage_seconds(history) == {"generate": 2.0, "reward": 0, "score": 0, "update": 0, "sync": 0, "other": 0.0}
    assert stage_seconds(history[:1])["other"] == 3.0


def test_time_left_comes_from_the_steps_after_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    shown = View("run", total_steps=30, first_step=21, console=Console(file=io.StringIO()))
    with shown:
        assert shown.seconds_left() is None
        clock.pass_(60)  # the first step warms up
        shown.step(METRICS | {"step": 21})
        assert shown.seconds_left() == pytest.approx(60 * 9)
        for step in (22, 23):
            clock.pass_(4)
            shown.step(METRICS | {"step": step})
        assert shown.seconds_left() == pytest.approx(4 * 7)


def test_plain_line_says_it_all_on_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    with View("story", total_steps=40) as shown:
        clock.pass_(4)
        shown.step(METRICS)
        shown.sample("Once upon a time", "\nthere \x1b[31mwas", 5.0)
        shown.note("saved step-3")
        shown.step({"step": 4, "reward/raw": 6.0})
    assert capsys.readouterr().out.splitlines() == [
        "story: steps 1 to 40",
        "step  3/40  reward 5.25  kl 3.50  ce 1.31/1.42  distinct-2 61 %  well-formed 97 %"
        "  3,123 tok/s  4.0 s  left 2:28",
        "  sample (reward 5.00): Once upon a time ⏎ there  [31mwas",
        "saved step-3",
        "step  4/40  reward 6.00  left 0:00",
    ]


@pytest.mark.parametrize(("name", "value", "redraws"), [("CI", "1", False), ("NO_COLOR", "1", False), ("CI", "", True)])
def test_ci_and_no_color_ask_for_plain_lines(
    name: str, value: str, redraws: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    assert can_redraw(terminal(80)) is redraws
    assert can_redraw(Console(file=io.StringIO())) is False


def test_dumb_and_ascii_terminals_get_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    assert can_redraw(terminal(80))
    assert not can_redraw(Console(force_terminal=True, file=io.TextIOWrapper(io.BytesIO(), "ascii")))
    monkeypatch.setenv("TERM", "dumb")
    assert not can_redraw(terminal(80))


def test_live_session_draws_notes_and_a_last_panel() -> None:
    console = terminal(100, 30)
    with View("run", total_steps=2, console=console) as shown:
        assert shown.is_live
        shown.step(METRICS | {"step": 1})
        shown.note("[bold]saved[/bold] step-1")
        shown.step(METRICS | {"step": 2})
    console.file.seek(0)
    output = console.file.read()
    assert "[bold]saved[/bold] step-1" in output  # notes are text, not markup
    assert "step 2/2" in output.split("saved")[-1] and "done" in output


def test_a_reader_that_leaves_and_an_ascii_output_do_not_stop_a_run() -> None:
    class Gone(io.StringIO):
        def write(self, _: str) -> int:
            raise BrokenPipeError

    with View("run", total_steps=2, console=Console(file=Gone())) as shown:
        shown.step(METRICS)
    raw = io.BytesIO()
    with View("β", total_steps=2, console=Console(file=io.TextIOWrapper(raw, "ascii"))) as shown:
        shown.note("über")
        assert raw.getvalue() == b"?: steps 1 to 2\n?ber\n"


def test_control_characters_never_reach_the_terminal() -> None:
    assert one_line("a\x1b]0;evil\x07b\tc\r\nd\u202ee") == "a ]0;evil b c ⏎ d e"


def test_escape_codes_in_notes_and_errors_never_reach_the_terminal(tmp_path, monkeypatch, capsys) -> None:
    evil, safe = "judge: \x1b]0;evil\x07 \x9b31m a\u202eb\nnext", "judge:  ]0;evil   31m a b\nnext"
    for terminal in (False, True):
        out = io.StringIO()
        console = Console(file=out, force_terminal=terminal, width=80, color_system=None)
        with View("x", total_steps=1, console=console) as view:
            view.note(evil)
        assert safe in out.getvalue() and not {"\x07", "\x9b", "\u202e"} & set(out.getvalue())
        out = io.StringIO()
        with ScoreView(None, Console(file=out, force_terminal=terminal, width=80, color_system=None)) as scoring:
            scoring.note(evil)
        assert safe in out.getvalue() and not {"\x07", "\x9b", "\u202e"} & set(out.getvalue())

    def fail(path: Path) -> None:
        raise UserError(evil)

    monkeypatch.setattr("fastkl.audit.doctor.diagnose", fail)
    assert main(["doctor", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"fastkl: {safe}\n"


def test_sparkline_shows_bucket_means_from_lowest_to_highest() -> None:
    assert blocks([0, 1, 2, 3, 4, 5, 6], 7) == view_module.BARS
    assert blocks([0, 0, 6, 6, 12, 12], 3) == "▁▄▇"
    assert blocks([5, 5, 5], 9) == "▁▁▁"
    assert blocks([], 9) == blocks([float("nan")], 9) == blocks([1.0], 0) == ""
    rng = random.Random(0)
    values = [rng.random() for _ in range(1000)]
    line = blocks(values, 10)
    means = [sum(values[start : start + 100]) / 100 for start in range(0, 1000, 100)]
    assert (
        line[means.index(max(means))] == view_module.BARS[-1] and line[means.index(min(means))] == view_module.BARS[0]
    )


def test_numbers_are_short_and_readable() -> None:
    assert [number(x) for x in (0, 3120.4, 31.24, -3.125, 0.1, 0.0312, 1.2e-5, 999.96)] == [
        *("0.00", "3,120", "31.2", "-3.12", "0.10", "0.031", "1.2e-5", "1,000"),
    ]
    assert [number(float("nan")), percent(0.966), duration(59.6), duration(3723)] == ["nan", "97 %", "1:00", "1:02:03"]


def pairs_that_alliterate(text: str) -> set[tuple[int, int]]:
    """Brute force over words: positions of the first letters of adjacent pairs with the same first letter."""
    starts = [i for i in range(len(text)) if not text[i].isspace() and (i == 0 or text[i - 1].isspace())]
    alike = [(a, b) for a, b in itertools.pairwise(starts) if text[a].isalpha() and text[a].lower() == text[b].lower()]
    return set(alike)


def test_marked_runs_hold_exactly_the_alliterating_pairs() -> None:
    rng = random.Random(1)
    for _ in range(200):
        text = "".join(rng.choice('aAbB "\n.1é') for _ in range(40))
        spans = alliterating_runs(text)
        inside = {(a, b) for a, b in pairs_that_alliterate(text) if any(start <= a and b < end for start, end in spans)}
        assert inside == pairs_that_alliterate(text)
        assert alliteration([""], [text]) == [sum(len(text[a:b].split()) - 1 for a, b in spans)]  # as it is rewarded
        for start, end in spans:
            firsts = {word[0].lower() for word in text[start:end].split()}
            assert len(firsts) == 1 and len(text[start:end].split()) > 1
        assert "".join(piece for piece, _ in pieces(text, spans)) == text
    assert reward_spans(["unknown"], "big bear") == [] and reward_spans(["unknown", "starts_with_a"], "an Ape ran") == [
        (0, 2),
        (3, 6),
    ]


def test_the_sample_is_marked_where_it_earned_its_reward() -> None:
    shown = View("run", total_steps=4, console=Console(file=io.StringIO()))
    shown.step(METRICS)
    shown.sample("Once upon a time", TEXT, 5.0)
    story = shown._story(500)
    marked = [story.plain[span.start : span.end] for span in story.spans if "yellow" in str(span.style)]
    assert marked == ["time there", "big brown bear.", "silver sea."]


def test_standard_output_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    with View("run", total_steps=1) as shown:
        assert not shown.is_live and shown._console.file is sys.stdout
    assert capsys.readouterr().out == "run: steps 1 to 1\n"
