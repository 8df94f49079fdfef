"""Rollout: prompts in, K completions each out, with the log-probs of the very distribution that was sampled from.

One interface, two generators behind it: rollout_vllm.py runs vLLM in this process, on a GPU or a CPU, with its own copy
of the weights, which sync.py brings up to date; rollout_transformers.py decodes with the policy itself and a key-value
cache, for models that vLLM cannot run. Every sample has its own random seed, derived from (run seed, step, prompt,
sample): what it draws depends on no other sample, on no global generator and on no number of processes.

Left out: continuous batching across steps, engines in other processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any, Protocol

from fastkl.sampling.params import Sampling
from fastkl.types import Completion, Prompt


class Generator(Protocol):
    """What train.py asks of a generator."""

    name: str

    def generate(
        self, prompts: Sequence[Prompt], num_samples: int, *, seed: int, step: int
    ) -> tuple[tuple[Completion, ...], ...]:
        """K completions for each of the B prompts: [B][K]."""
        ...


def sample_seed(seed: int, step: int, prompt: int, sample: int) -> int:
    """A 63-bit seed for one sample: the same on every machine, unrelated between neighbours."""
    key = b"".join(value.to_bytes(8, "little", signed=True) for value in (seed, step, prompt, sample))
    return int.from_bytes(blake2b(key, digest_size=8).digest(), "little") >> 1


def completion(token_ids: Sequence[int], logprobs: Sequence[float], sampling: Sampling, tokenizer: Any) -> Completion:
    stopped = bool(token_ids) and token_ids[-1] in sampling.stop_token_ids
    return Completion(
        token_ids=tuple(token_ids),
        logprobs=tuple(logprobs),
        finish_reason="stop" if stopped else "length",
        text=tokenizer.decode(token_ids, skip_special_tokens=True),
    )
