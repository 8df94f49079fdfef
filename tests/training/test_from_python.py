"""fastkl.train from Python: functions, rows and modules in the place of names, wherever Python runs."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path

import pytest
import torch
import yaml
from toy import toy_model

import fastkl
from fastkl.cli import main
from fastkl.config.files import load_config
from fastkl.data.rows import read_rows
from fastkl.scoring.models import load_model
from fastkl.storyteller import model_path

ROWS = [{"prompt": "Once upon a time", "wanted": 12}, {"prompt": "One day", "wanted": 4}]


def wanted_length(completions, wanted, **columns):
    return [-abs(len(text.split()) - n) for text, n in zip(completions, wanted, strict=True)]


def config(folder: Path, **options) -> fastkl.TrainConfig:
    settings = {"steps": 1, "prompts_per_step": 2, "num_samples": 2, "max_new_tokens": 6, "generator": "transformers"}
    return fastkl.TrainConfig(**(settings | {"output": folder / "run", "report_to": [], "dtype": "float32"} | options))


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_functions_and_rows_take_the_place_of_names(tmp_path):
    result = fastkl.train(config(tmp_path), reward=[wanted_length, "alliteration"], prompts=ROWS)
    last = metrics(tmp_path)[-1]
    assert result.step == 1 and {"reward/wanted_length", "reward/alliteration"} <= set(last)
    written = load_config(tmp_path / "run" / "config.yaml")
    assert (written.reward, written.prompts) == (("python:wanted_length", "alliteration"), "python:list")
    assert (written.output, written.lr) == (str(tmp_path / "run"), 1e-3)


@pytest.mark.slow
def test_a_run_from_python_goes_on_from_python_and_says_so_elsewhere(tmp_path, capsys):
    fastkl.train(config(tmp_path), reward=wanted_length, prompts=ROWS)
    assert main(["train", "--resume", "--steps", "2", "--output", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == (
        "fastkl: reward: 'wanted_length' was handed over from Python; go on with the run from there, by "
        "fastkl.train(config, reward=...).\n"
    )
    again = config(tmp_path, steps=2, resume=True)
    with pytest.raises(fastkl.UserError, match="prompts: 'list' was handed over from Python"):
        fastkl.train(fastkl.TrainConfig(**{**vars_of(again), "prompts": "python:list"}), reward=wanted_length)

    def other(completions, **columns):
        return [0.0] * len(completions)

    other.__name__ = "wanted_length"
    assert fastkl.train(again, reward=other, prompts=ROWS).step == 2
    shown = capsys.readouterr().out
    assert "changed since the run was started: reward python:wanted_length;" in shown
    with pytest.raises(fastkl.UserError, match="there were 2 when the run was saved and are 1 now"):
        fastkl.train(config(tmp_path, steps=3, resume=True), reward=other, prompts=ROWS[:1])


def vars_of(settings: fastkl.TrainConfig) -> dict:
    return {name: getattr(settings, name) for name in type(settings).__dataclass_fields__}


@pytest.mark.slow
def test_a_module_is_trained_in_place_with_a_frozen_copy_for_reference(tmp_path):
    by_name = fastkl.train(config(tmp_path / "a", model=str(model_path()), lr=1e-3))
    model = load_model(str(model_path()), torch.device("cpu"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = fastkl.train(config(tmp_path / "b", lr=1e-3), model=model)
    assert result.policy is model
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for name, value in by_name.policy.state_dict().items():  # the same run as by the folder's name
        assert torch.equal(value, model.state_dict()[name]), name
    start = load_model(str(tmp_path / "b" / "run" / "start"), torch.device("cpu")).state_dict()
    assert all(torch.equal(value, start[name]) for name, value in before.items())


@pytest.mark.slow
def test_a_modules_run_goes_on_from_its_checkpoint_even_by_the_command_line(tmp_path, capsys):
    whole = fastkl.train(config(tmp_path / "whole", steps=2, lr=1e-3), model=load(model_path())).policy.state_dict()
    for name in ("python", "cli"):
        fastkl.train(config(tmp_path / name, steps=2, lr=1e-3, save_every=1), model=load(model_path()))
        run = tmp_path / name / "run"
        (run / "checkpoints" / "step-2").rename(tmp_path / f"{name}-2")
        if name == "python":
            fresh = load(model_path())
            fastkl.train(config(tmp_path / name, steps=2, lr=1e-3, resume=True, save_every=1), model=fresh)
            result = fresh.state_dict()
        else:
            assert main(["train", "--resume", "--output", str(run)]) == 0
            result = load(run / "checkpoints" / "step-2").state_dict()
        assert all(torch.equal(value, result[key]) for key, value in whole.items()), name


def load(folder: Path):
    return load_model(str(folder), torch.device("cpu"))


@pytest.mark.slow
def test_it_runs_in_a_thread_and_inside_a_running_loop(tmp_path):
    async def late(completions, **columns):
        await asyncio.sleep(0.01)
        return [1.0] * len(completions)

    results = []
    thread = threading.Thread(target=lambda: results.append(fastkl.train(config(tmp_path / "t"), reward=late)))
    thread.start()
    thread.join()

    async def inside():
        return fastkl.train(config(tmp_path / "l"), reward=late)

    results.append(asyncio.run(inside()))
    assert [result.metrics["reward/late"] for result in results] == [1.0, 1.0]
    assert metrics(tmp_path / "t")[-1]["loss"] == metrics(tmp_path / "l")[-1]["loss"]


@pytest.mark.slow
def test_paths_single_texts_and_lists_are_taken(tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    settings = config(tmp_path, model=model_path(), prompts=tmp_path / "p.jsonl", reward="alliteration", stop="day")
    assert fastkl.train(settings).step == 1
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert written["reward"] == ["alliteration"] and written["stop"] == ["day"] and written["report_to"] == []
    assert written["prompts"] == str(tmp_path / "p.jsonl")


def test_rows_may_be_texts_messages_columns_or_a_data_set():
    datasets = pytest.importorskip("datasets")
    chat = [{"role": "user", "content": "hello"}]
    for rows, prompts in (
        (["a", "b"], ["a", "b"]),
        (("a",), ["a"]),
        ([chat], [chat]),
        ([{"prompt": chat, "n": 1}], [chat]),
        (datasets.Dataset.from_list([{"prompt": "a"}, {"prompt": "b"}]), ["a", "b"]),
        ((text for text in "ab"), ["a", "b"]),
    ):
        assert [columns["prompt"] for _, _, columns in read_rows(rows)] == prompts


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"reward": 3}, "reward: 3 is neither a function nor the name of one"),
        ({"reward": [wanted_length, None]}, "reward: None is neither a function nor the name of one"),
        ({"reward": []}, "reward: names no function"),
        ({"prompts": []}, "prompts: the list holds no prompts"),
        ({"prompts": [3]}, "prompts: the 'prompt' in row 1 of the prompts is neither a text nor a list of messages"),
        (
            {"prompts": {"train": ROWS, "test": ROWS}},
            "prompts: a dict has several parts .train, test.; give one of them",
        ),
        ({"prompts": 3}, "prompts: int holds no rows"),
        ({"prompts": [{"text": "a"}]}, "prompts: row 1 of the prompts has no column 'prompt'"),
        ({"model": torch.nn.Linear(2, 2)}, "model: Linear is no model of transformers"),
        ({"model": "./nowhere"}, "model: there is no model folder './nowhere'"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_sentence(tmp_path, options, words):
    with pytest.raises(fastkl.UserError, match=f"^{words}") as refused:
        fastkl.train(config(tmp_path), **options)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_module_that_cannot_be_trained_in_place_is_refused(tmp_path):
    for model, words in (
        (toy_model(dtype=torch.bfloat16), r"it is trained in place, .*has weights in bfloat16; give model\.float\(\)"),
        (toy_model(dtype=torch.float32).requires_grad_(False), "all its weights are trained, and .* is frozen"),
        (toy_model(dtype=torch.float32), "the module does not say where its tokenizer is; give tokenizer"),
    ):
        with pytest.raises(fastkl.UserError, match=f"^model: {words}"):
            fastkl.train(config(tmp_path), model=model)


@pytest.mark.parametrize("settings", [{"steps": "many"}, {"steps": 1.5}, {"reward": 3}, {"shuffle": 1}, {"lr": "x"}])
def test_a_setting_of_the_wrong_type_is_named(tmp_path, settings):
    with pytest.raises(fastkl.UserError, match=f"^{next(iter(settings))}: "):
        fastkl.train(config(tmp_path, **settings))
