"""The real generators: the mean of k1 over sampled tokens is the exact KL on the support, by four standard errors.

20,000 tokens per setting (FASTKL_MONTE_CARLO_TOKENS sets another number; bench/training/monte_carlo.py draws
100,000).
"""

from __future__ import annotations

import dataclasses
import math
import os

import pytest
import torch
from toy import STOP, ToyTokenizer, draw, prompt, toy_model

from fastkl.audit.alarm import mean_and_error
from fastkl.kernels.operators import TokenScores, linear_token_scores
from fastkl.kernels.support import keep_mask
from fastkl.objective.kl_estimators import sampled_logprobs, sampled_ref_logprobs, support_kl
from fastkl.objective.rloo import sequence_sums
from fastkl.rollout.transformers import TransformersGenerator
from fastkl.rollout.vllm import VllmGenerator
from fastkl.sampling.params import Sampling
from fastkl.sampling.replay import support_of
from fastkl.scoring import backbone
from fastkl.scoring.head import head_of
from fastkl.scoring.pack import pack
from fastkl.types import PackedBatch, RolloutBatch

TOKENS = int(os.environ.get("FASTKL_MONTE_CARLO_TOKENS", 20_000))
PROMPTS = (prompt(1, 2, 3), prompt(4), prompt(*range(1, 21), *range(1, 21)))  # the last: more than a batch of vLLM's
NUM_SAMPLES, LENGTH = 128, 48
SETTINGS = [
    {},
    {"top_k": 4},
    {"top_p": 0.7},
    {"min_p": 0.15},
    {"min_tokens": 6},
    {"temperature": 0.7, "top_k": 8, "top_p": 0.9, "min_p": 0.02, "min_tokens": 3},
]
EDGE = 1e-5
"""Relative distance of an id's probability (or of the sum before it) to a threshold at which float32 may decide either
way."""


def model(seed: int):
    """Float32, one layer, head size 32 (vLLM's CPU kernels need that), opinionated enough for a KL of several nats."""
    return toy_model(
        seed, torch.float32, hidden_size=32, num_attention_heads=1, num_key_value_heads=1, num_hidden_layers=1,
        max_position_embeddings=128,
    )  # fmt: skip


def sampling(settings: dict) -> Sampling:
    return Sampling(**({"temperature": 1.0, "max_new_tokens": LENGTH, "stop_token_ids": (STOP,)} | settings))


@dataclasses.dataclass
class Measured:
    """What the samples of one setting came to. Sums are over a completion's tokens, errors over completions."""

    tokens: int = 0
    completions: int = 0
    exact_kl: float = 0.0  # mean over completions of the exact KL on the support, nats
    difference: float = 0.0  # mean of (k1 - exact KL), nats
    error: float = 0.0  # its standard error
    naive_bias: float = 0.0  # mean of (k1 over the whole vocabulary - k1), nats: what naive scoring adds
    naive_error: float = 0.0
    max_gap: float = 0.0  # |trainer's log-prob - generator's|, edge tokens left out
    mean_gap: float = 0.0
    edge_tokens: int = 0  # tokens with an id so near a threshold that float32 may decide either way


@torch.no_grad()
def scored(micro: PackedBatch, policy, reference, s: Sampling) -> tuple[TokenScores, torch.Tensor]:
    """The scores as the trainer computes them, and the policy's logits after temperature [N, V]."""
    backbone.register_packed_attention()
    hidden = []
    for m in (policy, reference):
        with backbone.scoring(m, "packed"):
            hidden.append(backbone.hidden_states(m, micro, "packed"))
    heads = [head_of(m).weight for m in (policy, reference)]
    support = support_of(s, micro.completion_positions, len(heads[0]))
    scores = linear_token_scores(
        hidden[0], heads[0], hidden[1], heads[1], micro.target_ids, temperature=s.temperature, support=support
    )
    return scores, hidden[0] @ heads[0].T / s.temperature


def at_the_edge(logits: torch.Tensor, positions: torch.Tensor, s: Sampling) -> torch.Tensor:
    """Tokens whose support depends on the last digits of float32: bool [N]. It is taken a little wider and narrower."""
    near = torch.zeros(len(logits), dtype=torch.bool)
    for name in ("top_p", "min_p"):
        if getattr(s, name) in (0.0, 1.0):
            continue
        masks = []
        for factor in (1 - EDGE, 1 + EDGE):
            shifted = dataclasses.replace(s, **{name: getattr(s, name) * factor})
            masks.append(keep_mask(support_of(shifted, positions, logits.shape[1]), logits.clone()))
        near |= (masks[0] != masks[1]).any(1)
    if s.top_k:
        best = logits.topk(s.top_k + 1, dim=1).values
        near |= best[:, -2] - best[:, -1] < EDGE
    return near


def measure(generator, policy, reference, s: Sampling, tokens: int) -> Measured:
    """Draws at least `tokens` tokens, scores them as the trainer does, and compares with generator and closed form."""
    differences, naive, exact, gaps = [], [], [], []
    found, step = Measured(), 0
    while found.tokens < tokens:
        step += 1
        completions = draw(generator, PROMPTS, NUM_SAMPLES, seed=5, step=step)
        rewards = torch.zeros(len(PROMPTS), NUM_SAMPLES)
        batch = RolloutBatch(PROMPTS, completions, rewards, torch.ones_like(rewards, dtype=torch.bool), 0)
        for _, packed in pack(batch, [0, 1, 2], 1 << 30, torch.device("cpu")):
            micro = dataclasses.replace(packed, distinct=None)  # a row for each token
            scores, logits = scored(micro, policy, reference, s)
            logp, ref, kl = sampled_logprobs(scores), sampled_ref_logprobs(scores), support_kl(scores)
            cu = micro.completion_cu_seqlens
            # given the text before it, each token's k1 has the mean KL_t: sums of the differences are a martingale
            differences += sequence_sums((logp - ref - kl).double(), cu).tolist()
            naive_k1 = scores.policy_logprobs - scores.ref_logprobs
            naive += sequence_sums((naive_k1 - (logp - ref)).double(), cu).tolist()
            exact += sequence_sums(kl.double(), cu).tolist()
            edge = at_the_edge(logits, micro.completion_positions, s)
            gaps.append((logp - micro.engine_logprobs).abs()[~edge])
            found.edge_tokens += int(edge.sum())
            found.tokens += len(edge)
    gap = torch.cat(gaps)
    found.completions, found.exact_kl = len(exact), math.fsum(exact) / len(exact)
    found.difference, found.error = mean_and_error(differences)
    found.naive_bias, found.naive_error = mean_and_error(naive)
    found.max_gap, found.mean_gap = float(gap.max()), float(gap.mean())
    return found


def check(found: Measured, s: Sampling) -> None:
    """The claims; and the naive scorer, on the same tokens, does not pass."""
    assert found.exact_kl > 40 * found.error, "a KL that is there to be seen: by 10 % at four standard errors"
    assert abs(found.difference) < 4 * found.error
    assert found.max_gap < 1e-4
    assert found.edge_tokens < 0.01 * found.tokens, "the line above is about nearly all tokens"
    if s.truncates:
        assert abs(found.naive_bias) > 4 * found.naive_error, "the control: k1 over the whole vocabulary"


def transformers_generator(policy, s: Sampling) -> TransformersGenerator:
    return TransformersGenerator(policy, ToyTokenizer(), s)


def vllm_generator(policy, folder) -> VllmGenerator:
    """An engine for all settings: they travel with the requests."""
    policy.save_pretrained(folder)
    generator = VllmGenerator(
        str(folder), ToyTokenizer(), sampling({}), dtype="float32", max_model_len=96, gpu_memory_utilization=0.2,
        log=folder / "engine.log",
    )  # fmt: skip
    generator.sync(policy)
    return generator


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.slow
def test_mean_k1_of_the_transformers_generator_is_the_exact_kl_on_the_support(settings):
    policy, reference, s = model(0), model(1), sampling(settings)
    check(measure(transformers_generator(policy, s), policy, reference, s, TOKENS), s)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    generator = vllm_generator(model(0), tmp_path_factory.mktemp("engine"))
    yield generator
    generator.close()


@pytest.mark.vllm
@pytest.mark.parametrize(
    "settings", [pytest.param(s, marks=[] if s is SETTINGS[-1] else pytest.mark.long) for s in SETTINGS], ids=str
)
@pytest.mark.slow
def test_mean_k1_of_vllm_is_the_exact_kl_on_the_support_and_its_logprobs_are_the_trainers(engine, settings):
    policy, reference, s = model(0), model(1), sampling(settings)
    engine.sampling = s
    check(measure(engine, policy, reference, s, TOKENS), s)
