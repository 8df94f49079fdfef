"""Defaults follow the model; "auto" is resolved once and written resolved; old settings stay as they are."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from fastkl.cli.commands import merged
from fastkl.config.defaults import bearable_lr, lr_of, lr_warnings, output_of, resolved
from fastkl.config.files import load_config, save_config
from fastkl.config.settings import TrainConfig, settings
from fastkl.errors import UserError
from fastkl.training.run_folder import check_run_folder, prepare_run_folder


@pytest.mark.parametrize(
    ("given", "lr", "output"),
    [
        ({}, 1e-3, "runs/alliteration"),
        ({"lr": 0.0, "output": "here"}, 0.0, "here"),
        ({"reward": ("starts_with_a",)}, 1e-3, "runs/storyteller-starts_with_a"),
        ({"model": "HuggingFaceTB/SmolLM2-135M-Instruct", "reward": ("gym",)}, 1e-6, "runs/SmolLM2-135M-Instruct-gym"),
        ({"model": "./models/my model/", "reward": ("a/rewards.py:brevity", "gym")}, 1e-6, "runs/my_model-brevity-gym"),
        ({"model": "m", "lora_rank": 8}, 1e-5, "runs/m-alliteration"),
        ({"model": "m", "reward": ("regex?pattern=a/b:c",)}, 1e-6, "runs/m-regex"),
        ({"model": "m", "reward": ("package.module:C.method",), "lr": 5e-6}, 5e-6, "runs/m-C.method"),
        ({"model": "m", "reward": ("rewards.py",)}, 1e-6, "runs/m-rewards"),
    ],
)
def test_lr_and_output_follow_model_and_reward(given, lr, output):
    config = resolved(TrainConfig(**given))
    assert (config.lr, config.output) == (lr, output)
    assert resolved(config) == config


def test_auto_is_typed_shown_and_written_resolved(tmp_path):
    assert (settings()["lr"].default_text, settings()["output"].default_text) == ("auto", "auto")
    assert merged({"lr": "auto"}, None).lr is None and merged({"lr": "1e-5"}, None).lr == 1e-5
    with pytest.raises(UserError, match="^lr: 'quick' is not a number"):
        merged({"lr": "quick"}, None)
    save_config(TrainConfig(), tmp_path / "open.yaml")
    assert load_config(tmp_path / "open.yaml") == TrainConfig()
    folder = prepare_run_folder(resolved(TrainConfig(model="m", output=str(tmp_path / "run"))))
    assert load_config(folder / "config.yaml").lr == 1e-6


def test_a_run_of_before_with_its_lr_written_out_is_resumed_with_it(tmp_path):
    started = TrainConfig(lr=1e-3, output=str(tmp_path))
    step = tmp_path / "checkpoints" / "step-1"
    step.mkdir(parents=True)
    recorded = {"lr": 1e-3, "output": str(tmp_path), "steps": 40}  # as 0.1.0 wrote it, without what came later
    (step / "checkpoint.json").write_text(json.dumps({"format": 1, "step": 1, "files": {}, "config": recorded}))
    config = merged({"resume": True, "output": str(tmp_path)}, None)
    assert lr_of(config) == 1e-3
    check_run_folder(config)
    check_run_folder(replace(started, lr=None, resume=True))  # auto is the same number here
    with pytest.raises(UserError, match="^lr: 1e-06, but the run in .* was started with 0.001"):
        check_run_folder(replace(started, lr=1e-6, resume=True))


def test_resume_finds_the_folder_that_the_same_options_have_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {"model": "org/m", "reward": ("gym",)}
    config = resolved(merged(options, None))
    prepare_run_folder(replace(config, steps=7))
    assert merged({**options, "resume": True}, None).steps == 7
    assert output_of(config) == "runs/m-gym"


def test_a_learning_rate_far_above_what_the_size_bears_is_told_once():
    assert bearable_lr(1_721_664) == pytest.approx(1e-3, rel=0.01)
    assert 2e-5 < bearable_lr(135_000_000) < 1e-4 < 1e-3
    assert not lr_warnings(1e-3, 1_721_664) and not lr_warnings(2e-5, 135_000_000)
    assert not lr_warnings(1e-6, 70_000_000_000)
    (warning,) = lr_warnings(1e-3, 135_000_000)
    assert "lr: 0.001 is far above what a model of 135 million parameters bears (about 5e-05)" in warning
