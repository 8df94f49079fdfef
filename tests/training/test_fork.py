"""A fork begins where another run's step ended: its equal bit for bit where nothing changes, else with new settings."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastkl.cli import main
from fastkl.config.files import load_config
from fastkl.config.settings import TrainConfig
from fastkl.errors import UserError
from fastkl.training import loop
from fastkl.training.fork import settings_of

OF_THE_MACHINE = ("time/", "throughput/", "memory/")


def rows(folder: Path, name: str = "metrics") -> list[dict]:
    found = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(OF_THE_MACHINE)} for row in found]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run of four steps that keeps all of its checkpoints; its KL coefficient moves, and so does its reference."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    config = TrainConfig(
        output=str(folder), steps=4, save_every=1, keep_checkpoints=0, prompts_per_step=2, num_samples=4,
        max_new_tokens=12, generator="transformers", report_to=(), kl_target=0.5, reference_every=1,
        reference_share=0.5,
    )  # fmt: skip
    loop.train(config)
    return folder


@pytest.mark.slow
def test_a_fork_without_changes_equals_the_run_bit_for_bit(whole, tmp_path, capsys) -> None:
    config = replace(settings_of(whole / "checkpoints" / "step-2"), output=str(tmp_path / "fork"))
    loop.train(config)
    assert rows(tmp_path / "fork") == rows(whole)
    assert (tmp_path / "fork" / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    for name in ("model.safetensors", "trainer.safetensors", "reference.safetensors"):
        ours, theirs = (load_file(run / "checkpoints" / "step-4" / name) for run in (tmp_path / "fork", whole))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours), name
    said = capsys.readouterr().out
    assert f"forked from {whole / 'checkpoints' / 'step-2'}; all settings as they were" in said
    assert load_config(tmp_path / "fork" / "config.yaml").fork == f"{whole}:2"


@pytest.mark.slow
def test_a_fork_takes_changed_settings_and_leaves_the_run_as_it_was(whole, tmp_path, capsys) -> None:
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    options = ["--kl-coef", "0.7", "--kl-target", "0", "--seed", "5", "--reference-every", "0", "--steps", "3"]
    assert main(["train", "--fork", f"{whole}:2", "--output", str(tmp_path / "fork"), *options]) == 0
    found = rows(tmp_path / "fork")
    assert found[:2] == rows(whole)[:2] and [row["step"] for row in found] == [1, 2, 3]
    assert found[2]["kl/coef"] == 0.7 != rows(whole)[2]["kl/coef"]
    assert rows(tmp_path / "fork", "samples")[-1] != rows(whole, "samples")[3 * 8 - 1]
    said = capsys.readouterr().out
    assert "kl_coef 0.2 -> 0.7" in said and "seed 0 -> 5" in said and "steps 4 -> 3" in said
    assert before == {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.long
def test_a_fork_that_ended_before_its_first_checkpoint_begins_again_on_resume(whole, tmp_path) -> None:
    folder = tmp_path / "fork"
    config = replace(settings_of(whole / "checkpoints" / "step-2"), output=str(folder))
    loop.train(config)
    expected = rows(folder)
    shutil.rmtree(folder / "checkpoints")
    (folder / "metrics.jsonl").write_text("".join((whole / "metrics.jsonl").read_text().splitlines(True)[:3]))
    assert main(["train", "--output", str(folder), "--resume"]) == 0
    assert rows(folder) == expected


@pytest.mark.slow
def test_what_cannot_be_forked_is_said_in_one_line(whole, tmp_path, capsys) -> None:
    for fork, words in (
        (f"{whole}:9", "has no checkpoint '9'; it has 1, 2, 3, 4"),
        (f"{whole}:4", "is after step 4, and the fork ends at --steps 4"),
        (str(tmp_path / "nowhere"), "holds no checkpoint"),
    ):
        assert main(["train", "--fork", fork, "--output", str(tmp_path / "fork")]) == 2
        message = capsys.readouterr().err
        assert message.startswith("fastkl: fork: ") and words in message and message.count("\n") == 1
    assert settings_of(whole / "checkpoints" / "step-3").output == f"{whole}-2"
    with pytest.raises(UserError, match="is not a checkpoint of fastkl"):
        settings_of(tmp_path)
