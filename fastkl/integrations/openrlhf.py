"""fastkl's scoring for OpenRLHF 0.11.2; importing this module imports neither OpenRLHF nor transformers.

    log_probs_from_logits, compute_entropy    the functions of openrlhf.models.utils, same signatures
    action_scores                             what Actor.forward and the reference's Actor.forward compute, in one pass

Formulas, with z = logits / temperature: log softmax(z)[label], and entropy -sum softmax(z) log softmax(z).
What differs: the logits are left as they are (OpenRLHF divides them by the temperature in place), arithmetic and
results are float32 for every dtype, and bfloat16 logits are not rounded again inside the softmax. action_scores also
returns the exact KL, where OpenRLHF's compute_approx_kl estimates it from the sampled token and clamps it to
[-10, 10]; that function works unchanged on these log-probs.

Compared with OpenRLHF's own functions and Actor on a CPU. Not run: its DeepSpeed engine, ring attention and packed
samples (`packing_samples`), which need a GPU; action_scores packs by itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastkl.errors import UserError
from fastkl.kernels.operators import Support, TokenScores, token_scores

if TYPE_CHECKING:
    from collections.abc import Collection

__all__ = ["action_scores", "compute_entropy", "log_probs_from_logits"]


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature)[label], f32 in labels' shape. logits [..., V], any float dtype; labels int."""
    rows = logits.reshape(-1, logits.shape[-1])
    scores = token_scores(rows, None, labels.reshape(-1).long(), temperature=temperature, outputs=())
    return scores.policy_logprobs.view(labels.shape)


def compute_entropy(logits: Tensor) -> Tensor:
    """-sum softmax(logits) log softmax(logits), differentiable, f32 [...]. logits [..., V]."""
    labels = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    scores = token_scores(logits.reshape(-1, logits.shape[-1]), None, labels.reshape(-1), outputs=("entropy",))
    return scores.entropy.view(labels.shape)


def action_scores(
    policy: nn.Module,
    reference: nn.Module | None,
    sequences: Tensor,
    action_mask: Tensor,
    attention_mask: Tensor | None = None,
    *,
    temperature: float = 1.0,
    support: Support | None = None,
    outputs: Collection[str] = ("entropy", "kl"),
) -> TokenScores:
    """Scores of the actions under policy and reference, each f32 [B, A], zero where action_mask is.

    policy, reference: transformers models, or OpenRLHF Actors around them; no reference: None. sequences i64 [B, T]:
    prompts padded on the left, then actions; action_mask bool or 0/1 [B, A]: the last A tokens, as in Actor.forward;
    attention_mask bool or 0/1 [B, T]. temperature: Actor's. policy_logprobs is what Actor.forward(sequences,
    action_mask, attention_mask) returns, with its gradient. support, outputs, errors: see
    fastkl.integrations.transformers.score_tokens, which does the work.
    """
    from fastkl.integrations.transformers import score_tokens

    num_actions = action_mask.shape[1]
    if num_actions >= sequences.shape[1]:
        raise UserError(
            f"action_mask has {num_actions} columns and sequences {sequences.shape[1]}: at least one token must come "
            "before the first action."
        )
    mask = torch.zeros_like(sequences, dtype=torch.bool)
    mask[:, -num_actions:] = action_mask.bool()
    scores = score_tokens(
        _model_of(policy), None if reference is None else _model_of(reference), sequences, mask,
        attention_mask=attention_mask, temperature=temperature, support=support, outputs=outputs,
    )  # fmt: skip
    return TokenScores(*(None if x is None else x[:, -num_actions:] for x in scores.values()))


def _model_of(actor: Any) -> nn.Module:
    """The transformers model inside an Actor, which holds it as `model` and no output head of its own."""
    return actor if hasattr(actor, "get_output_embeddings") else actor.model
