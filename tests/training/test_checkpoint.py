"""Checkpoints: whole or absent, verified, and exact to the bit."""

from __future__ import annotations

import json
import os
import random
import shutil

import numpy as np
import pytest
import torch
from toy import toy_model
from transformers import AutoModelForCausalLM

from fastkl.errors import UserError
from fastkl.training import checkpoint
from fastkl.training.checkpoint import (
    RandomState,
    check_savable,
    list_checkpoints,
    newest_checkpoint,
    open_checkpoint,
    restore_training_state,
    save_checkpoint,
    set_aside_newer,
)


class NoTokenizer:
    def save_pretrained(self, folder):
        (folder / "tokenizer.json").write_text("{}")


def trained(seed: int = 0, steps: int = 3):
    """A model and its optimizer after a few steps on a fixed loss."""
    model = toy_model(seed, torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    for step in range(steps):
        advance(model, optimizer, step)
    return model, optimizer


def advance(model, optimizer, step: int) -> None:
    ids = torch.arange(6)[None] + step % 7
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def save(root, step, model, optimizer, keep: int = 2):
    state = {"prompts": {"epoch": 1, "position": step}}
    return save_checkpoint(
        root, step, policy=model, tokenizer=NoTokenizer(), optimizer=optimizer, state=state, random=RandomState.now(),
        config={"lr": 1}, keep=keep,
    )  # fmt: skip


def test_training_continues_to_the_same_bits(tmp_path):
    model, optimizer = trained()
    random.seed(5), np.random.seed(6), torch.manual_seed(7)
    save(tmp_path, 3, model, optimizer)
    for step in range(3, 6):
        advance(model, optimizer, step)
    draws = random.random(), np.random.rand(), torch.rand(3)

    saved = newest_checkpoint(tmp_path)
    resumed = AutoModelForCausalLM.from_pretrained(saved.folder, dtype=torch.float32)
    again = torch.optim.AdamW(resumed.parameters(), lr=1e-2, fused=True)
    restore_training_state(saved, resumed, again)
    for step in range(3, 6):
        advance(resumed, again, step)
    for ours, theirs in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert (random.random(), np.random.rand()) == draws[:2]
    assert torch.equal(torch.rand(3), draws[2])
    assert saved.step == 3
    assert saved.manifest["state"]["prompts"] == {"epoch": 1, "position": 3}


def test_only_the_newest_are_kept(tmp_path):
    model, optimizer = trained()
    for step in (1, 2, 10):
        save(tmp_path, step, model, optimizer)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-2", "step-10"]
    assert newest_checkpoint(tmp_path).step == 10


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["_flush", "_fingerprint", "checksum"])
def test_a_failure_at_any_stage_leaves_the_last_good_checkpoint(tmp_path, monkeypatch, stage):
    model, optimizer = trained()
    save(tmp_path, 1, model, optimizer)
    original, calls = getattr(checkpoint, stage), []

    def fails_on_third(*args):
        calls.append(args)
        if len(calls) == (1 if stage == "checksum" else 3):
            raise OSError(28, "No space left on device")
        return original(*args)

    monkeypatch.setattr(checkpoint, stage, fails_on_third)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, 2, model, optimizer)
    monkeypatch.undo()
    assert newest_checkpoint(tmp_path).step == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    assert save(tmp_path, 2, model, optimizer).name == "step-2"


@pytest.mark.slow
def test_a_kill_between_any_two_file_operations_leaves_a_whole_checkpoint(tmp_path):
    """A child process is killed at its n-th flush or rename, for every n: step-1 or step-2 opens each time."""
    model, optimizer = trained()
    found = set()
    for n in range(1, 12):
        root = tmp_path / str(n)
        save(root, 1, model, optimizer)
        if (child := os.fork()) == 0:
            count = iter(range(1, 1000))
            flush, rename = checkpoint._flush, os.rename

            def dies(action, *args, count=count, n=n):
                if next(count) == n:
                    os._exit(9)
                return action(*args)

            checkpoint._flush = lambda path: dies(flush, path)  # noqa: B023
            checkpoint.os.rename = lambda a, b: dies(rename, a, b)  # noqa: B023
            save(root, 2, model, optimizer)
            os._exit(0)
        os.waitpid(child, 0)
        found.add(newest_checkpoint(root).step)
        save(root, 3, model, optimizer)
        assert not list(root.glob(".*")), "leftovers of the killed save must go with the next one"
    assert found == {1, 2}


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest", "foreign", "format"])
def test_a_damaged_or_foreign_checkpoint_is_refused_by_name(tmp_path, damage):
    model, optimizer = trained()
    folder = save(tmp_path, 4, model, optimizer)
    weights, manifest = folder / "model.safetensors", folder / "checkpoint.json"
    if damage == "flip":
        content = bytearray(weights.read_bytes())
        content[-5] ^= 1
        weights.write_bytes(content)
    elif damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "remove":
        weights.unlink()
    elif damage == "manifest":
        manifest.write_text(manifest.read_text()[:-20])
    elif damage == "foreign":
        manifest.unlink()
    else:
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 99}))
    with pytest.raises(UserError, match="^resume: .*step-4.*delete that folder"):
        newest_checkpoint(tmp_path)


def test_resuming_without_a_checkpoint_says_so(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint"):
        newest_checkpoint(tmp_path)
    shutil.rmtree(tmp_path)
    with pytest.raises(UserError, match="holds no checkpoint"):
        newest_checkpoint(tmp_path)


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before_and_is_set_aside(tmp_path):
    model, optimizer = trained()
    save(tmp_path, 1, model, optimizer), save(tmp_path, 2, model, optimizer)
    (tmp_path / "step-2" / "model.safetensors").write_bytes(b"not a model")
    found = newest_checkpoint(tmp_path)
    assert found.step == 1 and "step-2" in found.note and "damaged" in found.note
    set_aside_newer(found)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-1"]
    assert (tmp_path / "damaged-step-2" / "model.safetensors").read_bytes() == b"not a model"


def test_every_bit_flip_in_the_manifest_is_found(tmp_path):
    """Or changes nothing: white space between values, a letter of a key that JSON reads alike."""
    model, optimizer = trained()
    folder = save(tmp_path, 4, model, optimizer)
    path, rng = folder / "checkpoint.json", random.Random(0)
    whole = path.read_bytes()
    expected = open_checkpoint(folder).manifest
    for _ in range(300):
        flipped = bytearray(whole)
        flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        try:
            assert open_checkpoint(folder).manifest == expected
        except UserError as refused:
            assert "step-4" in str(refused)
    path.write_bytes(whole)
    open_checkpoint(folder)


def test_weights_get_the_mode_that_the_umask_asks_for(tmp_path):
    model, optimizer = trained()
    before = os.umask(0o022)
    try:
        folder = save(tmp_path, 1, model, optimizer)
    finally:
        os.umask(before)
    assert {oct(path.stat().st_mode & 0o777) for path in folder.iterdir()} == {"0o644"}


@pytest.fixture
def tokenizer():
    from transformers import AutoTokenizer

    from fastkl.storyteller import model_path

    return AutoTokenizer.from_pretrained(model_path())


def test_a_tokenizer_with_several_chat_templates_is_saved_with_its_folder(tmp_path, tokenizer):
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ messages }} tools"}
    model, optimizer = trained()
    assert check_savable(tmp_path, model, tokenizer) is None
    folder = save_checkpoint(
        tmp_path, 1, policy=model, tokenizer=tokenizer, optimizer=optimizer, state={}, random=RandomState.now(),
        config={}, keep=0,
    )  # fmt: skip
    inner = [name for name in open_checkpoint(folder).manifest["files"] if "/" in name]
    assert inner and all((folder / name).is_file() for name in inner)


@pytest.mark.parametrize(
    "values", [{"do_sample": False, "temperature": 0.9, "top_p": 0.6}, {"num_beams": 1, "num_return_sequences": 3}]
)
def test_a_generation_config_that_transformers_will_not_write_is_found_and_mended_before_the_first_step(
    tmp_path, tokenizer, values
):
    model, optimizer = trained()
    for name, value in ({"eos_token_id": 7} | values).items():
        setattr(model.generation_config, name, value)
    with pytest.raises(ValueError):
        model.save_pretrained(tmp_path / "control")
    note = check_savable(tmp_path, model, tokenizer)
    assert "generation_config.json cannot be saved as it is" in note
    assert not list(tmp_path.glob(".*"))
    folder = save(tmp_path, 1, model, optimizer)
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 7


def test_a_model_that_can_never_be_saved_is_refused_before_the_first_step(tmp_path):
    class Unsavable:
        def save_pretrained(self, folder) -> None:
            raise TypeError("Object of type set is not JSON serializable")

    with pytest.raises(UserError, match="model: its checkpoints could not be saved .*not JSON serializable"):
        check_savable(tmp_path, trained()[0], Unsavable())
