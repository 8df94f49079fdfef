"""The loss of TRL's DistillationTrainer, a divergence from a teacher, by fastkl's fused operator.

    loss = 1/n sum_t D(student, teacher)(y_t), over all ids, at the tokens of the student's own completions

D by TRL's `beta`: 1 the reverse KL, 0 the forward KL, 0.5 the Jensen-Shannon divergence.

TRL's `_compute_loss` runs both backbones and hands their hidden states to tiles of the vocabulary, in which it computes
the logits of both models once for the loss and once more for the gradient: six products with a head. Here the gradient
is taken while the logits are at hand: four. Backbones, sampling, normaliser and metrics stay TRL's own. The student's
entropy comes from the same pass. Replaced is that one method, on the instance, while the block runs.

Left out: the Jensen-Shannon divergences of other weights than 0.5, which are refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastkl.errors import UserError
from fastkl.integrations.trl.checks import check_features, check_own_methods
from fastkl.integrations.trl.forward import base_model_of, check_known_head
from fastkl.kernels.operators import TokenCoefficients, head_token_loss
from fastkl.scoring.head import head_of

REPLACED = ("_compute_loss",)

DIVERGENCES = {1.0: "kl", 0.0: "forward_kl", 0.5: "jsd"}
"""TRL's beta -> the divergence's name in TokenScores."""


def is_distillation(trainer: Any) -> bool:
    """Whether it is TRL's DistillationTrainer, or a subclass."""
    from trl import DistillationTrainer

    return isinstance(trainer, DistillationTrainer)


@contextmanager
def fused_loss(trainer: Any) -> Iterator[None]:
    """The trainer's loss is fastkl's for as long as this lasts. UserError where it would be another one."""
    check_distillation(trainer)
    trainer._compute_loss = partial(compute_loss, trainer)
    try:
        yield
    finally:
        del trainer._compute_loss


def check_distillation(trainer: Any) -> None:
    """UserError unless the operator computes what the trainer asks for."""
    from trl import DistillationTrainer

    check_own_methods(trainer, DistillationTrainer, REPLACED)
    check_features(trainer)
    if trainer.beta not in DIVERGENCES:
        raise UserError(
            f"beta: {trainer.beta:g} asks for a Jensen-Shannon divergence with unequal weights, which fastkl_scoring "
            "does not compute; set beta to 1, 0 or 0.5, or train without fastkl_scoring."
        )
    for model in (trainer.model, trainer.teacher_model):
        check_known_head(base_model_of(trainer, model))


def compute_loss(
    trainer: Any, student: Any, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """TRL's: the loss, the student's entropies summed over tokens, and the number n of tokens that count."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    mask = (inputs["completion_mask"] * inputs.get("tool_mask", 1)).bool()  # [b, T]
    states = trainer._get_last_hidden_state
    hidden = states(student, ids, attention, mask.shape[1])[mask]
    trainer.teacher_model.eval()
    teacher = trainer.accelerator.unwrap_model(trainer.teacher_model)
    with torch.no_grad():
        task = states, teacher, ids, attention, mask.shape[1]
        ref_hidden = trainer._forward_redirection(trainer.teacher_model, teacher, *task)[mask]
    heads = [head_of(base_model_of(trainer, model)) for model in (student, teacher)]
    count = mask.sum()
    total = count.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    share = (torch.ones(len(hidden), device=hidden.device) / total).float()
    name = DIVERGENCES[trainer.beta]
    loss, scores = head_token_loss(
        hidden, heads[0], ref_hidden, heads[1], inputs["completion_ids"][mask], TokenCoefficients(**{name: share}),
        temperature=trainer.temperature, valid_vocab=len(heads[0].weight), outputs=(name, "entropy"),
    )  # fmt: skip
    return loss, scores.entropy.sum(), count
