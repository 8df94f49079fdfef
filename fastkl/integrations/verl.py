"""fastkl's scoring with the signatures of verl 0.9.1's log-prob functions; importing this module does not import verl.

    linear_cross_entropy, FusedLinearForPPO           hidden states and head in: log-probs and entropy, no stored logits
    logprobs_from_logits, entropy_from_logits(_with_chunking)             logits in

verl looks its Triton head up when it is called (forward_with_triton_backend), so one assignment puts this one there:

    import verl.utils.kernel.linear_cross_entropy as head
    from fastkl.integrations.verl import linear_cross_entropy
    head.linear_cross_entropy = linear_cross_entropy        # with actor_rollout_ref.model.use_fused_kernels=True

Formulas, with z = logits / temperature: log softmax(z)[label], and entropy -sum softmax(z) log softmax(z); all
differentiable. What differs: arithmetic and results are float32 for every dtype and under autocast, where verl's
PyTorch head rounds the logits and the entropy to bfloat16; temperatures may differ per token; a head sharded by FSDP2
is gathered. Heads split over a tensor-parallel group (`dist_process_group`) are refused: fastkl.linear_token_scores
takes them as vocab_group and sums the gradient of the hidden states over the group, and whether verl's callers expect
that has not been tried.

verl passes the reference through a call of its own. Both models in one pass, with the exact KL that verl's
kl_penalty="full" leaves out, and scores on the sampler's support: fastkl.linear_token_scores.

Compared with verl's own PyTorch functions and classes on a CPU. verl's Triton kernels assert CUDA and have not been
run beside these; the comparison there is with the formula above in float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastkl.errors import UserError
from fastkl.kernels.operators import linear_token_scores, token_scores

__all__ = [
    "FusedLinearForPPO",
    "entropy_from_logits",
    "entropy_from_logits_with_chunking",
    "linear_cross_entropy",
    "logprobs_from_logits",
]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """Log-probs of the labels and entropies, each f32 [N] with N = labels.numel(), as verl's Triton head gives them.

    hidden [..., H]; weight [V, H]; labels int [...]; temperature a number, or a tensor that broadcasts to labels.
    reduction "sum" or "mean" makes the log-probs a scalar; the entropies stay per token. Note the sign: log-probs, not
    a cross entropy. Raises UserError for another reduction, a process group, and inputs that do not fit.
    """
    if dist_process_group is not None:
        raise UserError(
            "dist_process_group: this function takes no head that is split over a tensor-parallel group; pass the "
            "whole head, leave use_fused_kernels to verl, or call fastkl.linear_token_scores with vocab_group."
        )
    if reduction.lower() not in ("none", "sum", "mean"):
        raise UserError(f"reduction is {reduction!r}, expected 'none', 'sum' or 'mean'.")
    logprobs, entropy = _head(hidden, weight, labels, temperature, None)
    if reduction.lower() != "none":
        logprobs = logprobs.sum() if reduction.lower() == "sum" else logprobs.mean()
    return logprobs, entropy


class FusedLinearForPPO(nn.Module):
    """verl.utils.experimental.torch_functional.FusedLinearForPPO: the same call, chunk_size rows of logits at once."""

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch") -> None:
        super().__init__()
        self.chunk_size = chunk_size
        self.impl_backend = impl_backend  # accepted and ignored: there is one implementation

    def forward(
        self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float | Tensor = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies, f32 in input_ids' shape. hidden_states [..., H], vocab_weights [V, H]."""
        logprobs, entropy = _head(hidden_states, vocab_weights, input_ids, temperature, self.chunk_size)
        return logprobs.view(input_ids.shape), entropy.view(input_ids.shape)


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """log softmax(logits)[label], f32 in labels' shape. logits [..., V]; labels int [...].

    inplace_backward: the backward overwrites the logits with their gradient, as verl does where flash-attn is
    installed. As there, pass False if anything else needs the logits after that, an entropy for one; what would then
    read overwritten logits in its backward is stopped by autograd.
    """
    scores = token_scores(*_rows(logits, labels), outputs=(), inplace_backward=inplace_backward)
    return scores.policy_logprobs.view(labels.shape)


def entropy_from_logits(logits: Tensor) -> Tensor:
    """-sum softmax(logits) log softmax(logits), differentiable, f32 [...]. logits [..., V]."""
    return entropy_from_logits_with_chunking(logits, None)


def entropy_from_logits_with_chunking(logits: Tensor, chunk_size: int | None = 2048) -> Tensor:
    """entropy_from_logits with work buffers of chunk_size rows; here it is the same function, also differentiable."""
    labels = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    scores = token_scores(*_rows(logits, labels), outputs=("entropy",), chunk_tokens=chunk_size)
    return scores.entropy.view(labels.shape)


def _rows(logits: Tensor, labels: Tensor) -> tuple[Tensor, None, Tensor]:
    """The arguments of token_scores: logits [N, V], no reference, labels i64 [N]."""
    return logits.reshape(-1, logits.shape[-1]), None, labels.reshape(-1).long()


def _head(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float | Tensor, chunk_size: int | None
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies, f32 [N] each."""
    if isinstance(temperature, Tensor):
        temperature = temperature.expand(labels.shape).reshape(-1)
    scores = linear_token_scores(
        hidden.reshape(-1, hidden.shape[-1]), weight, None, None, labels.reshape(-1).long(),
        temperature=temperature, outputs=("entropy",), chunk_tokens=chunk_size,
    )  # fmt: skip
    return scores.policy_logprobs, scores.entropy
