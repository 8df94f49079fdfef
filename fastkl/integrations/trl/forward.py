"""A model's forward with a second purpose: run the backbone and hand the hidden states to a function.

The function runs inside the model's forward, so that wrappers around the model (distributed data parallel, PEFT,
accelerate's autocast) see an ordinary forward whose output depends on all parameters.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from fastkl.errors import UserError
from fastkl.kernels.types import Head
from fastkl.scoring.head import check_head, head_of
from fastkl.scoring.models import backbone_of

Task = Callable[[Any, Head], dict[str, Tensor]]
"""(the backbone's outputs with last_hidden_state [b, L, H], the model's head) -> tensors, which the forward returns."""


def base_model_of(trainer: Any, model: Any) -> nn.Module:
    """The causal language model inside the wrappers of accelerate and PEFT."""
    model = trainer.accelerator.unwrap_model(model)
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


@contextmanager
def forward_task(model: Any) -> Iterator[None]:
    """Teaches one model instance `model(..., fastkl_task=task)`. UserError if its head is not known to fastkl."""
    check_known_head(model)
    own_forward = model.forward
    takes_positions = "position_ids" in inspect.signature(type(model).forward).parameters

    @wraps(own_forward)  # keeps the signature, by which `generate` validates its arguments
    def forward(*args: Any, fastkl_task: Task | None = None, **inputs: Any) -> Any:
        if fastkl_task is None:
            return own_forward(*args, **inputs)
        inputs = {name: value for name, value in inputs.items() if value is not None}  # PEFT names every argument
        if takes_positions:
            inputs["position_ids"] = position_ids(inputs["attention_mask"])
        return fastkl_task(backbone_of(model)(**inputs, use_cache=False), head_of(model))

    had_own = "forward" in vars(model)
    model.forward = forward
    try:
        yield
    finally:  # what was wrapped around it meanwhile (accelerate's autocast) stays: without a task it changes nothing
        if model.forward is forward:
            if had_own:
                model.forward = own_forward
            else:
                del model.forward


def position_ids(attention_mask: Tensor) -> Tensor:
    """Each token's place in its row, padding not counted, as in generation. attention_mask i64 [b, L]."""
    return (attention_mask.cumsum(1) - 1).clamp_(min=0)


def balancing_loss(model: Any, router_logits: tuple[Tensor, ...], attention_mask: Tensor) -> Tensor:
    """The auxiliary loss of a mixture of experts, as transformers' and TRL's own forwards take it."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    config = model.config.get_text_config()
    num_experts = getattr(config, "num_experts", None) or model.num_experts
    return load_balancing_loss_func(router_logits, num_experts, config.num_experts_per_tok, attention_mask)


@torch.no_grad()
def check_known_head(model: nn.Module) -> None:
    """UserError unless hidden states and Head reproduce the model's logits (up to the rounding of its dtype)."""
    try:
        weight = head_of(model).weight
    except AttributeError as failure:
        raise UserError(f"model: {type(model).__name__} has no output head that fastkl can read.") from failure
    probe = [(7 * i + 1) % len(weight) for i in range(8)]
    wrapped = vars(model).pop("forward", None)  # accelerate's would round the logits to bfloat16
    try:
        check_head(model, probe, tolerance=1e-3 if model.dtype == torch.float32 else 3e-2)
    finally:
        if wrapped is not None:
            model.forward = wrapped
