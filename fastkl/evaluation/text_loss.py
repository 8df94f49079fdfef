"""The loss on a text, in nats per token: does the model still write as it did?

The text is tokenised once and cut into windows. Within a window every token is predicted from those before it, at
temperature 1 over the whole vocabulary; a window begins with the tokenizer's beginning of text, or, where it has none,
with a token that is not predicted.

    loss = -(1 / N) sum_t log pi(y_t | the window before t)

It is a number of the text and of its tokenizer: models with different tokenizers cannot be compared by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastkl.distributed.world import ALONE, World
from fastkl.errors import UserError
from fastkl.sampling.params import Sampling
from fastkl.scoring.pack import pack
from fastkl.scoring.scored_model import ScoredModel
from fastkl.types import Completion, Prompt, RolloutBatch

WINDOW_TOKENS = 512
"""Tokens of a window; fewer where the model's context is shorter."""

MAX_TOKENS = 1 << 15
"""Tokens of a text that are read; enough for the third digit of a loss."""


def read_text(setting: str, path: str) -> str:
    """The text in the file. UserError, beginning with `setting`, where it is not there or no text."""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except OSError as failure:
        raise UserError(f"{setting}: {path!r} cannot be read ({failure.strerror}); name a text file.") from failure
    except ValueError as failure:
        raise UserError(f"{setting}: {path!r} is not UTF-8 text; name a text file.") from failure
    if not text.strip():
        raise UserError(f"{setting}: {path!r} is empty; name a text file.")
    return text


def windows_of(setting: str, path: str, tokenizer: Any, context: int | None) -> tuple[tuple[int, ...], ...]:
    """The file's first MAX_TOKENS tokens as windows of token ids, the first of each not to be predicted."""
    ids = tokenizer(read_text(setting, path), add_special_tokens=False)["input_ids"][:MAX_TOKENS]
    length = min(WINDOW_TOKENS, context or WINDOW_TOKENS)
    begin = getattr(tokenizer, "bos_token_id", None)
    if begin is None:
        windows = [ids[i : i + length] for i in range(0, len(ids), length)]
    else:
        windows = [[begin, *ids[i : i + length - 1]] for i in range(0, len(ids), length - 1)]
    windows = [window for window in windows if len(window) > 1]
    if not windows:
        raise UserError(f"{setting}: {path!r} has {len(ids)} tokens, none to be predicted; name a longer text.")
    return tuple(map(tuple, windows))


def text_loss(
    model: ScoredModel, windows: Sequence[Sequence[int]], micro_batch_tokens: int, world: World = ALONE
) -> float:
    """Nats per token of the windows."""
    plain = Sampling(temperature=1.0)
    rollouts, nats, tokens = _as_rollouts(windows), 0.0, 0
    with model.scoring(), torch.no_grad():
        for _, micro in pack(
            rollouts, range(len(windows)), micro_batch_tokens, model.device, world=world, equally=model.is_sharded
        ):
            logprobs = model(micro, sampling=plain).scores.policy_logprobs
            nats -= float(logprobs.double().sum())
            tokens += len(logprobs)
    parts = world.everybodys((nats, tokens))
    return sum(nats for nats, _ in parts) / sum(tokens for _, tokens in parts)


def _as_rollouts(windows: Sequence[Sequence[int]]) -> RolloutBatch:
    """Each window as a prompt of one token and what follows it, for pack.py."""
    prompts = tuple(Prompt(tuple(window[:1]), "", "", row) for row, window in enumerate(windows))
    texts = tuple((Completion(tuple(window[1:]), (0.0,) * (len(window) - 1), "length", ""),) for window in windows)
    shape = len(windows), 1
    return RolloutBatch(prompts, texts, torch.zeros(shape), torch.ones(shape, dtype=torch.bool), policy_version=0)
