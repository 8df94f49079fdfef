"""The real generators: the mean of k1 over sampled tokens is the exact KL on the support, by four standard errors."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from fastkl.kernels.operators import linear_token_scores
from toy import STOP, ToyTokenizer, prompt, toy_model

from fastkl import trunk
from fastkl.alarm import mean_and_error
from fastkl.contract import Sampling, support_of
from fastkl.models import head_of
from fastkl.pack import pack
from fastkl.rloo import sequence_sums
from fastkl.rollout_transformers import TransformersGenerator
from fastkl.rollout_vllm import VllmGenerator
from fastkl.sync import push_weights
from fastkl.types import RolloutBatch

PROMPTS = (prompt(1, 2, 3), prompt(4), prompt(5, 6, 7, 8, 9))
NUM_SAMPLES, LENGTH = 512, 12
SETTINGS = [
    {},
    {"top_k": 4},
    {"top_p": 0.7},
    {"min_p": 0.15},
    {"min_tokens": 6},
    {"temperature": 0.7, "top_k": 8, "top_p": 0.9, "min_p": 0.02, "min_tokens": 3},
]


def model(seed: int):
    """Float32, head size 32: large enough for vLLM's CPU kernels; opinionated enough for a KL of several nats."""
    return toy_model(
        seed, torch.float32, hidden_size=64, num_attention_heads=2, num_key_value_heads=2, initializer_range=0.12
    )


def sampling(settings: dict) -> Sampling:
    return Sampling(**({"temperature": 1.0, "max_new_tokens": LENGTH, "stop_token_ids": (STOP,)} | settings))


@torch.no_grad()
def check(completions, policy, reference, s: Sampling, tolerance: float) -> None:
    """Scores the completions as the trainer does, and compares with the engine and with the exact KL."""
    trunk.register_packed_attention()
    rewards = torch.zeros(len(PROMPTS), NUM_SAMPLES)
    batch = RolloutBatch(PROMPTS, completions, rewards, torch.ones_like(rewards, dtype=torch.bool), 0)
    differences, gaps = [], []
    for _, micro in pack(batch, [0, 1, 2], 8192, torch.device("cpu")):
        hidden = []
        for m in (policy, reference):
            with trunk.scoring(m, "packed"):
                hidden.append(trunk.hidden_states(m, micro, "packed"))
        heads = [head_of(m).weight for m in (policy, reference)]
        support = support_of(s, micro.completion_positions, len(heads[0]))
        scores = linear_token_scores(
            hidden[0], heads[0], hidden[1], heads[1], micro.target_ids, temperature=s.temperature, support=support
        )
        logp, ref, kl = scores.policy_logprobs, scores.ref_logprobs, scores.kl
        if support is not None:
            logp, ref, kl = scores.policy_logprobs_support, scores.ref_logprobs_support, scores.kl_support
        gaps.append((logp - micro.engine_logprobs).abs())
        # given the text before it, each token's k1 has the mean KL_t: sums of the differences are a martingale
        differences += sequence_sums((logp - ref - kl).double(), micro.completion_cu_seqlens).tolist()
    mean, error = mean_and_error(differences)
    assert abs(mean) < 4 * error
    gap = torch.cat(gaps)
    assert float(gap.quantile(0.999)) < tolerance  # an id at the very edge of top_p may fall on either side
    assert float(gap.mean()) < tolerance


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_mean_k1_of_the_transformers_generator_is_the_exact_kl_on_the_support(settings):
    policy, reference, s = model(0), model(1), sampling(settings)
    completions = TransformersGenerator(policy, ToyTokenizer(), s).generate(PROMPTS, NUM_SAMPLES, seed=5, step=1)
    check(completions, policy, reference, s, tolerance=1e-4)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    folder = tmp_path_factory.mktemp("engine")
    model(0).save_pretrained(folder)
    generator = VllmGenerator(
        str(folder), ToyTokenizer(), sampling({}), dtype="float32", max_model_len=32, gpu_memory_utilization=0.2,
        log=folder / "engine.log",
    )  # fmt: skip
    push_weights(generator.llm, model(0))
    yield generator
    generator.close()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_mean_k1_of_vllm_is_the_exact_kl_on_the_support_and_its_logprobs_are_the_trainers(engine, settings):
    policy, reference = model(0), model(1)
    engine.sampling = dataclasses.replace(engine.sampling, **vars_of(sampling(settings)))
    completions = engine.generate(PROMPTS, NUM_SAMPLES, seed=5, step=1)
    check(completions, policy, reference, engine.sampling, tolerance=1e-4)


def vars_of(s: Sampling) -> dict:
    return {field.name: getattr(s, field.name) for field in dataclasses.fields(s)}
