"""Batching the backbone: every layout equals one-at-a-time forwards, in values and gradients."""

from __future__ import annotations

import pytest
import torch
from toy import prompt, toy_batch, toy_model
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoConfig, GPTNeoForCausalLM, MistralConfig, MistralForCausalLM

from fastkl.scoring import backbone
from fastkl.scoring.pack import pack
from fastkl.types import Completion, RolloutBatch

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def packed_attention():
    backbone.register_packed_attention()


def only_micro_batch(batch):
    ((_, micro),) = pack(batch, range(len(batch.prompts)), 1 << 30, CPU)
    return micro


def separate_hidden_states(model, batch) -> torch.Tensor:
    """Straight from the definition: each valid sequence alone; the states before each completion token."""
    states = []
    for p, group, valid in zip(batch.prompts, batch.completions, batch.valid.tolist(), strict=True):
        for completion, ok in zip(group, valid, strict=True):
            if ok:
                ids = torch.tensor([p.token_ids + completion.token_ids])
                hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
                states.append(hidden[len(p.token_ids) - 1 : -1])
    return torch.cat(states)


def equal_lengths_batch():
    completions = tuple(Completion((4, 5, i), (0.0,) * 3, "length", "") for i in range(4))
    return RolloutBatch((prompt(1, 2),), (completions,), torch.zeros(1, 4), torch.ones(1, 4, dtype=torch.bool), 0)


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("make_batch", [toy_batch, lambda model: equal_lengths_batch()], ids=["ragged", "equal"])
def test_batched_forward_and_gradient_equal_separate_forwards(layout, make_batch):
    model = toy_model()
    batch = make_batch(model)
    with backbone.scoring(model, layout):
        hidden = backbone.hidden_states(model, only_micro_batch(batch), layout)
    expected = separate_hidden_states(model, batch)
    torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-12)
    weights = torch.randn_like(expected)
    gradients = [
        torch.autograd.grad((h * weights).sum(), list(model.base_model.parameters())) for h in (hidden, expected)
    ]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


def test_gradient_checkpointing_changes_no_gradient_and_generation_still_caches():
    model = toy_model()
    micro = only_micro_batch(toy_batch(model))

    def gradient() -> torch.Tensor:
        with backbone.scoring(model, "packed"):
            loss = backbone.hidden_states(model, micro, "packed").square().sum()
            return torch.autograd.grad(loss, model.base_model.embed_tokens.weight)[0]

    plain = gradient()
    model.gradient_checkpointing_enable()
    torch.testing.assert_close(gradient(), plain, rtol=0, atol=1e-12)
    assert not model.training
    assert model(input_ids=torch.tensor([[1, 2]]), use_cache=True).past_key_values.get_seq_length() == 2


def test_choose_layout_takes_the_packed_row_for_llama_and_leaves_the_models_own_attention_in_place():
    model = toy_model()
    layout, reason = backbone.choose_layout(model, only_micro_batch(toy_batch(model)))
    assert layout == "packed"
    assert "agrees" in reason
    assert model.config._attn_implementation == "sdpa"


def test_sliding_windows_are_respected():
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=23, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=3, initializer_range=0.5,
    )  # fmt: skip
    model = MistralForCausalLM(config).double().eval()
    batch = toy_batch(toy_model(), max_new_tokens=9)
    with backbone.scoring(model, "packed"):
        hidden = backbone.packed_hidden_states(model, only_micro_batch(batch))
    torch.testing.assert_close(hidden, separate_hidden_states(model, batch), rtol=0, atol=1e-10)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neo"])
def test_a_layout_that_leaks_between_sequences_is_never_chosen(family):
    """GPT-Neo ignores attention implementations from outside: its packed row would attend across sequences."""
    torch.manual_seed(0)
    if family == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=23, n_embd=16, n_layer=2, n_head=2, n_positions=64))
    else:
        model = GPTNeoForCausalLM(
            GPTNeoConfig(
                vocab_size=23,
                hidden_size=16,
                num_layers=2,
                num_heads=2,
                max_position_embeddings=64,
                attention_types=[[["global", "local"], 1]],
                window_size=4,
            )  # fmt: skip
        )
    model = model.double().eval()
    batch = toy_batch(toy_model())
    micro = only_micro_batch(batch)
    layout, reason = backbone.choose_layout(model, micro)
    expected = separate_hidden_states(model, batch)
    tolerance = 1e-10 if family == "gpt2" else 1e-5  # GPT-Neo computes its attention in float32
    with backbone.scoring(model, layout):
        hidden = backbone.hidden_states(model, micro, layout)
    torch.testing.assert_close(hidden, expected, rtol=0, atol=tolerance)
    if family == "gpt_neo":
        assert layout == "padded", reason


def test_the_packed_row_without_its_attention_would_leak():
    """The control: the same row through the model's own attention lets sequences see each other."""
    model = toy_model()
    batch = toy_batch(model)
    micro = only_micro_batch(batch)
    leaking = model.base_model(
        input_ids=micro.input_ids[None], position_ids=micro.position_ids[None], use_cache=True
    ).last_hidden_state[0][micro.score_positions]
    assert (leaking - separate_hidden_states(model, batch)).abs().max() > 0.1


def test_half_precision_attention_is_checked_by_itself(monkeypatch):
    """It may be another kernel than that of float32."""
    model = toy_model(dtype=torch.float32)
    micro = only_micro_batch(toy_batch(model))
    right = backbone._padded_attention

    def wrong_in_half_precision(query, key, value, *rest):
        out = right(query, key, value, *rest)
        return out.roll(1, 0) if value.dtype == torch.bfloat16 else out

    assert backbone.choose_layout(model, micro, torch.bfloat16)[0] == "packed"
    monkeypatch.setattr(backbone, "_padded_attention", wrong_in_half_precision)
    assert backbone.choose_layout(model, micro)[0] == "packed"
    layout, reason = backbone.choose_layout(model, micro, torch.bfloat16)
    assert layout == "padded" and "packed differs from separate forwards by" in reason


def test_attention_on_a_cpu_is_computed_in_float32_under_autocast(monkeypatch):
    """The bfloat16 backward of PyTorch's CPU kernel takes three times as long."""
    seen = set()
    attend = torch.nn.functional.scaled_dot_product_attention

    def logged(query, *rest, **options):
        seen.add((query.dtype, torch.is_autocast_enabled("cpu")))
        return attend(query, *rest, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", logged)
    model = toy_model(dtype=torch.float32)
    micro = only_micro_batch(toy_batch(model))
    seen.clear()
    with backbone.scoring(model, "packed"), torch.autocast("cpu", torch.bfloat16):
        backbone.hidden_states(model, micro, "packed")
    assert seen == {(torch.float32, False)}
