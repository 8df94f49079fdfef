"""A run that was killed and resumed equals one that was not, bit for bit; signals end a run politely."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from commands import FASTKL, Running, run
from safetensors.torch import load_file

from fastkl.training.signals import StopRequest, stop_request

SMALL = ["--steps", "4", "--save-every", "1", "--prompts-per-step", "2", "--num-samples", "4", "--max-new-tokens", "16"]
NOT_REPRODUCIBLE = ("time/", "throughput/", "memory/")


def command(output: Path, generator: str, *more: str) -> list[str]:
    return ["train", *SMALL, "--generator", generator, "--output", str(output), *more]


def finished(output: Path, generator: str, *more: str) -> str:
    result = run(*command(output, generator, *more))
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def wait_for(path: Path, child: Running, seconds: float = 240) -> None:
    """Waits until there is something in a file, or at least a folder of that name."""
    deadline = time.monotonic() + seconds
    while not path.exists() or not (path.is_dir() or path.stat().st_size):
        assert child.poll() is None, f"the run ended before {path.name} existed"
        assert time.monotonic() < deadline, f"no {path.name} after {seconds} s"
        time.sleep(0.02)


def metrics(output: Path) -> list[dict]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(NOT_REPRODUCIBLE)} for row in rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run of four steps that nothing interrupted."""
    output = tmp_path_factory.mktemp("whole") / "run"
    finished(output, "transformers")
    return output


@pytest.mark.slow
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, whole):
    """evaluation/test_in_a_run.py has the same with vLLM, killed in the middle of an evaluation."""
    killed = tmp_path / "killed"
    child = Running(*command(killed, "transformers"))
    wait_for(killed / "checkpoints" / "step-1", child)
    delay = random.random() * 0.5
    time.sleep(delay)
    child.kill()
    assert "continuing after step" in finished(killed, "transformers", "--resume"), f"killed {delay:.3f} s after step 1"

    assert metrics(killed) == metrics(whole)
    assert [row["step"] for row in metrics(whole)] == [1, 2, 3, 4]
    for name in ("model.safetensors", "trainer.safetensors"):
        ours, theirs = (load_file(run / "checkpoints" / "step-4" / name) for run in (killed, whole))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
    samples = [(run / "samples.jsonl").read_text() for run in (killed, whole)]
    assert samples[0] == samples[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_each_of_four_signals_asks_for_the_end_once_and_gets_its_own_handler_back(number):
    said: list[str] = []
    before = signal.getsignal(number)
    with stop_request(said.append) as stop:
        signal.raise_signal(number)
        assert stop.requested and said[0].startswith(f"{number.name}: this step is finished and saved")
    assert signal.getsignal(number) == before and len(said) == 1


@pytest.mark.slow
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(tmp_path):
    output, number = tmp_path / "run", signal.SIGTERM
    options = ["--steps", "1000", "--save-every", "0", "--lr-decay", "constant"]
    child = Running(*command(output, "transformers", *options))
    wait_for(output / "metrics.jsonl", child)
    child.send_signal(number)
    result = child.done(timeout=60)
    text = result.stdout + result.stderr
    assert result.returncode == 130, text[-2000:]
    assert f"{number.name}: this step is finished and saved" in text
    assert "Traceback" not in text
    last = metrics(output)[-1]["step"]
    assert last < 1000
    assert (output / "checkpoints" / f"step-{last}" / "checkpoint.json").is_file()
    assert "--resume" in text
    assert f"--output {output}" in text


@pytest.mark.slow
def test_a_disk_that_is_full_at_the_end_ends_with_1_and_says_which_step_is_saved(tmp_path):
    """For real: no file of the run may grow beyond three megabytes, and the model is larger."""
    output = tmp_path / "run"
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, 3 << 20)); {FASTKL}"
    result = run(*command(output, "transformers", "--steps", "2"), script=limited)
    assert result.returncode == 1, result.stderr[-2000:]
    assert "fastkl: step 2 is not saved; the newest checkpoint is none." in result.stderr
    assert "Traceback" not in result.stderr and "checkpoint of step 1 could not be written" in result.stdout
    assert [row["step"] for row in metrics(output)] == [1, 2]
    assert not list((output / "checkpoints").iterdir())


INTERRUPTED = """
import os, signal, sys
from fastkl.cli import main
from fastkl.training import loop

set_up, calls = loop.set_up, []

def twice(*_):
    calls.append(1)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

def with_signals(config, **options):
    run = set_up(config, **options)
    run.optimizer.{hook}(twice)
    return run

loop.set_up = with_signals
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    "hook", [pytest.param("register_step_pre_hook", marks=pytest.mark.long), "register_step_post_hook"]
)
@pytest.mark.slow
def test_two_signals_in_the_middle_of_an_update_leave_a_checkpoint_that_is_the_step_it_names(tmp_path, hook, whole):
    broken = tmp_path / "broken"
    script = INTERRUPTED.replace("{hook}", hook)
    # the only save is that of the interruption
    child = run(*command(broken, "transformers", "--save-every", "0"), script=script)
    assert child.returncode == 130, child.stderr[-2000:]
    newest = max((broken / "checkpoints").iterdir(), key=lambda path: int(path.name[5:]))
    said = finished(broken, "transformers", "--resume")
    assert f"continuing after {newest.name.replace('-', ' ')}" in said
    assert "lines" not in said, "no line of the step that was interrupted is lost"
    assert metrics(broken) == metrics(whole)
    for name in ("model.safetensors", "trainer.safetensors"):
        ours, theirs = (load_file(run / "checkpoints" / "step-4" / name) for run in (broken, whole))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name


@pytest.mark.slow
def test_a_second_signal_waits_for_the_end_of_a_step_and_a_third_one_does_not():
    said = []
    stop = StopRequest(said.append)
    stop.hold()
    stop(signal.SIGINT, None), stop(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        stop(signal.SIGINT, None)  # what is held may hang
    with pytest.raises(KeyboardInterrupt):
        stop.release()
    assert len(said) == 1
    stop = StopRequest(said.append)
    stop.hold()
    stop(signal.SIGINT, None)
    stop.release()
    with pytest.raises(KeyboardInterrupt):
        stop(signal.SIGTERM, None)


@pytest.mark.slow
def test_a_run_killed_before_its_first_checkpoint_starts_anew_on_resume(tmp_path, whole):
    killed = tmp_path / "killed"
    late = ("--save-every", "0")
    child = Running(*command(killed, "transformers", *late))
    wait_for(killed / "metrics.jsonl", child)
    child.kill()
    assert "starts anew" in finished(killed, "transformers", "--resume")
    assert metrics(killed) == metrics(whole)


@pytest.mark.slow
def test_a_resumed_run_names_prompts_and_rewards_that_have_changed_and_logs_that_were_edited(tmp_path):
    prompts, rewards, samples = (tmp_path / name for name in ("prompts.jsonl", "rewards.py", "run/samples.jsonl"))
    prompts.write_text('{"prompt": "Once upon a time"}\n')
    rewards.write_text("def r(completions):\n    return [float(len(c)) for c in completions]\n")
    options = ("--prompts", str(prompts), "--reward", f"{rewards}:r")
    finished(tmp_path / "run", "transformers", *options, "--steps", "1")
    unchanged = finished(tmp_path / "run", "transformers", *options, "--steps", "2", "--resume")
    assert "changed since" not in unchanged and "edited lines" not in unchanged
    prompts.write_text('{"prompt": "Once there was"}\n')
    rewards.write_text("def r(completions):\n    return [1.0 / len(c) for c in completions]\n")
    samples.write_text(samples.read_text().replace('"step": 2', '"step": 1', 1))
    said = " ".join(finished(tmp_path / "run", "transformers", *options, "--steps", "3", "--resume").split())
    assert f"changed since the run was started: prompts, reward {rewards}:r" in said
    assert "samples.jsonl has lost, damaged or edited lines" in said and "metrics.jsonl has" not in said


@pytest.mark.slow
def test_resuming_a_finished_run_says_so_before_any_model_is_loaded(tmp_path, capsys, monkeypatch, whole):
    from fastkl.cli import main
    from fastkl.training import setup

    output = tmp_path / "run"
    shutil.copytree(whole, output)
    monkeypatch.setattr(setup, "check_inputs", lambda config: pytest.fail("set-up has begun"))
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    for steps, more in (("4", "6"), ("2", "6")):
        assert main(["train", "--output", str(output), "--resume", "--steps", steps]) == 0
        said = capsys.readouterr().out
        assert said.count("\n") == 1 and f"is finished: it stands at step 4 of {steps}" in said
        assert f"fastkl train --output {output} --steps {more} --resume" in said
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before
    monkeypatch.undo()
    weights = output / "checkpoints" / "step-4" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])  # step 4 is not there any more: it is done again
    assert "continuing after step 3" in finished(output, "transformers", "--steps", "4", "--resume")


@pytest.mark.slow
def test_an_output_that_cannot_be_written_costs_nothing(tmp_path):
    """Standard output on a full disk: every write to this device fails with "No space left on device"."""
    output = tmp_path / "run"
    result = run(*command(output, "transformers", "--steps", "2"), stdout="/dev/full")
    assert result.returncode == 0, result.stderr[-2000:]
    assert "Traceback" not in result.stderr
    assert [row["step"] for row in metrics(output)] == [1, 2]
    assert (output / "checkpoints" / "step-2" / "checkpoint.json").is_file()


def test_a_second_signal_that_comes_while_the_first_is_answered_is_not_lost():
    said: list[str] = []

    def say(message: str) -> None:
        said.append(message)
        if len(said) == 1:
            stop(signal.SIGINT, None)

    stop = StopRequest(say)
    with pytest.raises(KeyboardInterrupt):
        stop(signal.SIGINT, None)
    assert len(said) == 1
