"""Rollout: requests in, completions out, with the log-probs of the very distribution that was sampled from.

One protocol, two generators behind it: vllm.py runs vLLM in this process, on a GPU or a CPU, with its own copy of the
weights, which weight_sync.py brings up to date; transformers.py decodes with the policy itself and a key-value cache,
for models that vLLM cannot run. Another one is a file with two functions, `obstacle` and `start`, and a line in
GENERATORS.

Left out: continuous batching across steps, engines in other processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from fastkl.errors import UserError
from fastkl.rollout import transformers, vllm
from fastkl.rollout.requests import EngineOptions, Request
from fastkl.sampling.params import Sampling
from fastkl.types import Completion


class Generator(Protocol):
    """What the loop asks of a generator."""

    sampling: Sampling

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion for each request, in order."""
        ...

    def sync(self, policy: nn.Module) -> None:
        """Brings the generator up to the policy's weights; later completions are drawn with them."""
        ...

    def close(self) -> None:
        """Gives memory back; the generator is not used any more. May be called twice."""
        ...


@dataclass(frozen=True, slots=True)
class Backend:
    """One kind of generator: why it cannot run a model here (None: it can), and how it starts."""

    obstacle: Callable[[Any, torch.device], str | None]  # the model's config, the trainer's device; starts nothing
    start: Callable[[EngineOptions], Generator]


GENERATORS: dict[str, Backend] = {
    "vllm": Backend(vllm.obstacle, vllm.start),
    "transformers": Backend(transformers.obstacle, transformers.start),
}
"""In the order in which "auto" tries them."""


def choose_generator(wanted: str, model_config: Any, device: torch.device) -> tuple[str, str]:
    """(a name of GENERATORS, why). wanted: such a name, or "auto".

    Raises UserError when the one that is asked for cannot run the model.
    """
    reasons: list[str] = []
    for name, backend in GENERATORS.items():
        if wanted not in ("auto", name):
            continue
        obstacle = backend.obstacle(model_config, device)
        if obstacle is None:
            return name, "asked for" if wanted == name else "; ".join(reasons) or f"{name} can run this model"
        reasons.append(obstacle)
    raise UserError(f"generator: {wanted} was asked for, but {'; '.join(reasons)}. Use --generator transformers.")
