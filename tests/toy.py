"""Small real models and batches for the tests, made in milliseconds."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from fastkl.config.settings import TrainConfig
from fastkl.rollout.generator import Generator
from fastkl.rollout.requests import grouped, requests_of
from fastkl.rollout.transformers import TransformersGenerator
from fastkl.sampling.params import Sampling
from fastkl.scoring.models import without_dropout
from fastkl.storyteller import model_path
from fastkl.types import Completion, Prompt, RolloutBatch

VOCAB = 23
STOP = 22


class ToyTokenizer:
    """Ids in, words out; enough for generators and metrics."""

    def decode(self, token_ids, skip_special_tokens: bool = True) -> str:
        return " ".join(f"w{i}" for i in token_ids if i != STOP)


def toy_model(seed: int = 0, dtype: torch.dtype = torch.float64, **options) -> nn.Module:
    """A Llama of a few thousand parameters with untied or tied head, weights large enough to be opinionated."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "eos_token_id": STOP,
        "initializer_range": 0.3,
    }
    model = LlamaForCausalLM(LlamaConfig(**(settings | options)))
    return without_dropout(norms_in_float64(model.double()) if dtype == torch.float64 else model.to(dtype))


def norms_in_float64(model: nn.Module) -> nn.Module:
    """A Llama in float64 whose norms round neither states nor gradients to float32, as they do in their own forward:
    sums of gradients would then depend on what is summed before it is rounded."""
    for module in model.modules():
        if isinstance(module, LlamaRMSNorm):
            module.forward = partial(_norm, module)
    return model


def _norm(norm: LlamaRMSNorm, states: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.rms_norm(states, norm.weight.shape, norm.weight, norm.variance_epsilon)


def half_storyteller(folder: Path, **options) -> None:
    """Saves a storyteller of half the width, with random weights, and its tokenizer; options: of its configuration."""
    config = AutoConfig.from_pretrained(model_path())
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
        setattr(config, name, getattr(config, name) // 2)
    for name, value in options.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_path()).save_pretrained(folder)


def prompt(*token_ids: int, text: str = "p") -> Prompt:
    return Prompt(token_ids=token_ids, text=text, raw=text, row=0)


def draw(
    generator: Generator, prompts: Sequence[Prompt], num_samples: int, *, seed: int, step: int
) -> tuple[tuple[Completion, ...], ...]:
    """K completions for each of the B prompts: [B][K]."""
    return grouped(generator.generate(requests_of(prompts, num_samples, seed=seed, step=step)), num_samples)


def toy_rollouts(
    model: nn.Module, prompts: tuple[Prompt, ...], num_samples: int, *, max_new_tokens: int = 6, step: int = 1
) -> tuple[tuple[Completion, ...], ...]:
    sampling = Sampling(temperature=1.0, max_new_tokens=max_new_tokens, stop_token_ids=(STOP,))
    return draw(TransformersGenerator(model, ToyTokenizer(), sampling), prompts, num_samples, seed=7, step=step)


def toy_batch(model: nn.Module, num_samples: int = 4, max_new_tokens: int = 6) -> RolloutBatch:
    """Three prompts of different lengths, their samples, and random rewards; one sample has left its group."""
    prompts = (prompt(1, 2, 3), prompt(4), prompt(5, 6, 7, 8, 9))
    completions = toy_rollouts(model, prompts, num_samples, max_new_tokens=max_new_tokens)
    rewards = torch.randn(3, num_samples, generator=torch.Generator().manual_seed(1))
    valid = torch.ones(3, num_samples, dtype=torch.bool)
    valid[1, 2] = False
    return RolloutBatch(prompts, completions, rewards.masked_fill(~valid, 0.0), valid, policy_version=0)


def toy_config(**options) -> TrainConfig:
    return TrainConfig(**({"prompts_per_step": 3, "num_samples": 4, "max_grad_norm": 0.0, "kl_coef": 0.3} | options))
