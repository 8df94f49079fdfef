"""A run that was killed and resumed equals one that was not, bit for bit; signals end a run politely."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SMALL = ["--steps", "4", "--save-every", "1", "--prompts-per-step", "2", "--num-samples", "4", "--max-new-tokens", "16"]
NOT_REPRODUCIBLE = ("time/", "throughput/")


def command(output: Path, generator: str, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "fastkl", "train", *SMALL, "--generator", generator, "--output", str(output), *more,
    ]  # fmt: skip


def finished(output: Path, generator: str, *more: str) -> str:
    result = subprocess.run(command(output, generator, *more), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def wait_for(path: Path, child: subprocess.Popen, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert child.poll() is None, f"the run ended before {path.name} existed"
        assert time.monotonic() < deadline, f"no {path.name} after {seconds} s"
        time.sleep(0.02)


def metrics(output: Path) -> list[dict]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(NOT_REPRODUCIBLE)} for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("generator", ["transformers", pytest.param("vllm", marks=pytest.mark.vllm)])
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, generator):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finished(whole, generator)

    child = subprocess.Popen(command(killed, generator), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(killed / "checkpoints" / "step-1", child)
    delay = random.random() * 0.5
    time.sleep(delay)
    child.kill()
    child.wait()
    assert "continuing after step" in finished(killed, generator, "--resume"), f"killed {delay:.3f} s after step 1"

    assert metrics(killed) == metrics(whole)
    assert [row["step"] for row in metrics(whole)] == [1, 2, 3, 4]
    for name in ("model.safetensors", "trainer.safetensors"):
        ours, theirs = (load_file(run / "checkpoints" / "step-4" / name) for run in (killed, whole))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
    samples = [(run / "samples.jsonl").read_text() for run in (killed, whole)]
    assert samples[0] == samples[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(tmp_path, number):
    output = tmp_path / "run"
    options = ["--steps", "1000", "--save-every", "0", "--lr-decay", "constant"]
    child = subprocess.Popen(
        command(output, "transformers", *options), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for(output / "metrics.jsonl", child)
    while not (output / "metrics.jsonl").read_text().strip():
        time.sleep(0.02)
    child.send_signal(number)
    text, _ = child.communicate(timeout=60)
    assert child.returncode == 0, text[-2000:]
    assert "Traceback" not in text
    last = metrics(output)[-1]["step"]
    assert last < 1000
    assert (output / "checkpoints" / f"step-{last}" / "checkpoint.json").is_file()
    assert "--resume" in text
    assert f"--output {output}" in text
