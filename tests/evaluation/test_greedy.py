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


@pytest.mark.slow
@pytest.mark.vllm
def test_vllm_takes_the_likeliest_tokens_too(tmp_path):
    from fastkl.rollout.vllm import VllmGenerator
    from fastkl.scoring import models
    from fastkl.storyteller import model_path
    from fastkl.types import Prompt

    source = str(model_path())
    tokenizer, policy = models.load_tokenizer(source), models.load_model(source, torch.device("cpu"))
    sampling = Sampling(max_new_tokens=12)
    options = {"dtype": "float32", "max_model_len": 64, "gpu_memory_utilization": 0.3}
    vllm = VllmGenerator(source, tokenizer, sampling, **options, log=tmp_path / "log")
    ours = TransformersGenerator(policy, tokenizer, sampling)
    texts = ("Once upon a time", "The king")
    prompts = [Prompt(tuple(tokenizer(text)["input_ids"]), text, text, 0) for text in texts]
    found = []
    for generator in (vllm, ours):
        with sampling_as(generator, replace(sampling, temperature=0.0)):
            found.append([[c.token_ids for c in group] for group in draw(generator, prompts, 2, seed=1, step=1)])
    vllm.close()
    assert found[0] == found[1]
