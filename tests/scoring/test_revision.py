"""--revision: the weights and the tokenizer are those of the revision, and one that is not there is named."""

from __future__ import annotations

import pytest
import torch
from toy import toy_model

from fastkl.errors import UserError
from fastkl.scoring.models import load_config, load_model
from fastkl.scoring.source import resolve_model, snapshot


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A local hub cache with two revisions of org/tiny, and no network."""
    from huggingface_hub import constants

    models = {}
    for number, name in enumerate(("main", "v2")):
        commit = str(number) * 40
        repo = tmp_path / "models--org--tiny"
        (repo / "refs").mkdir(parents=True, exist_ok=True)
        (repo / "refs" / name).write_text(commit)
        models[name] = toy_model(number, torch.float32)
        models[name].save_pretrained(repo / "snapshots" / commit)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return models


def test_revision_decides_which_weights_are_loaded(hub):
    for name in ("main", "v2"):
        folder = resolve_model("org/tiny", name)
        assert snapshot("org/tiny", name, weights=True) == folder
        loaded = load_model(folder, torch.device("cpu")).state_dict()
        assert all(torch.equal(value, loaded[key]) for key, value in hub[name].state_dict().items())
        assert load_config(folder).vocab_size == 23


@pytest.mark.parametrize(
    ("name", "revision", "words"),
    [
        ("org/tiny", "v3", "revision: 'org/tiny' has no 'v3', or it cannot be fetched"),
        ("storyteller", "v1", "revision: 'storyteller' is not on the hub"),
        (".", "v1", "revision: '.' is not on the hub, and has no 'v1'; leave it out"),
    ],
)
def test_revision_that_is_not_there_is_named(hub, name, revision, words):
    with pytest.raises(UserError, match=words):
        resolve_model(name, revision)
