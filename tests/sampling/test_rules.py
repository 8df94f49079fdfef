"""The sampling contract: every parameter of the engine is classified, and what is replayed is what was drawn."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cases import slow_where
from toy import STOP, VOCAB, ToyTokenizer, draw, prompt, toy_model

from fastkl.errors import UserError
from fastkl.rollout.transformers import TransformersGenerator, sample
from fastkl.sampling.params import NEUTRAL, REJECTED, SUPPORT, TRANSFORM, Sampling, truncating
from fastkl.sampling.replay import support_of
from fastkl.sampling.rules import TRANSFORMERS, VLLM, check_parameters, vllm_parameters

PROMPTS = (prompt(1, 2, 3), prompt(4), prompt(5, 6, 7, 8, 9))
SETTINGS = [
    {"top_k": 3},
    {"top_p": 0.7},
    {"min_p": 0.2},
    {"min_tokens": 4},
    {"banned_token_ids": (3, 5)},
    {"allowed_token_ids": (1, 2, 4, 8, STOP)},
    {"temperature": 0.7, "top_k": 6, "top_p": 0.9, "min_p": 0.02, "min_tokens": 2, "banned_token_ids": (0,)},
]


def sampling(**settings) -> Sampling:
    return Sampling(**({"temperature": 1.0, "max_new_tokens": 6, "stop_token_ids": (STOP,)} | settings))


@pytest.mark.vllm
def test_every_field_of_vllms_sampling_parameters_is_classified():
    """A new engine with a new field fails here: look at what the field does to the distribution, then add it."""
    from vllm import SamplingParams

    assert set(SamplingParams.__struct_fields__) - set(VLLM) == set(), "fields of vLLM that nobody has looked at"
    assert {rule.kind for rule in VLLM.values()} == {NEUTRAL, TRANSFORM, SUPPORT, REJECTED}
    check_parameters(vllm_parameters(SamplingParams()), VLLM)


def test_every_field_of_our_own_sampling_is_classified():
    assert {field.name for field in dataclasses.fields(Sampling)} | {"seed"} == set(TRANSFORMERS)


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"repetition_penalty": 1.1}, "text already holds"),
        ({"presence_penalty": 0.5}, "text already holds"),
        ({"frequency_penalty": 0.5}, "text already holds"),
        ({"logit_bias": {3: 2.0}}, "not the reference"),
        ({"structured_outputs": object()}, "grammar"),
        ({"bad_words": ["two words"]}, "banned_token_ids"),
        ({"ignore_eos": True}, "nothing to score"),
        ({"dry_multiplier": 0.8}, "nobody has looked"),
    ],
)
def test_what_cannot_be_replayed_is_rejected_with_its_reason_and_unknown_parameters_too(parameters, words):
    with pytest.raises(UserError, match=f"^{next(iter(parameters))}: .*{words}.*; use "):
        check_parameters(parameters, VLLM)
    check_parameters({name: VLLM[name].off[0] for name in parameters if name in VLLM}, VLLM)


def test_settings_that_truncate_at_every_token_are_told_from_those_that_are_off():
    off = {"top_k": -1, "top_p": 1, "min_p": 0.0, "banned_token_ids": [], "temperature": 0.5, "min_tokens": 3}
    assert truncating(off) == truncating({}) == []
    assert truncating(off | {"top_p": 0.9, "banned_token_ids": [3], "seed": 1}) == ["top_p", "banned_token_ids"]


def test_no_support_where_nothing_is_truncated():
    """So that the plain job pays nothing."""
    assert support_of(sampling(temperature=0.3), torch.arange(5), VOCAB) is None


def test_min_tokens_bans_every_stop_id_in_the_first_tokens_and_only_there():
    support = support_of(
        dataclasses.replace(sampling(min_tokens=2), stop_token_ids=(7, STOP)), torch.tensor([0, 1, 2, 1]), VOCAB
    )
    assert support.banned_ids.tolist() == [7, STOP]
    assert support.banned_rows.tolist() == [True, True, False, True]


def by_hand(row: torch.Tensor, position: int, s: Sampling) -> torch.Tensor:
    """log pi_S, f64 [V], one row at a time in words."""
    alive = {v: float(x) / s.temperature for v, x in enumerate(row)}
    alive = {v: x for v, x in alive.items() if v not in s.banned_token_ids}
    alive = {v: x for v, x in alive.items() if not s.allowed_token_ids or v in s.allowed_token_ids}
    alive = {v: x for v, x in alive.items() if v not in s.stop_token_ids or position >= s.min_tokens}
    best = max(alive.values())
    alive = {v: x for v, x in alive.items() if torch.tensor(x - best).exp() >= s.min_p}
    order = sorted(alive, key=alive.get, reverse=True)[: s.top_k or VOCAB]
    probs = torch.tensor([alive[v] for v in order], dtype=torch.float64).softmax(0)
    kept = [
        v
        for v, before in zip(order, (probs.cumsum(0) - probs).tolist(), strict=True)
        if s.top_p >= 1 or before < s.top_p
    ]
    out = torch.full((len(row),), -torch.inf, dtype=torch.float64)
    out[kept] = torch.tensor([alive[v] for v in kept], dtype=torch.float64).log_softmax(0)
    return out


@pytest.mark.parametrize("settings", slow_where(lambda s: s not in (SETTINGS[0], SETTINGS[-1]), SETTINGS), ids=str)
def test_the_transformers_generator_records_the_logprobs_of_what_it_drew_from(settings):
    model, s = toy_model(), sampling(**settings)
    groups = draw(TransformersGenerator(model, ToyTokenizer(), s), PROMPTS, 8, seed=3, step=1)
    for p, group in zip(PROMPTS, groups, strict=True):
        for c in group:
            logits = model(input_ids=torch.tensor([p.token_ids + c.token_ids]), use_cache=False).logits[0].detach()
            for t, (y, recorded) in enumerate(zip(c.token_ids, c.logprobs, strict=True)):
                expected = by_hand(logits[len(p.token_ids) - 1 + t], t, s)[y]
                assert float(expected) == pytest.approx(recorded, abs=1e-5)
    lengths = [len(c.token_ids) for group in groups for c in group]
    assert min(lengths) >= min(s.min_tokens + 1, 6)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_draws_follow_the_truncated_distribution(settings):
    """Chi-square over 20,000 draws at position 1; the 1e-4 quantile of 22 degrees of freedom is 55."""
    s = sampling(**settings)
    row = 1.5 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(2))
    num = 20_000
    uniforms = torch.rand(num, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    support = support_of(s, torch.ones(num, dtype=torch.int64), VOCAB)
    tokens, _ = sample(row.expand(num, -1), s.temperature, uniforms, support)
    expected = num * by_hand(row, 1, s).exp()
    counts = torch.bincount(tokens, minlength=VOCAB).double()
    assert float(counts[expected == 0].sum()) == 0
    likely = expected > 0
    assert float(((counts - expected)[likely] ** 2 / expected[likely]).sum()) < 55
