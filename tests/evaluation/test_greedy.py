"""Temperature 0 takes the likeliest token, from the ids that may be drawn."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from toy import STOP, ToyTokenizer, draw, prompt, toy_model

from fastkl.evaluation.evaluate import sampling_as
from fastkl.rollout.transformers import TransformersGenerator
from fastkl.sampling.params import Sampling


@pytest.mark.parametrize("num_banned", [0, 6])
def test_greedy_completions_are_those_of_the_likeliest_tokens(num_banned):
    model = toy_model(3, dtype=torch.float32)
    with torch.no_grad():  # those that it would take first
        banned = tuple(model(torch.tensor([[1, 2, 3]])).logits[0, -1].topk(num_banned).indices.tolist())
    sampling = Sampling(max_new_tokens=8, stop_token_ids=(STOP,), banned_token_ids=banned)
    generator = TransformersGenerator(model, ToyTokenizer(), sampling)
    prompts = (prompt(1, 2, 3), prompt(4), prompt(5, 6, 7, 8))
    with sampling_as(generator, replace(sampling, temperature=0.0)):
        found = draw(generator, prompts, 2, seed=1, step=1)
    assert generator.sampling is sampling
    for asked, group in zip(prompts, found, strict=True):
        ids = list(asked.token_ids)
        for _ in range(8):
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, -1]
            logits[list(banned)] = -torch.inf
            ids.append(int(logits.argmax()))
            if ids[-1] == STOP:
                break
        assert [completion.token_ids for completion in group] == [tuple(ids[len(asked.token_ids) :])] * 2
