"""Batching the backbone: every layout equals one-at-a-time forwards, in values and gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import slow
from toy import prompt, toy_batch, toy_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from fastkl.scoring import attention, backbone
from fastkl.scoring.models import without_dropout
from fastkl.scoring.pack import pack
from fastkl.types import Completion, RolloutBatch

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def packed_attention():
    backbone.register_packed_attention()


def only_micro_batch(batch):
    ((_, micro),) = pack(batch, range(len(batch.prompts)), 1 << 30, CPU)
    return micro


def states_of(model, batch, layout: str) -> torch.Tensor:
    """Hidden states of all N scored tokens."""
    micro = only_micro_batch(batch)
    with backbone.scoring(model, layout):
        states = backbone.hidden_states(model, micro, layout)
    return states if micro.distinct is None else states[micro.distinct.copies]


def check_sliding_window(layout: str, window: int) -> None:
    """Hidden states of a model that looks back `window` tokens are those of separate forwards."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=23, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=window, initializer_range=0.5,
    )  # fmt: skip
    model = MistralForCausalLM(config).double().eval()
    for batch in (toy_batch(toy_model(), max_new_tokens=9), alike_batch()):
        states, expected = states_of(model, batch, layout), separate_hidden_states(model, batch)
        torch.testing.assert_close(states, expected, rtol=0, atol=1e-10)


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


def toy_gpt2() -> torch.nn.Module:
    """float64 throughout, unlike Llama."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=23, n_embd=16, n_layer=2, n_head=2, n_positions=64))
    return without_dropout(model.double())


def equal_lengths_batch():
    completions = tuple(Completion((4, 5, i), (0.0,) * 3, "length", "") for i in range(4))
    return RolloutBatch((prompt(1, 2),), (completions,), torch.zeros(1, 4), torch.ones(1, 4, dtype=torch.bool), 0)


def alike_batch(long: int = 0) -> RolloutBatch:
    """Prompts that begin alike, one of them twice; samples that are equal, that begin as others do, that are the
    beginning of others, or that do not count. long: tokens more in the last prompt's samples."""
    samples = [
        [(4, 5, 6), (4, 5, 6), (4, 5), (9, 5, 6)],
        [(4, 5, 7, 8, 22), (4, 5, 7, 9, 22), (4, 5, 7, 8, 22), (4,)],
        [(7, 4, 5), (7, 4, 6), (8, 8, 8), (7, 4, 6, 5)],
        [(3, *(i % 22 for i in range(long)), 2), (3, *(i % 21 for i in range(long)), 2), (3,), (3, 22)],
    ]
    completions = tuple(
        tuple(Completion(ids, (0.0,) * len(ids), "length", "") for ids in group) for group in samples
    )  # fmt: skip
    valid = torch.ones(4, 4, dtype=torch.bool)
    valid[2, 2] = False
    return RolloutBatch(
        (prompt(1, 2, 3), prompt(1, 2), prompt(1, 2, 3), prompt(5)), completions, torch.zeros(4, 4), valid, 0
    )


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
@pytest.mark.parametrize(
    "make_batch",
    [toy_batch, lambda model: alike_batch(), *slow(lambda model: equal_lengths_batch())],
    ids=["ragged", "alike", "equal"],
)
@pytest.mark.parametrize("make_model", [toy_model, lambda: toy_gpt2()], ids=["llama", "gpt2"])
def test_batched_forward_and_gradient_equal_separate_forwards(layout, make_batch, make_model):
    model = make_model()
    batch = make_batch(toy_model())
    hidden, expected = states_of(model, batch, layout), separate_hidden_states(model, batch)
    torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-12)
    weights = torch.randn_like(expected)
    gradients = [
        torch.autograd.grad((h * weights).sum(), list(model.base_model.parameters())) for h in (hidden, expected)
    ]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize("layout", ["shared", "packed"])
def test_gradient_checkpointing_changes_no_gradient_and_generation_still_caches(layout):
    model = toy_model()
    micro = only_micro_batch(toy_batch(model))

    def gradient() -> torch.Tensor:
        with backbone.scoring(model, layout):
            loss = backbone.hidden_states(model, micro, layout).square().sum()
            return torch.autograd.grad(loss, model.base_model.embed_tokens.weight)[0]

    plain = gradient()
    model.gradient_checkpointing_enable()
    torch.testing.assert_close(gradient(), plain, rtol=0, atol=1e-12)
    assert not model.training
    assert model(input_ids=torch.tensor([[1, 2]]), use_cache=True).past_key_values.get_seq_length() == 2


def test_choose_layout_computes_prompts_once_for_llama_and_leaves_the_models_own_attention_in_place():
    model = toy_model()
    layout, reason = backbone.choose_layout(model, only_micro_batch(toy_batch(model)))
    assert layout == "shared"
    assert "agrees" in reason
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("layout", ["shared", "packed"])
@pytest.mark.parametrize("window", [*slow(2), 3, *slow(7)])
def test_sliding_windows_are_respected(layout, window):
    check_sliding_window(layout, window)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neo"])
def test_a_layout_that_leaks_between_sequences_is_never_chosen(family):
    """GPT-Neo ignores attention implementations from outside: its packed row would attend across sequences."""
    torch.manual_seed(0)
    if family == "gpt2":
        model = toy_gpt2()
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
    torch.testing.assert_close(states_of(model, batch, layout), expected, rtol=0, atol=tolerance)
    if family == "gpt_neo":
        assert layout == "padded", reason


def model_with_span(kind: str, **options) -> torch.nn.Module:
    """A tiny model in which a token sees 16 tokens at most."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, vocab_size=23, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, max_position_embeddings=64, initializer_range=0.5, eos_token_id=22,
        pad_token_id=0, bos_token_id=1, **options,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).float().eval()


def chunked_model() -> torch.nn.Module:
    """Llama-4 keeps its chunks in its mask alone: no attention function is told of them."""
    return model_with_span(
        "llama4_text", attention_chunk_size=16, intermediate_size_mlp=24, moe_layers=[], no_rope_layers=[1, 1],
    )  # fmt: skip


@torch.no_grad()
def test_a_window_that_stands_in_the_mask_alone_is_found_by_a_probe_that_is_longer_than_it():
    """On the short probe the packed row agrees; 20 tokens would be mis-scored by nats."""
    model = chunked_model()
    short = only_micro_batch(toy_batch(toy_model()))
    assert max(short.lengths) < 16
    assert backbone._difference(model, short, "packed") < 1e-5
    assert backbone._difference(model, backbone.long_probe(model, 16), "packed") > 0.05
    assert backbone._difference(model, backbone.long_probe(model, 16), "shared") > 0.05
    layout, reason = backbone.choose_layout(model, short)
    assert layout == "padded"
    assert all(f"{packed} differs from separate forwards" in reason for packed in ("shared", "packed"))
    assert backbone._difference(model, backbone.long_probe(model, 16), "padded") < 1e-5


def test_a_window_longer_than_every_sequence_costs_no_probe():
    model = chunked_model()
    short = only_micro_batch(toy_batch(toy_model()))
    seen = []
    model.model.register_forward_pre_hook(lambda m, a, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True)
    layout, reason = backbone.choose_layout(model, short, max_tokens=16)
    assert layout == "shared" and "window" not in reason
    rows = len(short.input_ids), len(short.tree.source)
    assert max(length for _, length in seen if length not in rows) == max(short.lengths)


def test_a_window_that_attention_is_told_of_stays_packed_and_one_too_long_to_be_tried_does_not(monkeypatch):
    model = model_with_span("mistral", sliding_window=16)
    short = only_micro_batch(toy_batch(toy_model()))
    layout, reason = backbone.choose_layout(model, short)
    assert layout == "shared" and "beyond the window of 16 tokens" in reason
    monkeypatch.setattr(backbone, "LONGEST_PROBE", 16)
    layout, reason = backbone.choose_layout(model, short)
    assert layout == "padded" and "cannot be tried beyond the window of 16 tokens" in reason


@pytest.mark.parametrize(
    ("kind", "windows"),
    [
        ("mistral", [4096]), ("gpt_neo", [256]), ("llama4_text", [8192]), ("recurrent_gemma", [2048]),
        ("modernbert-decoder", [128]), ("gemma3", [4096]), ("qwen2", []), ("mixtral", []), ("llama", []), ("lfm2", []),
    ],
)  # fmt: skip
def test_windows_are_read_from_a_configuration_by_their_names(kind, windows):
    """Nested and under every name; numbers of layers, blocks and experts are none."""
    assert set(windows) <= set(backbone.windows_of(AutoConfig.for_model(kind)))
    assert windows or not backbone.windows_of(AutoConfig.for_model(kind))


def test_the_packed_row_without_its_attention_would_leak():
    """The control: the same row through the model's own attention lets sequences see each other."""
    model = toy_model()
    batch = toy_batch(model)
    micro = only_micro_batch(batch)
    leaking = model.base_model(
        input_ids=micro.input_ids[None], position_ids=micro.position_ids[None], use_cache=True
    ).last_hidden_state[0][micro.score_positions]
    assert (leaking - separate_hidden_states(model, batch)).abs().max() > 0.1


def test_what_begins_alike_is_computed_once_and_the_last_token_of_a_sequence_not_at_all():
    """By counting the beginnings of all sequences, of which each may be computed once."""
    model = toy_model()
    for batch in (toy_batch(model), alike_batch()):
        micro, seen = only_micro_batch(batch), []
        hook = model.model.register_forward_pre_hook(
            lambda m, a, kwargs, seen=seen: seen.append(kwargs["input_ids"].shape), with_kwargs=True
        )
        with backbone.scoring(model, "shared"):
            backbone.hidden_states(model, micro, "shared")
        hook.remove()
        beginnings = {
            (p.token_ids + c.token_ids)[:end]
            for p, group, valid in zip(batch.prompts, batch.completions, batch.valid.tolist(), strict=True)
            for c, ok in zip(group, valid, strict=True)
            for end in range(1, len(p.token_ids + c.token_ids))
            if ok
        }
        assert seen == [(1, len(beginnings))]


@pytest.mark.parametrize("blocks", [(1, 8), (5, 8), (64, 1 << 30), (64, 2)])
def test_blocks_of_any_width_give_the_states_of_separate_forwards(monkeypatch, blocks):
    """Bounds of blocks fall on and between those of sequences; the last block is filled up."""
    monkeypatch.setattr(attention, "LEAST_BLOCK", blocks[0])
    monkeypatch.setattr(attention, "MOST_COPIES", blocks[1])
    model = toy_model(max_position_embeddings=512)
    batch = alike_batch(long=150 if blocks[0] == 64 else 0)
    torch.testing.assert_close(
        states_of(model, batch, "shared"), separate_hidden_states(model, batch), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("change", ["end", "before"])
def test_a_completion_that_sees_its_neighbours_would_be_noticed(monkeypatch, change):
    """The controls: a token sees what stands before it on other branches, or not all that it begins with."""
    model = toy_model()
    micro = pack(alike_batch(), [0, 1], 1 << 30, CPU)[0][1]
    tree = micro.tree
    if change == "end":
        wrong = replace(tree, end=torch.full_like(tree.end, len(tree.end)))
    else:
        monkeypatch.setattr(attention, "LEAST_BLOCK", 2)
        monkeypatch.setattr(type(tree), "before", lambda self, token: torch.zeros(0, dtype=torch.int64))
        wrong = tree
    layout, reason = backbone.choose_layout(model, replace(micro, tree=wrong))
    assert layout == "packed" and "shared differs from separate forwards by" in reason


def test_half_precision_attention_is_checked_by_itself(monkeypatch):
    """It may be another kernel than that of float32."""
    model = toy_model(dtype=torch.float32)
    micro = only_micro_batch(toy_batch(model))
    right = attention.packed_attention

    def wrong_in_half_precision(module, query, key, value, *rest, **options):
        out, _ = right(module, query, key, value, *rest, **options)
        return out.roll(1, 1) if value.dtype == torch.bfloat16 else out, None

    assert backbone.choose_layout(model, micro, torch.bfloat16)[0] == "shared"
    monkeypatch.setattr(attention, "packed_attention", wrong_in_half_precision)
    assert backbone.choose_layout(model, micro)[0] == "shared"
    layout, reason = backbone.choose_layout(model, micro, torch.bfloat16)
    assert layout == "padded" and "packed differs from separate forwards by" in reason


@pytest.mark.parametrize("layout", ["shared", "packed"])
def test_attention_on_a_cpu_is_computed_in_float32_under_autocast(monkeypatch, layout):
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
    with backbone.scoring(model, layout), torch.autocast("cpu", torch.bfloat16):
        backbone.hidden_states(model, micro, layout)
    assert seen == {(torch.float32, False)}
