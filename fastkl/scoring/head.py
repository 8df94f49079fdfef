"""A causal language model's output head, described by data, since the fused operators compute it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from fastkl.errors import UserError


@dataclass(frozen=True, slots=True)
class Head:
    """The output head of a causal language model."""

    weight: torch.Tensor  # [V, H]
    bias: torch.Tensor | None  # [V]
    softcap: float | None  # logits are softcap * tanh(logits / softcap): Gemma-2
    logit_scale: float  # Cohere multiplies by it, Granite divides

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [..., H] -> logits [..., V], both in the weight's dtype."""
        logits = F.linear(hidden, self.weight, self.bias)
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits * self.logit_scale


def head_of(model: nn.Module) -> Head:
    """Weight, bias, softcap and scale of the model's output head."""
    linear, config = model.get_output_embeddings(), model.config
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(linear.weight, getattr(linear, "bias", None), softcap, scale)


@torch.no_grad()
def check_head(model: nn.Module, token_ids: list[int], tolerance: float = 1e-3) -> None:
    """Raises UserError unless trunk + Head reproduce the model's own logits on `token_ids`."""
    ids = torch.tensor([token_ids], device=model.device)
    own = model(input_ids=ids, use_cache=False).logits.float()
    logits = head_of(model).logits(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    error = float((logits.float() - own).abs().max())
    if not error <= tolerance * (1 + float(own.abs().max())):
        raise UserError(
            f"model: {type(model).__name__} computes its logits in a way that fastkl does not know (its own logits and "
            f"hidden states x head differ by {error:.2g}); it would be mis-scored."
        )
