"""The terminal view: what the panel and the plain lines say, on wide, narrow and dumb outputs."""

from __future__ import annotations

import io
import itertools
import os
import random
import re
import signal
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
    "completion/mean_length": 63.5,
    "completion/truncated_share": 0.12,
    "grad_norm": 1.25,
    "lr": 1e-4,
    "throughput/tokens_per_second": 3123.0,
    "time/generate_s": 1.0,
    "time/reward_s": 0.0,
    "time/score_s": 0.5,
    "time/update_s": 2.0,
    "time/sync_s": 0.1,
    "time/step_s": 4.0,
    "memory/peak_rss_gb": 2.5,
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


def story(reward: float | None, **more: Any) -> dict[str, Any]:
    """A record of samples.jsonl."""
    record = {"prompt": "Once upon a time", "completion": TEXT, "reward": reward, "rewards": {"alliteration": reward}}
    return record | {"finish_reason": "stop"} | more


def panel(width: int, height: int = 24, steps: int = 3) -> list[str]:
    """The live panel's lines, without styles, after some steps and a sample."""
    shown = View("storyteller → alliteration", total_steps=40, console=terminal(width, height))
    shown._step_ends = [0.0]
    for step in range(1, steps + 1):
        shown.step(METRICS | {"step": step, "reward/raw": 5.25 * step / steps})
    shown.samples([story(1.0), story(5.0), story(None)])
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
        "length 63.5 · cut 12 % · gradient 1.25 · lr 1.0e-4",
        "2.50 GB",
    ):
        assert piece in text, piece
    assert "Once upon a time there was a big" in text and "step 3, best of 3, reward 5.00" in text


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
        assert shown.seconds_left() is None
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
        shown.step(METRICS | {"step": 2})
        clock.pass_(4)
        shown.step(METRICS | {"reward/brevity": -0.5})
        evil = story(5.0, completion="\nthere \x1b[31mwas", rewards={"alliteration": 5.0, "brev\x1b[1mity": 0.25})
        shown.samples([evil | {"finish_reason": "length"}, story(4.0)])
        shown.note("saved step-3")
        shown.step({"step": 4, "reward/raw": 6.0})
    assert capsys.readouterr().out.splitlines() == [
        "story: steps 1 to 40",
        "step  2/40  reward 5.25  kl 3.50  ce 1.31/1.42  distinct-2 61 %  well-formed 97 %"
        "  length 63.5  cut 12 %  gradient 1.25  lr 1.0e-4  3,123 tok/s  4.0 s",
        "step  3/40  reward 5.25  alliteration 5.25  brevity -0.50  kl 3.50  ce 1.31/1.42  distinct-2 61 %"
        "  well-formed 97 %  length 63.5  cut 12 %  gradient 1.25  lr 1.0e-4  3,123 tok/s  4.0 s  left 2:28",
        "  step 3, best of 2, reward 5.00 (alliteration 5.00, brev [1mity 0.25), cut at the length limit: "
        "Once upon a time ⏎ there  [31mwas",
        "saved step-3",
        "step  4/40  reward 6.00  left 1:12",
    ]


@pytest.mark.parametrize(("name", "value", "redraws"), [("CI", "1", False), ("NO_COLOR", "1", True), ("CI", "", True)])
def test_ci_asks_for_plain_lines_and_no_color_does_not(
    name: str, value: str, redraws: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    assert can_redraw(terminal(80)) is redraws
    assert can_redraw(Console(file=io.StringIO())) is False


def test_the_sample_is_called_the_best_only_where_it_is() -> None:
    shown = View("run", total_steps=4, console=Console(file=io.StringIO(), width=200))
    shown.step({"step": 1})

    def about(*rewards: float | None) -> str:
        shown.samples([story(reward) for reward in rewards])
        return shown._sample.about if shown._sample else ""

    assert about(None, None) == ""
    assert about(-2.0, None, -1.0) == "step 1, best of 3, reward -1.00"
    assert about(0.0, 0.0) == "step 1, one of 2, reward 0.00"
    assert about(3.0) == "step 1, the completion, reward 3.00"
    shown.samples([story(None)])
    assert shown._sample.about == "step 1, the completion, reward 3.00"  # a step without rewards leaves the last one


def test_of_a_chat_the_last_question_and_the_answer_are_shown_by_their_roles() -> None:
    question = "A riddle. " * 300 + "What is 3 + 4?"
    messages = [{"role": "system", "content": "Be \x1b[5mbrief."}, {"role": "user", "content": question}]
    rendered = f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n"
    chat = story(1.0, prompt=rendered, messages=messages, completion="A big, bold 7.")
    shown = View("run", total_steps=4, console=terminal(80))
    shown.step({"step": 1})
    shown.samples([chat])
    text = shown._story(300).plain
    assert "<|im_start|>" not in text and "system" not in text
    assert text.splitlines()[1].startswith("user: …") and text.splitlines()[1].endswith("What is 3 + 4?")
    assert text.splitlines()[2] == "assistant: A big, bold 7."
    marked = [shown._story(300).plain[s.start : s.end] for s in shown._story(300).spans if "yellow" in str(s.style)]
    assert marked == ["big, bold"]
    begun = story(1.0, messages=[*messages, {"role": "assistant", "content": "The sum"}], completion=" is 7.")
    shown.samples([begun])
    assert shown._story(300).plain.splitlines()[1:] == ["assistant: The sum is 7."]


def test_a_long_first_step_is_explained_by_the_stage_that_took_the_time(capsys) -> None:
    first = METRICS | {"step": 1, "time/generate_s": 16.0, "time/update_s": 2.5, "time/step_s": 29.6}
    second = METRICS | {"step": 2, "time/generate_s": 6.5, "time/step_s": 19.2}
    with View("run", total_steps=40) as shown:
        for step in (first, second, second | {"step": 3}):
            shown.step(step)
    (why,) = [line for line in capsys.readouterr().out.splitlines() if "first step" in line]
    assert "took 29.6 s, the second 19.2 s" in why and "most of it in generate (16.0 s, then 6.5 s)" in why
    assert view_module.warm_up(first, first) == view_module.warm_up(METRICS, METRICS) == ""
    assert view_module.warm_up({"time/step_s": 0.9}, {"time/step_s": 0.1}) == ""  # of no interest


def test_a_resumed_run_shows_the_history_of_the_whole_run() -> None:
    shown = View("run", total_steps=40, first_step=3, console=terminal(100))
    shown.recall([{"step": step, "reward/raw": float(step), "time/step_s": 4.0} for step in (1, 2)])
    shown._step_ends = [0.0]
    plain = Console(width=100, file=io.StringIO())
    plain.print(shown._render())
    before = plain.file.getvalue()
    assert "step 2/40" in before and re.search(r"reward +2\.00 +1\.00", before) and "first completions" in before
    shown.step({"step": 3, "reward/raw": 9.0})
    plain.print(shown._render())
    assert re.search(r"reward +9\.00 +1\.00 .*▁▂▇", plain.file.getvalue())


def test_without_colours_the_bar_of_times_gives_way_to_its_legend() -> None:
    console = Console(width=80, height=24, force_terminal=True, file=io.StringIO(), no_color=True)
    shown = View("run", total_steps=40, console=console)
    shown.step(METRICS)
    (legend,) = shown._stages(80)
    assert "generate 25 %" in legend.plain and "■" not in legend.plain


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
    shown.samples([story(5.0)])
    text = shown._story(500)
    marked = [text.plain[span.start : span.end] for span in text.spans if "yellow" in str(span.style)]
    assert marked == ["time there", "big brown bear.", "silver sea."]


def test_standard_output_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    with View("run", total_steps=1) as shown:
        assert not shown.is_live and shown._console.file is sys.stdout
    assert capsys.readouterr().out == "run: steps 1 to 1\n"


class SignalledWhileWriting(io.RawIOBase):
    """An output whose first write is interrupted by a signal, as any write to a slow disk or pipe may be."""

    def __init__(self) -> None:
        self.written = b""
        self.signals = [signal.SIGUSR1]

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        while self.signals:
            os.kill(os.getpid(), self.signals.pop())
        self.written += bytes(data)
        return len(data)


def test_what_a_signals_handler_says_in_the_middle_of_a_line_comes_with_the_next_line() -> None:
    """Python refuses to print there (RuntimeError: reentrant call), and the run must not end of it."""
    raw = SignalledWhileWriting()
    view = View(
        "title", total_steps=3, console=Console(file=io.TextIOWrapper(io.BufferedWriter(raw)), force_terminal=False)
    )
    before = signal.signal(signal.SIGUSR1, lambda *_: view.note("SIGUSR1: heard"))
    try:
        view.note("a line")
        view.note("the next")
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert sorted(raw.written.decode().splitlines()) == ["SIGUSR1: heard", "a line", "the next"]


class GoneTerminal(io.StringIO):
    """A terminal whose window has been closed: SIGHUP has come, and nothing can be written any more."""

    gone = False

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if self.gone:
            raise OSError(5, "Input/output error")
        return super().write(text)


@pytest.mark.parametrize("live", [True, False])
def test_a_terminal_that_is_gone_ends_nothing(live: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view_module, "can_redraw", lambda console: live)
    file = GoneTerminal()
    with View("title", total_steps=3, console=Console(file=file, force_terminal=live, width=100)) as view:
        view.step(METRICS)
        file.gone = True
        view.note("SIGHUP: this step is finished")
        view.step(METRICS)
