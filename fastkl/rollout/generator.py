"""Rollout: requests in, completions out, with the log-probs of the very distribution that was sampled from.

One protocol, three generators behind it: vllm.py runs vLLM in this process, on a GPU or a CPU, with its own copy of the
weights, which weight_sync.py brings up to date; transformers.py decodes with the policy itself and a key-value cache,
for models that vLLM cannot run; server.py asks vLLM's servers, which serve.py starts. Another one is a file with two
functions, `obstacle` and `start`, and a line in GENERATORS.

A step's completions may be drawn while the step before it trains (ahead.py). Left out: continuous batching across
steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from fastkl.errors import UserError
from fastkl.rollout.requests import EngineOptions, Request
from fastkl.sampling.params import Sampling
from fastkl.types import Completion

if TYPE_CHECKING:
    import torch
    from torch import nn


class Generator(Protocol):
    """What the loop asks of a generator.

    One whose engine several neighbouring processes share has an attribute `shared_by`, their number: they get the same
    requests then, and each returns all completions (dealt.py). One by which the first process draws for all of them has
    `serves_all`: the others' get no requests, and `sync` is called in all processes.
    """

    sampling: Sampling

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion for each request, in order."""
        ...

    def sync(self, policy: nn.Module, step: int = 0) -> None:
        """Brings the generator up to the policy's weights after this step (0: before the first); later completions are
        drawn with them. One that holds a copy proves that it is equal, or raises StaleEngineError."""
        ...

    def rest(self) -> None:
        """No completion is wanted until the next sync: memory may be given to the trainer until then."""
        ...

    def close(self) -> None:
        """Gives memory back; the generator is not used any more. May be called twice."""
        ...


class Backend(NamedTuple):
    """One kind of generator: a module with two functions.

    obstacle(model config, device) says why it cannot run the model here, or None if it can, and starts nothing;
    start(EngineOptions) gives the generator, running with the policy's weights. The module is imported when it is
    asked: settings are checked against the names in GENERATORS before torch is loaded. has_weights: whether it draws
    with weights of its own, and may do so in a thread while those of the policy change.
    """

    module: str
    has_weights: bool = False

    def obstacle(self, model_config: Any, device: torch.device) -> str | None:
        """Why it cannot run this model here; None: it can."""
        return import_module(self.module).obstacle(model_config, device)

    def start(self, options: EngineOptions) -> Generator:
        """A running generator. UserError, naming the cause, where it does not start."""
        return import_module(self.module).start(options)


GENERATORS: dict[str, Backend] = {
    "vllm": Backend("fastkl.rollout.vllm", has_weights=True),
    "transformers": Backend("fastkl.rollout.transformers"),
    "server": Backend("fastkl.rollout.server", has_weights=True),
}
"""In the order in which "auto" tries them; the last one is chosen where there are --engines."""


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
