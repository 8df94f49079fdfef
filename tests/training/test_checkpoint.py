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
from fastkl.training.checkpoint import list_checkpoints, newest_checkpoint, restore_training_state, save_checkpoint


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
        root, step, policy=model, tokenizer=NoTokenizer(), optimizer=optimizer, state=state, config={"lr": 1}, keep=keep
    )


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


@pytest.mark.parametrize("stage", ["_flush", "_fingerprint", "_random_states"])
def test_a_failure_at_any_stage_leaves_the_last_good_checkpoint(tmp_path, monkeypatch, stage):
    model, optimizer = trained()
    save(tmp_path, 1, model, optimizer)
    original, calls = getattr(checkpoint, stage), []

    def fails_on_third(*args):
        calls.append(args)
        if len(calls) == (1 if stage == "_random_states" else 3):
            raise OSError(28, "No space left on device")
        return original(*args)

    monkeypatch.setattr(checkpoint, stage, fails_on_third)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, 2, model, optimizer)
    monkeypatch.undo()
    assert newest_checkpoint(tmp_path).step == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    assert save(tmp_path, 2, model, optimizer).name == "step-2"


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
