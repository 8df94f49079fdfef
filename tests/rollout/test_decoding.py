"""Decoding with the policy itself: every kind of cache, or none, gives the model's own log-probs for the same seeds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import slow_where
from test_generators import PROMPTS, gaps, token_ids
from toy import STOP, VOCAB, ToyTokenizer, draw, prompt, toy_model
from transformers import AutoConfig, AutoModelForCausalLM

from fastkl.rollout.transformers import WAYS, TransformersGenerator
from fastkl.sampling.params import Sampling
from fastkl.scoring.head import check_head
from fastkl.scoring.models import without_dropout

COMMON = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": STOP,
    "pad_token_id": 0, "initializer_range": 0.3,
}  # fmt: skip
EXPERTS = {
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}  # fmt: skip
LINEAR = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
MAMBA = {
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2,
    "mamba_chunk_size": 8, "mamba_d_ssm": 64,
}  # fmt: skip
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("alike", {"state_size": 4, "expand": 2, "time_step_rank": 4}),
    "mamba2": ("shared", {"num_heads": 8, "state_size": 8, "n_groups": 1, "expand": 2, "chunk_size": 8}),
    "qwen3_next": ("shared", EXPERTS | LINEAR),
    "lfm2": ("shared", {"block_ff_dim": 48, "layer_types": ["conv", "full_attention"]}),
    "granitemoehybrid": (
        "shared", MAMBA | EXPERTS | {"shared_intermediate_size": 16, "layer_types": ["mamba", "attention"]},
    ),
    "falcon_h1": ("shared", MAMBA),
    "nemotron_h": (
        "anew", {"mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8,
                 "layers_block_type": ["mamba", "attention"]},
    ),
    "minimax": (
        "anew", {"num_local_experts": 2, "num_experts_per_tok": 1, "block_size": 4,
                 "layer_types": ["linear_attention", "full_attention"]},
    ),
    "recurrent_gemma": (
        "anew", {"lru_width": 32, "attention_window_size": 8, "num_hidden_layers": 3,
                 "block_types": ["recurrent", "recurrent", "attention"]},
    ),
    "gpt_oss": ("shared", EXPERTS | {"sliding_window": 4}),
    "gemma2": ("shared", {"sliding_window": 4}),
    "llama4_text": (
        "shared", EXPERTS | {"attention_chunk_size": 4, "intermediate_size_mlp": 48, "moe_layers": [0, 1],
                             "interleave_moe_layer_step": 1, "no_rope_layers": [1, 0]},
    ),
    "roberta": ("anew", {"is_decoder": True}),  # its positions do not count padding tokens, which can be sampled
    "mpt": ("shared", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "expansion_ratio": 2}),
}  # fmt: skip
OLD_STYLE = ("mpt",)
ONE_OF_EACH = ("mamba", "mamba2", "minimax", "gemma2")  # recurrent alike and shared, made anew, with a window


def tiny(kind: str) -> torch.nn.Module:
    """A random model of a kind, a few thousand parameters large."""
    torch.manual_seed(0)
    common = {name: COMMON[name] for name in ("vocab_size", "eos_token_id")} if kind in OLD_STYLE else COMMON
    config = AutoConfig.for_model(kind, **(common | KINDS[kind][1]))
    return without_dropout(AutoModelForCausalLM.from_config(config).float())


@pytest.mark.parametrize("kind", slow_where(lambda kind: kind not in ONE_OF_EACH, KINDS))
def test_whatever_a_model_remembers_its_samples_carry_its_own_logprobs(kind):
    model = tiny(kind)
    check_head(model, [1, 2, 3, 4, 5])
    generator = TransformersGenerator(model, ToyTokenizer(), Sampling(1.0, 8, stop_token_ids=(STOP,)))
    assert generator.way == KINDS[kind][0]
    prompts = (*PROMPTS, prompt(3, 2, 1))
    completions = draw(generator, prompts, 4, seed=1, step=1)
    assert len({c.token_ids for group in completions for c in group}) > 8
    with torch.no_grad():
        assert gaps(model, prompts, completions).max() < 2e-5


def test_every_way_of_decoding_draws_the_same_tokens_from_the_same_seeds():
    generator = TransformersGenerator(toy_model(), ToyTokenizer(), Sampling(1.0, 8, stop_token_ids=(STOP,)), max_rows=6)
    assert generator.way == "shared"
    prompts = (*PROMPTS, prompt(3, 2, 1))
    drawn = []
    for generator.way in WAYS:
        drawn.append(draw(generator, prompts, 4, seed=7, step=1))
    assert token_ids(drawn[0]) == token_ids(drawn[1]) == token_ids(drawn[2])
    lengths = {len(c.token_ids) for group in drawn[0] for c in group}
    assert len(lengths) > 2, "some rows end before others"
