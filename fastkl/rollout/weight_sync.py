"""Weight sync: the policy's weights into the running vLLM engine, and the proof that they arrived.

vLLM reloads weights in place (after the first push they are copied to where its loader has put them, and plain matrices
packed, if that is all it does), but three things can go wrong without a word: a packed, tied output head on CPUs keeps
the old weights; packed experts on CPUs get plain ones; a prefix cache survives with the old keys and values. All three
are cured here, and push_check.py compares what the engine holds in the end, tensor by tensor.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import nn

from fastkl.distributed.world import ALONE, World
from fastkl.kernels.compose import is_sharded
from fastkl.rollout.agreement import StaleEngineError
from fastkl.rollout.push_check import PushCheck, Weights
from fastkl.scoring.adapters import is_adapter, merged


class WeightSync:
    """Brings one running engine up to the policy's weights, which are cast to the engine's dtype.

    Where processes share an engine, each gets all weights, and the engine's loader keeps this process's part of them.
    """

    def __init__(self, llm: Any, dtype: torch.dtype, world: World = ALONE, shared_by: int = 1) -> None:
        self.llm = llm
        self.check = PushCheck(dtype, world, shared_by)

    def push(self, policy: nn.Module, step: int) -> None:
        """Copies the weights after `step` (0: before the first) into the engine.

        Raises StaleEngineError, naming tensors, where the engine does not hold them then.
        """
        self.load(lambda: checkpoint_weights(policy), step, tied=getattr(policy.config, "tie_word_embeddings", False))

    def load(self, weights: Callable[[], Weights], step: int, *, tied: bool) -> None:
        """The same of weights under the names of checkpoints, which can be gone through several times. tied: whether
        the output head is the embedding."""
        (model,) = self.llm.apply_model(_itself)
        if self.check.knows_all(model):
            push = self.check.place_all(model, weights())
        else:
            with self.check.watching(model) as push, packing(model, push.pack):
                passing = push.through(weights())
                self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": passing})
            if tied:
                _repack_tied_head(model)
        empty_cache(self.llm)
        self.check.verify(model, weights, push, step)


def empty_cache(llm: Any) -> None:
    """Forgets the keys and values of earlier prompts, which neither new weights nor new requests may meet."""
    if not llm.reset_prefix_cache():
        raise StaleEngineError(
            "the engine could not empty its prefix cache, since requests are still running in it; no completion was "
            "drawn, and --generator transformers has no such cache."
        )


def by_first(policy: nn.Module, world: World, push: Callable[[Weights], None]) -> None:
    """Lets the first process alone push the policy's weights somewhere. Every process must come here: those whose
    weights lie in pieces gather them together, and what fails in the first one is raised in all."""
    weights = checkpoint_weights(policy)

    def pushed() -> None:
        try:
            push(weights)
        finally:
            deque(weights, maxlen=0)  # the others gather with this process, whatever has failed here

    if not world.is_first and any(map(is_sharded, policy.parameters())):
        deque(weights, maxlen=0)
    world.once(pushed)


def checkpoint_weights(policy: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The policy's parameters, adapters merged, under the names and in the shapes that its saved folder has: those that
    engines load.

    In memory transformers may hold them otherwise: all experts of a layer as one tensor, for example. Taking them apart
    copies them, as merging and gathering do, so it is done layer by layer where there is a need.
    """
    from transformers.core_model_loading import revert_weight_conversion

    copies = any(
        parameter.ndim > 2 or is_adapter(name) or is_sharded(parameter) for name, parameter in policy.named_parameters()
    )
    for _, members in groupby(merged(policy), key=lambda pair: _layer_of(pair[0]) if copies else ""):
        yield from revert_weight_conversion(policy, dict(members)).items()


def _layer_of(name: str) -> str:
    """The part of a parameter's name that ends in its layer's number; the name where it is in no layer."""
    parts = name.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else name


@contextmanager
def packing(model: nn.Module, pack: Callable[[str, nn.Module, Callable[[], None]], None]) -> Iterator[None]:
    """While the engine loads, every layer that it has loaded goes through pack(path, layer, function that packs it)."""
    paths = {layer: path for path, layer in model.named_modules()}

    def instead(original: Callable[[nn.Module], None], layer: nn.Module) -> None:
        pack(paths.get(layer, ""), layer, partial(_pack, original, layer))

    methods = {id(m): m for layer in paths if (m := getattr(layer, "quant_method", None)) is not None}
    for method in methods.values():
        method.process_weights_after_loading = partial(instead, method.process_weights_after_loading)
    try:
        yield
    finally:
        for method in methods.values():
            del method.process_weights_after_loading


def _pack(original: Callable[[nn.Module], None], layer: nn.Module) -> None:
    """The engine's own packing. On CPUs it packs experts the first time only: then it is let forget that time."""
    method: Any = layer.quant_method
    weight = getattr(layer, "w13_weight", None)
    if weight is not None and weight.device.type == "cpu" and hasattr(method, "moe_kernel"):
        method.moe_kernel = None
    original(layer)


def _repack_tied_head(model: nn.Module) -> None:
    """On CPUs vLLM multiplies by a packed copy of the output head; a reload of tied embeddings does not renew it."""
    head = getattr(model, "lm_head", None)
    if head is None or head.weight.device.type != "cpu":
        return
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    dispatch_cpu_unquantized_gemm(head, remove_weight=False)


def _itself(model: nn.Module) -> nn.Module:
    return model
