"""Stop texts: both generators end a completion with the token that completes one; its tokens are scored as drawn."""

from __future__ import annotations

import pytest
import torch
from toy import STOP, ToyTokenizer, draw, prompt, toy_model

from fastkl.rollout.requests import completes_stop
from fastkl.rollout.transformers import TransformersGenerator
from fastkl.rollout.vllm import VllmGenerator
from fastkl.sampling.params import Sampling
from fastkl.scoring.models import load_model, load_tokenizer
from fastkl.scoring.source import resolve_model
from fastkl.types import Prompt

PROMPTS = (prompt(1, 2, 3), prompt(7), prompt(5, 6, 7, 8, 9))


def first_end(texts_of_prefixes: list[str], stop: tuple[str, ...], min_tokens: int) -> int | None:
    """By the definition: the first n above min_tokens whose text ends a stop text that the text of n - 1 did not."""
    for n in range(min_tokens + 1, len(texts_of_prefixes)):
        before, after = texts_of_prefixes[n - 1], texts_of_prefixes[n]
        for s in stop:
            ends = [i + len(s) for i in range(len(after) - len(s) + 1) if after[i : i + len(s)] == s]
            if any(end > len(before) for end in ends):
                return n
    return None


@pytest.mark.slow
@pytest.mark.parametrize(("stop", "min_tokens"), [(("w7 w",), 0), (("w7 w", "w1"), 3), (("9",), 0), (("none",), 0)])
def test_a_completion_is_the_one_without_a_stop_up_to_the_token_that_completes_it(stop, min_tokens):
    model, tokenizer = toy_model(), ToyTokenizer()

    def drawn(*texts):
        sampling = Sampling(1.0, 12, min_tokens=min_tokens, stop=texts, stop_token_ids=(STOP,))
        return draw(TransformersGenerator(model, tokenizer, sampling, max_rows=9), PROMPTS, 40, seed=3, step=1)

    cut = 0
    for p, stopped, whole in zip(PROMPTS, drawn(*stop), drawn(), strict=True):
        head = tokenizer.decode(p.token_ids)
        for a, b in zip(stopped, whole, strict=True):
            prefixes = [tokenizer.decode(p.token_ids + b.token_ids[:n])[len(head) :] for n in range(13)]
            end = first_end(prefixes[: len(b.token_ids) + 1], stop, min_tokens)
            assert a.token_ids == b.token_ids[:end]
            assert a.logprobs == pytest.approx(b.logprobs[:end])
            assert a.finish_reason == ("stop" if end else b.finish_reason)
            assert a.text == prefixes[end or len(b.token_ids)]
            cut += end is not None
    assert (cut > 20) == (stop != ("none",))


@pytest.mark.slow
def test_stopped_completions_are_a_whole_distribution_so_importance_weights_average_to_one():
    """E over y ~ p of q(y) / p(y) is 1 if every token that was drawn is scored and the end depends on the tokens alone;
    8000 samples, four standard errors."""
    model, other = toy_model(), toy_model()
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * 0.02)
    sampling = Sampling(1.0, 6, stop=("w7 w", "2"), stop_token_ids=(STOP,))
    (group,) = draw(TransformersGenerator(model, ToyTokenizer(), sampling), PROMPTS[:1], 8000, seed=1, step=1)
    assert sum(c.finish_reason == "stop" and c.token_ids[-1] != STOP for c in group) > 2000
    ids = torch.zeros(len(group), 9, dtype=torch.int64)
    for row, c in enumerate(group):
        ids[row, : 3 + len(c.token_ids)] = torch.tensor(PROMPTS[0].token_ids + c.token_ids)
    with torch.no_grad():
        table = other(input_ids=ids, use_cache=False).logits.log_softmax(-1)
    log_q = table[:, 2:-1].gather(2, ids[:, 3:, None])[..., 0]
    mask = torch.arange(6) < torch.tensor([len(c.token_ids) for c in group])[:, None]
    log_p = torch.tensor([sum(c.logprobs) for c in group], dtype=torch.float64)
    weights = (torch.where(mask, log_q, 0.0).sum(1) - log_p).exp()
    assert abs(float(weights.mean()) - 1) < 4 * float(weights.std()) / len(group) ** 0.5
    assert float(weights.std()) > 0.02


def test_a_text_counts_where_it_ends_and_not_where_it_began():
    tokenizer = ToyTokenizer()

    def ends(ids, *stop, min_tokens=0):
        return completes_stop((7,), ids, Sampling(min_tokens=min_tokens, stop=stop), tokenizer)

    assert ends([1, 2], "1 w") and not ends([1], "1 w") and not ends([1, 2, 3], "1 w")
    assert not ends([1], "w7 w1")  # it would begin in the prompt
    assert not ends([1], "w1", min_tokens=1) and ends([1, 1], "w1", min_tokens=1)
    assert not ends([], "w") and not ends([1, 2])


STORY_STOPS = (". ", " and", "day")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["transformers", pytest.param("vllm", marks=[pytest.mark.vllm, pytest.mark.long])])
def test_both_generators_cut_the_stories_at_the_same_token(name, tmp_path):
    source = resolve_model("storyteller")
    model, tokenizer = load_model(source, torch.device("cpu")), load_tokenizer(source)
    text = "Once upon a time"
    story = Prompt(tuple(tokenizer(text)["input_ids"]), text, text, 1)
    sampling = Sampling(1.0, 24, stop=STORY_STOPS, stop_token_ids=(tokenizer.eos_token_id,))
    if name == "vllm":
        generator = VllmGenerator(
            source, tokenizer, sampling, dtype="float32", max_model_len=64, gpu_memory_utilization=0.2,
            log=tmp_path / "engine.log",
        )  # fmt: skip
    else:
        generator = TransformersGenerator(model, tokenizer, sampling)
    (group,) = draw(generator, (story,), 64, seed=0, step=1)
    generator.close()
    cut = 0
    for c in group:
        head = tokenizer.decode(story.token_ids, skip_special_tokens=True)
        prefixes = [
            tokenizer.decode([*story.token_ids, *c.token_ids[:n]], skip_special_tokens=True)[len(head) :]
            for n in range(len(c.token_ids) + 1)
        ]
        end = first_end(prefixes, STORY_STOPS, 0)
        assert end in (None, len(c.token_ids)), (prefixes, end)
        ended = end is not None or c.token_ids[-1] == tokenizer.eos_token_id
        assert c.finish_reason == ("stop" if ended else "length")
        assert ended or len(c.token_ids) == 24
        assert c.text == prefixes[-1]
        ids = torch.tensor([[*story.token_ids, *c.token_ids]])
        with torch.no_grad():
            table = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
        own = table[len(story.token_ids) - 1 : -1].gather(1, torch.tensor(c.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(own, torch.tensor(c.logprobs), rtol=0, atol=1e-3)
        cut += end is not None
    assert cut > 30
