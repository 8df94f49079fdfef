"""Frozen matrices in 4 bits: what the adapters' runs need of them. bitsandbytes computes on CPUs, too, if slowly."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch

from fastkl.config.settings import TrainConfig, check_config
from fastkl.errors import UserError
from fastkl.scoring.adapters import add_adapters, merged, switched_off
from fastkl.scoring.models import load_model, store_as_computed
from fastkl.storyteller import model_path
from fastkl.training.places import check_storage

CPU = torch.device("cpu")
IDS = torch.arange(5, 45)[None]


def test_it_is_refused_where_it_cannot_be_done(monkeypatch):
    config = TrainConfig(qlora=True, lora_rank=4)
    with pytest.raises(UserError, match="qlora: weights of 4 bits cannot be trained themselves; add --lora-rank"):
        check_config(replace(config, lora_rank=0))
    with pytest.raises(UserError, match="qlora: 4 bits need a GPU, and this run is on the cpu"):
        check_storage(config, CPU, torch.float32)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="qlora: bitsandbytes, .* pip install bitsandbytes"):
        check_storage(config, torch.device("cuda"), torch.bfloat16)


@pytest.fixture(scope="module")
def model():
    pytest.importorskip("bitsandbytes")
    made = load_model(str(model_path()), CPU, four_bit=True)
    add_adapters(made, 4, 8.0, ("all-linear",), seed=0)
    return made


def logits_of(model) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def test_what_the_engine_gets_computes_what_the_trainer_computes(model):
    """Merged weights in a plain model, with adapters that are not zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02, generator=torch.Generator().manual_seed(1))
    plain = load_model(str(model_path()), CPU)
    untouched = {name: p.clone() for name, p in plain.named_parameters()}
    weights = dict(merged(model))
    assert weights.keys() == untouched.keys()
    plain.load_state_dict(weights, strict=False)
    torch.testing.assert_close(logits_of(plain), logits_of(model), rtol=1e-3, atol=1e-3)
    assert all(p.shape == untouched[name].shape for name, p in weights.items())
    assert any(not torch.equal(p, untouched[name]) for name, p in weights.items())


def test_the_reference_is_the_rounded_model_and_only_adapters_have_a_gradient(model):
    with switched_off(model):
        off = logits_of(model)
    rounded = load_model(str(model_path()), CPU, four_bit=True)
    assert torch.equal(off, logits_of(rounded))
    logits_of(model).square().mean().backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient and all(".lora_" in name for name in with_gradient)
    model.zero_grad()


def test_four_bits_stay_four_bits(model):
    before = {name: p.dtype for name, p in model.named_parameters()}
    assert torch.uint8 in before.values()
    store_as_computed(model, torch.bfloat16)
    assert {name: p.dtype for name, p in model.named_parameters()} == before
