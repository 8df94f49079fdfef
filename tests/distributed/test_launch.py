"""Runs started from the command line: --nproc, torchrun, and torchrun's restart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastkl.cli import main
from fastkl.cli.commands import without_nproc

SMALL = [
    *("--generator", "transformers", "--dtype", "float32", "--steps", "3", "--prompts-per-step", "2"),
    *("--num-samples", "4", "--max-new-tokens", "8", "--save-every", "1", "--report-to"),
]


def started(*command: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    return subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, timeout=180, env=environment
    )


def steps_of(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("words", [["--nproc", "2"], ["--nproc=2"]])
def test_the_processes_get_the_command_line_without_the_number_of_processes(words):
    assert without_nproc(["train", *words, "--output", "--nproc-like", "--steps", "2"]) == [
        "train", "--output", "--nproc-like", "--steps", "2",
    ]  # fmt: skip


def test_a_wrong_number_of_processes_and_a_wrong_setting_are_refused_before_any_is_started(capsys, tmp_path):
    assert main(["train", "--nproc", "0", "--output", str(tmp_path / "run")]) == 2
    assert "nproc: 0 processes cannot be started here; use 1 or more" in capsys.readouterr().err
    assert main(["train", "--nproc", "2", "--num-samples", "1"]) == 2
    assert capsys.readouterr().err.startswith("fastkl: num_samples: 1 ")


@pytest.mark.slow
def test_nproc_trains_in_so_many_processes(tmp_path):
    done = started("fastkl", "train", "--nproc", "2", *SMALL, "--output", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert steps_of(tmp_path / "run") == [1, 2, 3]
    assert done.stdout.count("step 3/3") == 1 and "2 processes" in done.stdout
    states = json.loads((tmp_path / "run" / "checkpoints" / "step-3" / "checkpoint.json").read_text())
    assert len(states["random_of_others"]) == 1


@pytest.mark.slow
def test_a_mistake_that_shows_in_the_processes_only_is_said_once_and_keeps_its_exit_code(tmp_path):
    file = tmp_path / "rewards.py"
    file.write_text("def reward(completions, **columns):\n    return [float('nan')] * len(completions)\n")
    reward = ("--reward", f"{file}:reward")
    done = started("fastkl", "train", "--nproc", "2", *SMALL, *reward, "--output", str(tmp_path / "run"))
    assert done.returncode == 2
    assert done.stderr.count("reward: reward at step 1 returned nan") == 1 and "Traceback" not in done.stderr


KILLED_ONCE = """
import os, signal
from pathlib import Path

MARK = Path(__file__).with_name("killed")

def reward(completions, trainer_state, **columns):
    if trainer_state.global_step == 3 and os.environ["RANK"] == "1" and not MARK.exists():
        MARK.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return [float(len(text)) for text in completions]
"""


@pytest.mark.slow
def test_a_restart_by_torchrun_goes_on_from_the_last_checkpoint(tmp_path):
    (tmp_path / "rewards.py").write_text(KILLED_ONCE)
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1", "-m", "fastkl")
    reward = ("--reward", f"{tmp_path}/rewards.py:reward")
    done = started(*torchrun, "train", *SMALL, *reward, "--output", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert steps_of(tmp_path / "run") == [1, 2, 3] and (tmp_path / "killed").exists()
    assert "continuing after step 2" in done.stdout
