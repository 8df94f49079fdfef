"""What a run leaves on the screen of a real terminal of 80 x 24: a process on a pty, its output read by a terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

pyte = pytest.importorskip("pyte")
WIDTH, HEIGHT = 80, 24

RUN = """
import signal, time
from fastkl.report.terminal import View
from tests_metrics import METRICS, CHAT

stop = []
signal.signal(signal.SIGINT, lambda *_: stop.append(1))
with View("storyteller → alliteration, β 0.2", total_steps=40) as view:
    view.note("generator: vllm (it can run this model)")
    for step in range(1, 41):
        view.step(METRICS | {"step": step, "reward/raw": step / 4})
        view.samples([CHAT, CHAT | {"reward": 0.0}])
        time.sleep(0.02)
        if step == WAIT_AT:
            print(end="", flush=True)
            open("waiting", "w").close()
            while not stop:
                time.sleep(0.01)
        if stop:
            view.note("SIGINT: this step is finished and saved, then the run ends")
            break
    view.close_with("Report: runs/a-folder-with-a-name-that-is-rather-long/of-an-experiment/report.html")
    view.close_with(f"Step {step} of 40. Model: runs/a-folder/checkpoints/step-{step}")
    if step < 40:
        view.close_with("Go on with: fastkl train --output runs/a-folder --resume")
"""


def play(folder: Path, *, wait_at: int = 0, **environment: str) -> tuple[list[str], str]:
    """(the screen's lines at the end, everything that was written) of RUN, interrupted at step `wait_at`."""
    from test_terminal import METRICS

    messages = [{"role": "system", "content": "You are terse. " * 40}, {"role": "user", "content": "What is 3 + 4?"}]
    chat = {"prompt": "<|im_start|>" * 90, "messages": messages, "completion": "It is seven.", "reward": 1.0}
    (folder / "tests_metrics.py").write_text(f"METRICS = {METRICS!r}\nCHAT = {chat!r}\n")
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", HEIGHT, WIDTH, 0, 0))
    before = termios.tcgetattr(side)
    clean = {k: v for k, v in os.environ.items() if k not in ("CI", "NO_COLOR", "COLUMNS", "LINES", "FORCE_COLOR")}
    child = subprocess.Popen(
        [sys.executable, "-c", RUN.replace("WAIT_AT", str(wait_at))],
        cwd=folder, stdin=side, stdout=side, stderr=side, start_new_session=True,
        env=clean | {"TERM": "xterm-256color", "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])} | environment,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    screen, raw, pressed = pyte.Screen(WIDTH, HEIGHT), b"", False
    stream, deadline = pyte.ByteStream(screen), time.monotonic() + 60
    os.set_blocking(main, False)
    while time.monotonic() < deadline:
        try:
            piece = os.read(main, 1 << 16)
        except BlockingIOError:
            if child.poll() is not None:
                break
            if wait_at and not pressed and (folder / "waiting").exists():
                os.write(main, b"\x03")  # as the keyboard does: the terminal makes a signal of it, and may echo it
                pressed = True
            time.sleep(0.01)
            continue
        raw += piece
        stream.feed(piece)
    assert child.wait(timeout=10) in (0, -signal.SIGINT), raw.decode(errors="replace")
    assert termios.tcgetattr(side) == before, "the terminal is left as it was"
    os.close(main)
    os.close(side)
    return [line.rstrip() for line in screen.display], raw.decode()


def the_last_words(lines: list[str]) -> list[str]:
    """What stands below the panel."""
    border = max(number for number, line in enumerate(lines) if line.startswith("╰"))
    return [line for line in lines[border + 1 :] if line]


@pytest.mark.parametrize("colour", [True, False])
def test_after_a_run_the_last_words_and_the_completion_are_on_the_screen(tmp_path, colour) -> None:
    lines, raw = play(tmp_path, **({} if colour else {"NO_COLOR": "1"}))
    text = "\n".join(lines)
    assert "".join(the_last_words(lines)).endswith("Step 40 of 40. Model: runs/a-folder/checkpoints/step-40")
    assert "Report: " in text and any(line.startswith("╭─ fastkl storyteller") for line in lines)
    assert "user: What is 3 + 4?" in text and "assistant: It is seven." in text and "<|im_start|>" not in text
    assert "step 40, best of 2, reward 1.00" in text and "step 40/40" in text and "done" in text
    assert text.count("╭") == text.count("╰") == 1
    assert bool(re.search(r"\x1b\[(?:\d+;)*(?:3[0-8]|9[0-7])[;m]", raw)) is colour


def test_after_ctrl_c_the_screen_says_how_to_go_on_and_the_panel_is_whole(tmp_path) -> None:
    lines, _ = play(tmp_path, wait_at=7)
    text = "\n".join(lines)
    assert the_last_words(lines)[-1] == "Go on with: fastkl train --output runs/a-folder --resume"
    assert "Step 7 of 40. Model:" in text and "assistant: It is seven." in text
    assert "^C" not in text and text.count("╭") <= 1 and text.count("╰") == 1


def test_a_terminal_that_shows_no_escape_codes_gets_plain_lines(tmp_path) -> None:
    lines, raw = play(tmp_path, TERM="dumb")
    assert "\x1b" not in raw and "╭" not in raw
    assert "".join(lines[-4:]).endswith("step-40")
