"""Runs started from the command line: --nproc, torchrun, and torchrun's restart."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import commands
import pytest

from fastkl.cli import main
from fastkl.cli.commands import without_nproc
from fastkl.distributed.launch import launch

SMALL = [
    *("--generator", "transformers", "--dtype", "float32", "--steps", "3", "--prompts-per-step", "2"),
    *("--num-samples", "4", "--max-new-tokens", "8", "--save-every", "1", "--report-to"),
]


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


def test_where_all_processes_end_well_the_command_does(monkeypatch):
    started: list = []
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(logging.getLogger("torch.distributed"), "setLevel", lambda level: None)
    monkeypatch.setattr("torch.distributed.run.run", started.append)
    assert launch(2, ["train", "--steps", "3"]) == 0
    (torchrun,) = started
    assert (torchrun.nproc_per_node, torchrun.training_script) == ("2", "fastkl")
    assert torchrun.training_script_args == ["train", "--steps", "3"]


WRONG_AT_LAST = """
def reward(completions, trainer_state, **columns):
    return [float("nan") if trainer_state.global_step == 3 else float(len(text)) for text in completions]
"""


@pytest.mark.slow
def test_nproc_trains_in_so_many_processes_and_a_mistake_in_them_is_said_once_and_keeps_its_exit_code(tmp_path):
    file = tmp_path / "rewards.py"
    file.write_text(WRONG_AT_LAST)
    done = commands.run("train", "--nproc", "2", *SMALL, "--reward", f"{file}:reward", "--output", f"{tmp_path}/run")
    assert done.returncode == 2
    assert done.stderr.count("reward: reward at step 3 returned nan") == 1 and "Traceback" not in done.stderr
    assert steps_of(tmp_path / "run") == [1, 2]
    assert done.stdout.count("step 2/3") == 1 and "2 processes" in done.stdout
    states = json.loads((tmp_path / "run" / "checkpoints" / "step-2" / "checkpoint.json").read_text())
    assert len(states["random_of_others"]) == 1


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


TORCHRUN = """
import sys
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from fastkl.cli import main

def work(*arguments):
    if code := main(arguments):
        sys.exit(code)

config = LaunchConfig(
    min_nodes=1, max_nodes=1, nproc_per_node=2, max_restarts=1, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
    start_method="fork", monitor_interval=0.1,
)
elastic_launch(config, work)(*sys.argv[1:])
"""
"""What `torchrun --nproc-per-node 2 --max-restarts 1 -m fastkl` does, but that its processes are forks of this one, in
which everything is imported."""


@pytest.mark.slow
@pytest.mark.long
def test_a_restart_by_torchrun_goes_on_from_the_last_checkpoint(tmp_path):
    (tmp_path / "rewards.py").write_text(KILLED_ONCE)
    reward = ("--reward", f"{tmp_path}/rewards.py:reward")
    done = commands.run("train", *SMALL, *reward, "--output", str(tmp_path / "run"), script=TORCHRUN)
    assert done.returncode == 0, done.stderr[-3000:]
    assert steps_of(tmp_path / "run") == [1, 2, 3] and (tmp_path / "killed").exists()
    assert "continuing after step 2" in done.stdout
