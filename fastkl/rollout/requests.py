"""What a generator gets and gives: the options that it starts with, requests for one completion each, and completions.

A request carries its place, (prompt index, sample index), and a random seed of its own that derives from (run seed,
step, prompt index, sample index): what it draws depends on no other request, on no global generator, and on no number
of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastkl.distributed.world import ALONE, World
from fastkl.sampling.params import Sampling
from fastkl.types import Completion, Prompt

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True, slots=True)
class Request:
    """One completion that is wanted."""

    prompt: Prompt
    prompt_index: int  # b, of the B prompts of the whole step; those that replace others count on from there
    sample_index: int  # k, of the K samples of the prompt
    seed: int  # 63 bits


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What a generator may need to start."""

    source: str  # folder or hub id of the weights to start from
    policy: nn.Module  # the model that is trained
    tokenizer: Any
    sampling: Sampling
    dtype: torch.dtype  # of the trainer's matrix products: what is sampled from is what is scored
    max_model_len: int  # tokens, of the longest prompt with its completion
    gpu_memory_utilization: float
    log: Path  # where an engine's own messages go
    world: World = ALONE  # the processes of the run
    engine_tp: int = 1  # how many neighbours among them share an engine; 1: each has its own
    whole: Callable[[], AbstractContextManager[None]] = nullcontext  # in it, the policy has all of its weights here
    note: Callable[[str], None] = print  # says what a user should know about the engine
    engines: tuple[str, ...] = ()  # addresses of servers
    engine_weights: str = "auto"  # how the weights reach them: auto, network, folder
    sleep: bool = False  # whether an engine gives its GPU memory to the trainer between sampling and the next sync


def sample_seed(seed: int, step: int, prompt: int, sample: int) -> int:
    """A 63-bit seed for one sample: the same on every machine, unrelated between neighbours."""
    key = b"".join(value.to_bytes(8, "little", signed=True) for value in (seed, step, prompt, sample))
    return int.from_bytes(blake2b(key, digest_size=8).digest(), "little") >> 1


def requests_of(prompts: Sequence[Prompt], num_samples: int, *, seed: int, step: int, first: int = 0) -> list[Request]:
    """The step's B * K requests, the samples of a prompt in a row. first: the index of the first prompt, where the step
    has drawn others before."""
    return [
        Request(prompt, b, k, sample_seed(seed, step, b, k))
        for b, prompt in enumerate(prompts, start=first)
        for k in range(num_samples)
    ]


def grouped(completions: Sequence[Completion], num_samples: int) -> tuple[tuple[Completion, ...], ...]:
    """The completions of `requests_of`, in its order, as [B][K]."""
    return tuple(tuple(completions[i : i + num_samples]) for i in range(0, len(completions), num_samples))


def completion(
    request: Request, token_ids: Sequence[int], logprobs: Sequence[float], sampling: Sampling, tokenizer: Any
) -> Completion:
    """A finished completion, with its text."""
    stopped = bool(token_ids) and token_ids[-1] in sampling.stop_token_ids
    stopped = stopped or completes_stop(request.prompt.token_ids, token_ids, sampling, tokenizer)
    return Completion(
        token_ids=tuple(token_ids),
        logprobs=tuple(logprobs),
        finish_reason="stop" if stopped else "length",
        text=decoded_after(request.prompt.token_ids, token_ids, tokenizer),
    )


def completes_stop(prompt_ids: Sequence[int], token_ids: Sequence[int], sampling: Sampling, tokenizer: Any) -> bool:
    """Whether the last of the completion's tokens completes one of the texts in `sampling.stop`.

    As in vLLM a text counts that ends within what this token adds, and after the first min_tokens tokens. It may begin
    in tokens before, but not in the prompt. Whether a completion ends here depends on its own tokens alone, so the
    distribution of each of them is what it would be without a stop: they are scored as they are.
    """
    if not sampling.stop or len(token_ids) <= sampling.min_tokens:
        return False
    longest = max(len(text.encode()) for text in sampling.stop)  # a token holds a byte at least
    start = max(0, len(token_ids) - 1 - longest)
    context = [*prompt_ids, *token_ids[:start]][-CONTEXT_TOKENS:]
    before = decoded_after(context, token_ids[start:-1], tokenizer).rstrip("\N{REPLACEMENT CHARACTER}")
    after = decoded_after(context, token_ids[start:], tokenizer)
    return any(after.find(text, max(0, len(before) - len(text) + 1)) >= 0 for text in sampling.stop)


CONTEXT_TOKENS = 16
"""Tokens of the prompt that a completion is decoded with: enough for a character in pieces, and for a word's space."""


def decoded_after(prompt_ids: Sequence[int], token_ids: Sequence[int], tokenizer: Any) -> str:
    """The text that the completion adds to its prompt.

    Decoded alone a completion may lose its first space (SentencePiece takes it for the beginning of the text), or the
    second half of a character whose first bytes are the prompt's. So it is what decoding both has more than decoding
    the prompt. Where the two do not begin alike, decoding it alone is the best there is.
    """
    context = list(prompt_ids[-CONTEXT_TOKENS:])
    before = tokenizer.decode(context, skip_special_tokens=True).rstrip("\N{REPLACEMENT CHARACTER}")
    both = tokenizer.decode([*context, *token_ids], skip_special_tokens=True)
    return both[len(before) :] if both.startswith(before) else tokenizer.decode(token_ids, skip_special_tokens=True)
