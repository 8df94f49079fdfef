"""Sync: the policy's weights into the running vLLM engine, and the proof that they arrived.

vLLM reloads weights in place, but three things can go wrong without a word: a packed, tied output head on CPUs keeps
the old weights; a prefix cache survives with the old keys and values; a reload may stop half-way. The first two are
cured here, and all three are caught by `check_agreement`: the engine's log-probs of its own samples must equal the
trainer's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

# Mean |engine - trainer| log-prob over a step's tokens, in nats, up to which the two agree, by the engine's dtype.
# Measured for equal weights: 2e-6 in float32, 0.02 in bfloat16; one stale optimizer step costs 1e-3 and more.
AGREEMENT_NATS = {"float32": 1e-4, "bfloat16": 0.1}


class StaleEngineError(RuntimeError):
    """The generator samples from other weights, or another distribution, than the trainer scores."""


def push_weights(llm: Any, policy: nn.Module) -> None:
    """Copies the policy's parameters into the running engine (cast to the engine's dtype)."""
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(policy.named_parameters())})
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


def logprob_gaps(engine_logprobs: torch.Tensor, policy_logprobs: torch.Tensor) -> tuple[float, float, int]:
    """(sum, max, count) of |engine - trainer| over tokens, nats. Both f32 [N]."""
    if engine_logprobs.numel() == 0:
        return 0.0, 0.0, 0
    gaps = (engine_logprobs - policy_logprobs).abs()
    return float(gaps.sum()), float(gaps.max()), gaps.numel()


def check_agreement(mean_gap: float, max_gap: float, dtype: str, step: int) -> None:
    """Raises StaleEngineError when the mean gap between engine and trainer is more than rounding explains."""
    if mean_gap <= AGREEMENT_NATS[dtype]:
        return
    cause = (
        "the model's forward pass differs between generator and trainer"
        if step == 1
        else "the engine still holds older weights, or only part of the new ones"
    )
    raise StaleEngineError(
        f"step {step}: the generator's log-probs and the trainer's differ by {mean_gap:.2g} nats on average (at most "
        f"{max_gap:.2g}); {AGREEMENT_NATS[dtype]:g} is the limit in {dtype}. The likely cause: {cause}. Nothing was "
        "trained on these samples; --generator transformers avoids a second copy of the weights."
    )
