"""Whole runs in 1, 2 and 3 processes over gloo, each with one thread; what becomes of all when one fails."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from several_processes import Processes, run_in
from toy import half_storyteller

from fastkl.config.settings import TrainConfig

pytestmark = pytest.mark.slow

OWN = ("time/", "throughput/", "memory/")


def story(folder: Path, **options) -> TrainConfig:
    """A small run with everything that a step may have."""
    settings = {
        "output": str(folder), "generator": "transformers", "dtype": "float32", "report_to": (), "steps": 4,
        "prompts_per_step": 4, "num_samples": 4, "max_new_tokens": 16, "lr_decay": "constant", "kl_target": 2.0,
        "reference_every": 2, "micro_batch_tokens": 150, "save_every": 1, "keep_checkpoints": 0,
    }  # fmt: skip
    return TrainConfig(**(settings | options))


def trained(config: TrainConfig) -> tuple[int, int]:
    """The last completed step, and the last saved one."""
    from fastkl.training.loop import train

    result = train(config)
    return result.step, result.saved_step


def lines(folder: Path, name: str = "metrics") -> list[dict]:
    """The run's lines, without what may differ between equal runs."""
    rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(OWN)} for row in rows]


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "checkpoints" / f"step-{step}" / "model.safetensors")


def assert_alike(one: Path, other: Path) -> None:
    """The samples of step 1 are the same, and the metrics are, to 1e-4, as long as all samples are: Adam's first steps
    magnify rounding, and a draw within rounding of a border between two tokens may fall on the other side."""
    ours, theirs = lines(one, "samples"), lines(other, "samples")
    same = {sample["step"]: True for sample in ours}
    for mine, yours in zip(ours, theirs, strict=True):
        assert (mine["step"], mine["row"]) == (yours["step"], yours["row"])
        same[mine["step"]] &= mine["completion"] == yours["completion"]
    assert same[1]
    print("steps with the same samples:", [step for step, equal in same.items() if equal])
    for mine, yours in zip(lines(one), lines(other), strict=True):
        if not all(same[step] for step in range(1, mine["step"] + 1)):
            break
        assert mine.keys() == yours.keys()
        for key, value in mine.items():
            assert yours[key] == pytest.approx(value, rel=1e-4, abs=1e-4), (key, mine["step"])


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("one")
    run_in(1, folder / "processes", trained, story(folder / "run"))
    return folder / "run"


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """That of two."""
    folder = tmp_path_factory.mktemp("two")
    assert run_in(2, folder / "processes", trained, story(folder / "run")) == [(4, 4)] * 2
    return folder / "run"


def test_two_processes_train_as_one(one, two):
    assert_alike(one, two)
    assert len(lines(two)) == 4 and len(lines(two, "samples")) == 4 * 16
    for name, value in weights(two, 4).items():
        torch.testing.assert_close(value, weights(one, 4)[name], rtol=0, atol=2e-4)


@pytest.mark.long
def test_three_processes_train_as_one(one, tmp_path):
    run_in(3, tmp_path / "processes", trained, story(tmp_path / "run"))
    assert_alike(one, tmp_path / "run")


def test_the_same_number_of_processes_is_the_same_run_bit_for_bit(two, tmp_path):
    """Stopped and resumed in between."""
    run_in(2, tmp_path / "processes", trained, story(tmp_path / "run", steps=2))
    run_in(2, tmp_path / "processes", trained, story(tmp_path / "run", resume=True))
    assert lines(tmp_path / "run") == lines(two) and lines(tmp_path / "run", "samples") == lines(two, "samples")
    assert all(torch.equal(value, weights(two, 4)[name]) for name, value in weights(tmp_path / "run", 4).items())


def test_a_checkpoint_of_two_processes_is_resumed_by_one_and_then_by_three(one, tmp_path):
    from transformers import AutoModelForCausalLM

    run, processes = tmp_path / "run", tmp_path / "processes"
    run_in(2, processes, trained, story(run, steps=2))
    assert AutoModelForCausalLM.from_pretrained(run / "checkpoints" / "step-2").config.vocab_size == 2048
    run_in(1, processes, trained, story(run, steps=3, resume=True))
    run_in(3, processes, trained, story(run, resume=True))
    assert_alike(one, run)


def test_only_the_first_process_writes_and_speaks(two):
    outputs = [(two.parent / "processes" / f"output-{rank}.txt").read_text() for rank in (0, 1)]
    assert "step 4/4" in outputs[0] and outputs[1] == ""
    environment = (two / "environment.jsonl").read_text().splitlines()
    assert len(environment) == 1


# Failures


def raising(completions, trainer_state, **columns):
    """Fails in the second process at step 3."""
    if trainer_state.global_step == 3 and os.environ["RANK"] == "1":
        raise ValueError("no such story")
    return [float(len(text)) for text in completions]


def signalled(completions, trainer_state, **columns):
    """The second process gets SIGTERM at step 2."""
    if trainer_state.global_step == 2 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return [float(len(text)) for text in completions]


def killed(completions, trainer_state, **columns):
    """The second process is killed at step 3."""
    if trainer_state.global_step == 3 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return [float(len(text)) for text in completions]


def killed_while_the_first_sleeps(completions, trainer_state, **columns):
    """The second process is killed while the first is in a call of C that nothing interrupts."""
    if trainer_state.global_step == 3 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    if trainer_state.global_step == 3 and os.environ["RANK"] == "0":
        ctypes.CDLL(None).sigprocmask(0, ctypes.byref((ctypes.c_ulong * 16)(*[2**64 - 1] * 16)), None)
        ctypes.CDLL(None).sleep(100)
    return [float(len(text)) for text in completions]


def with_reward(config: TrainConfig, name: str) -> tuple[int, int]:
    return trained(replace(config, reward=(f"{__file__}:{name}",)))


def interrupted_by(name: str, folder: Path, size: int = 2, **options):
    return Processes(size, folder / "processes", with_reward, story(folder / "run", **options), name).ended()


def saved_steps(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (folder / "run" / "checkpoints").glob("step-*"))


@pytest.mark.long
def test_what_fails_in_one_process_ends_all_with_its_sentence_and_the_last_common_step_is_saved(tmp_path):
    ended = interrupted_by("raising", tmp_path, size=3, save_every=0)
    assert {process.code for process in ended} == {1}
    assert {process.error for process in ended} == {ended[1].error}
    assert "UserError: reward: raising failed at step 3" in ended[0].error and "no such story" in ended[0].error
    assert max(p.seconds for p in ended) - min(p.seconds for p in ended) < 15
    assert saved_steps(tmp_path) == [2]


def test_a_signal_to_one_process_stops_all_at_the_same_step(tmp_path):
    ended = interrupted_by("signalled", tmp_path, save_every=0)
    assert [process.result for process in ended] == [(2, 2)] * 2, ended
    assert saved_steps(tmp_path) == [2]


def test_a_process_that_is_killed_ends_the_run_with_a_sentence_and_the_completed_step_is_saved(tmp_path):
    ended = interrupted_by("killed", tmp_path, size=3, save_every=0)
    assert [process.code for process in ended] == [1, -signal.SIGKILL, 1]
    assert ended[0].error == ended[2].error == "LostProcess: process 1 of 3 has ended, and so this run ends."
    assert max(p.seconds for p in ended) - ended[1].seconds < 15
    assert saved_steps(tmp_path) == [2]


@pytest.mark.long
def test_a_process_that_waits_where_nothing_interrupts_it_is_ended(tmp_path):
    ended = interrupted_by("killed_while_the_first_sleeps", tmp_path)
    assert [process.code for process in ended] == [1, -signal.SIGKILL]
    assert "fastkl: process 0: process 1 of 2 has ended, and so this run ends." in ended[0].output
    assert ended[0].seconds - ended[1].seconds < 15
    assert saved_steps(tmp_path) == [1, 2]


def exchanged_with_a_late_failure() -> str:
    """The second process fails while the first waits in another collective call: neither hangs."""
    from fastkl.distributed.start import launched

    world, began = launched(), time.monotonic()
    try:
        with world.together():
            world.everybodys(1)
            if world.rank == 1:
                raise KeyError("lost")
            world.everybodys(world.rank)
    except BaseException as failure:
        return f"{type(failure).__name__} {time.monotonic() - began < 15}"
    return "nothing"


def test_an_exchange_meets_the_others_failure_whatever_it_was_for(tmp_path):
    assert run_in(2, tmp_path, exchanged_with_a_late_failure) == ["OtherFailed True", "KeyError True"]


def weights_and_threads() -> tuple[bool, list[str]]:
    import threading

    return torch.distributed.is_initialized(), [t.name for t in threading.enumerate() if "fastkl" in t.name]


def trained_alone(config: TrainConfig):
    trained(config)
    return weights_and_threads()


def test_one_process_has_no_process_group_and_no_thread_of_ours(tmp_path):
    config = story(tmp_path / "run", steps=1)
    assert run_in(1, tmp_path / "processes", trained_alone, config) == [(False, [])]


@pytest.mark.long
@pytest.mark.parametrize("options", [
    {"lora_rank": 4},
    {"gradient_checkpointing": True, "eval_prompts": "0.5", "updates_per_rollout": 2, "epochs": 2, "clip": (0.2, 0.2)},
    {"updates_per_rollout": 2, "clip": (0.2, 0.2), "shard": "full"},
])  # fmt: skip
def test_adapters_checkpointing_evaluation_and_several_updates_in_two_processes_are_those_of_one(options, tmp_path):
    if "lora_rank" in options:
        pytest.importorskip("peft")
        options = options | {"reference_every": 0}
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "The {w}"}}\n' for w in ("cat", "dog", "fox", "owl")))
    for size in (1, 2):
        config = story(tmp_path / f"run-{size}", steps=2, prompts=str(tmp_path / "prompts.jsonl"), **options)
        run_in(size, tmp_path / "processes", trained, config)
    assert_alike(tmp_path / "run-1", tmp_path / "run-2")


TEACHER = {"reward": ("none",), "kl_coef": 1.0, "kl_target": 0.0, "kl_estimator": "exact", "kl_placement": "loss"}


@pytest.mark.parametrize("options", [
    pytest.param({}, marks=pytest.mark.long),
    {"shard": "full", "eval_prompts": "Once", "eval_samples": 1, "updates_per_rollout": 2, "clip": (0.2, 0.2)},
    pytest.param({"lora_rank": 4}, marks=pytest.mark.long),
], ids=str)  # fmt: skip
def test_two_processes_learn_from_a_teacher_of_another_width_as_one_does(options, tmp_path):
    if "lora_rank" in options:
        pytest.importorskip("peft")
    half_storyteller(tmp_path / "teacher")
    about = {"reference": str(tmp_path / "teacher"), "reference_every": 0, "steps": 2} | TEACHER | options
    for size in (1, 2):
        run_in(size, tmp_path / "processes", trained, story(tmp_path / f"run-{size}", **about))
    assert_alike(tmp_path / "run-1", tmp_path / "run-2")
    assert lines(tmp_path / "run-1")[-1]["kl/exact"] > 10, "the teacher is another model"
