"""Loading models: weights that are not there, wrappers' names, dropout of every kind, a hub that cannot be reached."""

from __future__ import annotations

import json
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from toy import toy_batch, toy_model
from transformers import AutoConfig, AutoModelForCausalLM

from fastkl.errors import UserError
from fastkl.sampling.params import Sampling
from fastkl.scoring import backbone, models
from fastkl.scoring.head import check_head, head_of
from fastkl.scoring.models import (
    backbone_of,
    context_length,
    dropouts,
    load_model,
    text_config,
    without_dropout,
)
from fastkl.scoring.pack import pack
from fastkl.scoring.scored_model import ScoredModel
from fastkl.scoring.source import resolve_model

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
    assert context_length(AutoConfig.for_model("whisper")) == 448
    assert context_length(AutoConfig.for_model("xlnet")) is None  # which it calls -1


def test_the_head_is_checked_on_a_few_tokens_of_a_long_prompt():
    model, seen = without_dropout(toy_model(0)), []
    model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    check_head(model, [1, 2, 3] * 20)
    assert max(seen) == 16


def tiny(kind: str, **config):
    torch.manual_seed(0)
    sizes = {"vocab_size": 23, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
             "num_attention_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3}  # fmt: skip
    model = without_dropout(AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(sizes | config))))
    with torch.no_grad():
        for parameter in model.parameters():  # biases are zeros until then
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra"])
def test_layers_of_the_head_before_its_last_product_belong_to_the_backbone(kind):
    """Values and gradients are those of the model's own logits."""
    model, ids = tiny(kind, is_decoder=True), torch.tensor([[5, 6, 7, 8, 9, 10]])
    check_head(model, ids[0].tolist())
    hidden = backbone_of(model)(input_ids=ids, use_cache=False).last_hidden_state
    weights = torch.randn(1, 6, 23)
    logits = head_of(model).logits(hidden), model(ids).logits
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5)
    ours, own = (torch.autograd.grad((x * weights).sum(), list(model.parameters()), allow_unused=True) for x in logits)
    for mine, theirs in zip(ours, own, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4)


def test_a_model_that_looks_ahead_is_refused_even_where_the_prompt_has_one_token():
    with pytest.raises(UserError, match="BertLMHeadModel looks ahead .* is_decoder"):
        check_head(tiny("bert"), [5])


def test_a_model_that_is_not_there_is_refused_at_once_where_the_hub_cannot_be_reached(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "https://127.0.0.1:9")  # the port of a service that is not running
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    start = time.monotonic()
    with pytest.raises(UserError, match="'nobody/nothing' is no folder, and the hub cannot be reached"):
        resolve_model("nobody/nothing")
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("kind", "factor"),
    [("granite", {"logits_scaling": 1.7}), ("hyperclovax", {"logits_scaling": 1.7}), ("cohere", {"logit_scale": 0.3})],
)
def test_the_logits_are_scaled_as_the_model_does(kind, factor):
    """Granite divides by what HyperCLOVA X multiplies by."""
    model, ids = tiny(kind, eos_token_id=2, bos_token_id=1, pad_token_id=0, **factor), torch.tensor([[5, 6, 7]])
    check_head(model, [5, 6, 7])
    hidden = backbone_of(model)(input_ids=ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(head_of(model).logits(hidden), model(ids).logits, rtol=0, atol=1e-5)
    assert abs(head_of(model).logit_scale - 1) > 0.3


def test_weights_lie_where_torch_puts_them_wherever_the_file_has_them(saved, tmp_path):
    """Products with few rows round by alignment, and a checkpoint's header has another length than its model's."""
    file = shutil.copytree(saved, tmp_path / "copy") / "model.safetensors"
    weights = load_file(file)
    for padding in ("", "x" * 8, "x" * 16, "x" * 24):
        save_file(weights, file, {"format": "pt", "padding": padding})
        loaded = load_model(str(file.parent), CPU)
        assert {parameter.data_ptr() % 64 for parameter in loaded.parameters()} == {0}
        assert all(parameter.equal(weights[name]) for name, parameter in loaded.named_parameters())


@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_a_reference_that_is_stored_as_it_is_computed_scores_to_the_last_bit_alike_in_two_thirds_of_the_memory(layout):
    backbone.register_packed_attention()
    model = toy_model(dtype=torch.float32, tie_word_embeddings=False).requires_grad_(False)
    scored = ScoredModel(model, layout, torch.bfloat16)
    ((_, micro),) = pack(toy_batch(toy_model()), [0, 1, 2], 1 << 30, CPU)

    def states() -> torch.Tensor:
        with scored.scoring(), torch.no_grad():
            return scored.hidden(micro).states

    def held() -> int:
        return sum(p.numel() * p.element_size() for p in model.parameters())

    before, bytes_before = states(), held()
    models.store_as_computed(model, torch.float32)
    assert held() == bytes_before
    models.store_as_computed(model, torch.bfloat16)
    assert held() < 0.7 * bytes_before
    assert torch.equal(states(), before)
    assert model.lm_head.weight.dtype == model.model.norm.weight.dtype == torch.float32


def test_what_is_trained_keeps_its_digits():
    model = toy_model(dtype=torch.float32)
    models.store_as_computed(model, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_cached_model_is_loaded_offline_with_a_note_where_the_hub_cannot_be_reached(monkeypatch, capsys):
    import huggingface_hub
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "https://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: f"/cache/{name}/{file}")
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert resolve_model("some/model") == "some/model"
    assert constants.HF_HUB_OFFLINE
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "the hub cannot be reached" in said
    assert "'some/model' is loaded from the local cache" in said and "asks the hub for nothing" in said


@pytest.mark.gpu
def test_on_a_gpu_the_head_is_multiplied_in_the_backbones_dtype_and_keeps_a_float32_gradient():
    """Scores are those of rounded states and weights, computed in float64; the gradient is not rounded to bfloat16."""
    backbone.register_packed_attention()
    model = toy_model(dtype=torch.float32, tie_word_embeddings=False).cuda()
    ((_, micro),) = pack(toy_batch(toy_model()), range(3), 1 << 30, model.device, once=True)
    policy = ScoredModel(model, "shared", torch.bfloat16)
    with policy.scoring():
        hidden = policy.hidden(micro)
        scores = policy(micro, sampling=Sampling()).scores
    assert hidden.states.dtype == torch.bfloat16
    logits = hidden.states.double() @ model.lm_head.weight.bfloat16().double().T
    rows, copies = micro.distinct.rows, micro.distinct.copies
    expected = logits.log_softmax(-1).gather(1, micro.target_ids[rows, None])[copies, 0]
    torch.testing.assert_close(scores.policy_logprobs.double(), expected, rtol=0, atol=1e-5)
    scores.policy_logprobs.sum().backward()
    gradient = model.lm_head.weight.grad
    assert gradient.dtype == torch.float32 and bool((gradient != gradient.bfloat16()).any())
