"""Loading models: weights that are not there, wrappers' names, dropout of every kind, a hub that cannot be reached."""

from __future__ import annotations

import json
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from toy import toy_model
from transformers import AutoConfig, AutoModelForCausalLM

from fastkl.errors import UserError
from fastkl.scoring.head import check_head
from fastkl.scoring.models import context_length, dropouts, load_model, resolve_model, text_config, without_dropout

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "whole"
    toy_model(0).float().save_pretrained(folder)
    return folder


def changed(saved, tmp_path, weights=lambda w: w, **config):
    """A copy of the model with other weights in the file, or other values in config.json."""
    folder = tmp_path / "changed"
    shutil.copytree(saved, folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | config))
    save_file(weights(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    return folder


def layer(weights, old, new):
    return {name.replace(old, new): value for name, value in weights.items()}


@pytest.mark.parametrize(
    ("config", "weights", "words"),
    [
        ({"tie_word_embeddings": False}, lambda w: w, ["lacks lm_head.weight", "tie_word_embeddings"]),
        ({}, lambda w: {n: w[n] for n in w if "layers.1" not in n}, ["lacks model.layers.1", "more", "of one model"]),
        ({}, lambda w: {f"base_model.model.{n}": w[n] for n in w}, ["base_model.model.", "inside of the wrapper"]),
        ({}, lambda w: {f"_orig_mod.{n}": w[n] for n in w}, ["_orig_mod.", "inside of the wrapper"]),
        ({"num_hidden_layers": 1}, lambda w: w, ["has besides model.layers.1"]),
        ({"num_hidden_layers": 3}, lambda w: w, ["lacks model.layers.2"]),
        ({}, lambda w: layer(w, "self_attn", "attn"), ["layers.0.self_attn", "besides model.layers.0.attn"]),
    ],
    ids=["head", "layer", "peft", "compiled", "fewer", "more", "renamed"],
)  # fmt: skip
def test_weights_that_are_missing_renamed_or_surplus_are_named_in_one_sentence(saved, tmp_path, config, weights, words):
    folder = changed(saved, tmp_path, weights, **config)
    with pytest.raises(UserError) as refused:
        load_model(str(folder), CPU)
    message = str(refused.value)
    assert all(word in message for word in words), message
    assert "\n" not in message and len(message) < 500


def test_a_whole_file_and_the_text_part_of_a_multimodal_one_load(saved, tmp_path):
    model = load_model(str(saved), CPU)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, toy_model(0).float()(ids).logits)
    extra = {"vision_tower.encoder.weight": torch.zeros(2)}
    load_model(str(changed(saved, tmp_path, lambda w: w | extra)), CPU)


@pytest.mark.parametrize("kind", ["opt", "falcon", "bloom", "gpt_neo", "gptj"])
def test_models_without_sdpa_load_and_no_dropout_is_left_in_training_mode(kind, tmp_path):
    """Two forwards in training mode agree to the last bit: functional dropout is off, too."""
    common = {"vocab_size": 23, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings = {
        "opt": common | {"ffn_dim": 24, "word_embed_proj_dim": 16, "dropout": 0.3, "max_position_embeddings": 32},
        "falcon": common | {"hidden_dropout": 0.3, "attention_dropout": 0.2},
        "bloom": common | {"hidden_dropout": 0.3, "attention_dropout": 0.2, "n_layer": 2, "n_head": 2},
        "gpt_neo": {
            "vocab_size": 23, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "attention_types": [[["global"], 2]],
            "resid_dropout": 0.3, "embed_dropout": 0.3, "attention_dropout": 0.2, "max_position_embeddings": 32,
        },
        "gptj": {"vocab_size": 23, "n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4, "resid_pdrop": 0.3,
                 "embd_pdrop": 0.3, "attn_pdrop": 0.2, "n_positions": 32},
    }[kind]  # fmt: skip
    torch.manual_seed(0)
    noisy = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).train()
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7]])
    with torch.no_grad():
        assert not torch.equal(noisy(ids).logits, noisy(ids).logits), "the control: there is dropout to switch off"
    noisy.save_pretrained(tmp_path)
    model = load_model(str(tmp_path), CPU).train()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model(ids).logits)
    assert not [name for module in model.modules() for name in dropouts(module)]


def test_a_nested_configuration_is_read_where_its_text_part_is():
    config = AutoConfig.for_model("gemma3")
    assert context_length(config) == config.text_config.max_position_embeddings
    assert text_config(config).head_dim == config.text_config.head_dim


def test_the_head_is_checked_on_a_few_tokens_of_a_long_prompt():
    model, seen = without_dropout(toy_model(0)), []
    model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    check_head(model, [1, 2, 3] * 20)
    assert seen == [16]


def test_a_model_that_is_not_there_is_refused_at_once_where_the_hub_cannot_be_reached(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "https://127.0.0.1:9")  # the port of a service that is not running
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    start = time.monotonic()
    with pytest.raises(UserError, match="'nobody/nothing' is no folder, and the hub cannot be reached"):
        resolve_model("nobody/nothing")
    assert time.monotonic() - start < 5
