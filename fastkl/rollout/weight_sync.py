"""Weight sync: the policy's weights into the running vLLM engine.

vLLM reloads weights in place, but three things can go wrong without a word: a packed, tied output head on CPUs keeps
the old weights; a prefix cache survives with the old keys and values; a reload may stop half-way. The first two are
cured here, and all three are caught by agreement.py.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from fastkl.scoring.adapters import merged


def push_weights(llm: Any, policy: nn.Module) -> None:
    """Copies the policy's parameters, adapters merged, into the running engine (cast to the engine's dtype)."""
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": merged(policy)})
    if getattr(policy.config, "tie_word_embeddings", False):
        llm.apply_model(_repack_tied_head)
    llm.reset_prefix_cache()


def _repack_tied_head(model: nn.Module) -> None:
    """On CPUs vLLM multiplies by a packed copy of the output head; a reload of tied embeddings does not renew it."""
    head = getattr(model, "lm_head", None)
    if head is None or head.weight.device.type != "cpu":
        return
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    dispatch_cpu_unquantized_gemm(head, remove_weight=False)
