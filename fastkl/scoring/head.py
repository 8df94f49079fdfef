"""A causal language model's output head as data, since the fused operators compute it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from fastkl.errors import UserError
from fastkl.kernels.types import Head
from fastkl.scoring.models import backbone_of, context_length, first_line, text_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


CHECKED_TOKENS = 16
"""Enough to tell one formula from another; the logits of a whole prompt would be gigabytes."""


FACTORS = {"logit_scale": 1, "lm_head_multiplier": 1, "logits_scaling": -1, "logits_mup_width_multiplier": -1}
"""What configurations call the factor of the logits, and its power: 1 multiplies, -1 divides."""

EXCEPTIONS = {"hyperclovax": {"logits_scaling": 1}, "mpt": {"logit_scale": 0}}
"""The powers that other model types give these names; 0: the factor is not used."""

SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def head_of(model: PreTrainedModel) -> Head:
    """Weight, bias, softcap and scale of the model's output head."""
    linear, config = model.get_output_embeddings(), text_config(model.config)
    if linear is None:
        raise UserError(f"model: {type(model).__name__} has no output head over a vocabulary; name a causal model.")
    softcap = next((cap for name in SOFTCAPS if (cap := getattr(config, name, None))), None)
    return Head(linear.weight, getattr(linear, "bias", None), softcap, _scale(config))


def _scale(config: Any) -> float:
    """The factor of the logits."""
    powers = FACTORS | EXCEPTIONS.get(getattr(config, "model_type", ""), {})
    return math.prod(float(getattr(config, name, None) or 1.0) ** power for name, power in powers.items())


@torch.no_grad()
def check_head(model: PreTrainedModel, token_ids: list[int], tolerance: float = 1e-3) -> None:
    """Raises UserError unless the model gives next-token logits, which do not depend on later tokens, and unless
    backbone + Head reproduce them: on the first of `token_ids`."""
    count = min(CHECKED_TOKENS, context_length(model.config) or CHECKED_TOKENS)
    ids, half = torch.tensor([(token_ids * count)[:count]], device=model.device), (count + 1) // 2
    own = _own_logits(model, ids)
    bound = tolerance * (1 + float(own.abs().max()))
    change = float((_own_logits(model, ids[:, :half]) - own[:, :half]).abs().max())
    if not change <= bound:
        raise UserError(
            f"model: {type(model).__name__} looks ahead (its logits change by {change:.2g} with the tokens that "
            "follow), so it gives no next-token log-probs; where its config.json has is_decoder or causal, set it to "
            "true."
        )
    logits = head_of(model).logits(backbone_of(model)(input_ids=ids, use_cache=False).last_hidden_state)
    error = float((logits.float() - own).abs().max())
    if not error <= bound:
        raise UserError(
            f"model: {type(model).__name__} computes its logits in a way that fastkl does not know (its own logits and "
            f"hidden states x head differ by {error:.2g}); it would be mis-scored."
        )


def _own_logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """f32 [1, T, V] of token ids [1, T], from the model's own forward. UserError where it gives none."""
    try:
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits.float()
    except Exception as failure:  # the model's own code, which may want other inputs or other lengths
        raise UserError(
            f"model: {type(model).__name__} gives no logits for {ids.shape[1]} token ids alone "
            f"({first_line(failure)}); name a causal language model of text."
        ) from failure
    if logits.shape[:2] != ids.shape:
        raise UserError(
            f"model: {type(model).__name__} gives logits of the shape {list(logits.shape)} for {ids.shape[1]} token "
            "ids, which are not one distribution per token; name a causal language model of text."
        )
    return logits
