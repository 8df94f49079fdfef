"""A causal language model's output head as data, since the fused operators compute it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fastkl.errors import UserError
from fastkl.kernels.types import Head
from fastkl.scoring.models import backbone_of, text_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


CHECKED_TOKENS = 16
"""Enough to tell one formula from another; the logits of a whole prompt would be gigabytes."""


def head_of(model: PreTrainedModel) -> Head:
    """Weight, bias, softcap and scale of the model's output head."""
    linear, config = model.get_output_embeddings(), text_config(model.config)
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    caps = (getattr(config, name, None) for name in ("final_logit_softcapping", "logits_soft_cap"))
    softcap = next((cap for cap in caps if cap), None)
    return Head(linear.weight, getattr(linear, "bias", None), softcap, scale)


@torch.no_grad()
def check_head(model: PreTrainedModel, token_ids: list[int], tolerance: float = 1e-3) -> None:
    """Raises UserError unless backbone + Head reproduce the model's own logits on the first of `token_ids`."""
    ids = torch.tensor([token_ids[:CHECKED_TOKENS]], device=model.device)
    own = model(input_ids=ids, use_cache=False).logits.float()
    logits = head_of(model).logits(backbone_of(model)(input_ids=ids, use_cache=False).last_hidden_state)
    error = float((logits.float() - own).abs().max())
    if not error <= tolerance * (1 + float(own.abs().max())):
        raise UserError(
            f"model: {type(model).__name__} computes its logits in a way that fastkl does not know (its own logits and "
            f"hidden states x head differ by {error:.2g}); it would be mis-scored."
        )
