"""What the switch refuses: everything whose tokens it would score wrongly, and everything unknown, each by name."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from torch import nn

from fastkl.errors import UserError
from fastkl.scoring.models import dropouts

TRL_VERSION = "1.16."
REPLACED = ("_get_per_token_logps_and_entropies", "_generate_and_score_completions", "_prepare_inputs", "_compute_loss")
"""The trainer's methods that the switch replaces, on the instance, while it is on."""


def check_trainer(trainer: Any) -> None:
    """UserError unless this is a trainer whose tokens the switch scores exactly as its sampler drew them."""
    from trl import GRPOTrainer, RLOOTrainer

    kind = next((kind for kind in (RLOOTrainer, GRPOTrainer) if isinstance(trainer, kind)), None)
    if kind is None:
        raise UserError(
            f"trainer: {type(trainer).__name__} is none of TRL's RLOOTrainer, GRPOTrainer and DistillationTrainer."
        )
    check_own_methods(trainer, kind, REPLACED)
    check_features(trainer)
    for model in (trainer.model, trainer.ref_model):
        if model is not None:
            check_dropout(model)


def check_version() -> None:
    """UserError unless this is the TRL that the switch knows."""
    installed = version("trl")
    if not installed.startswith(TRL_VERSION):
        raise UserError(f"trl {installed} is installed; fastkl.integrations.trl needs trl=={TRL_VERSION}*.")


def check_own_methods(trainer: Any, kind: type, replaced: Sequence[str]) -> None:
    """UserError unless the methods that are to be replaced are those of TRL's `kind`."""
    for name in replaced:
        if name in vars(trainer):
            raise UserError("trainer: fastkl_scoring is on for this trainer already; leave the inner block out.")
        if getattr(type(trainer), name) is not getattr(kind, name):
            raise UserError(
                f"trainer: {type(trainer).__name__} has a {name} of its own, which fastkl_scoring would replace; "
                f"use {kind.__name__} itself."
            )


def check_features(trainer: Any) -> None:
    """UserError for the first feature in use that the switch does not know."""
    for feature, remedy in unsupported(trainer):
        raise UserError(f"fastkl_scoring does not support {feature}; {remedy}.")


def unsupported(trainer: Any) -> list[tuple[str, str]]:
    """The features in use that the switch does not know, each with what to do instead."""
    args, off = trainer.args, "train without fastkl_scoring"
    adapters = getattr(trainer.model, "peft_config", None) or {}
    batching = getattr(trainer, "use_transformers_continuous_batching", False)
    own_rollout = getattr(trainer, "rollout_func", None) is not None
    tools = getattr(trainer, "tools", None) and (args.generation_kwargs or {}).keys() & {"min_tokens", "min_new_tokens"}
    table = [
        (trainer._is_vlm, "models that take images", f"load the language model with its tokenizer alone, or {off}"),
        (trainer.is_deepspeed_enabled, "DeepSpeed", off),
        (trainer.is_fsdp_enabled, "FSDP", off),
        (args.torch_compile, "torch_compile True", "set it False"),
        (args.use_liger_kernel, "use_liger_kernel True", "set it False"),
        (batching, "use_transformers_continuous_batching True", "set it False"),
        (own_rollout, "rollout_func, which may draw tokens in any way", "let the trainer generate"),
        (tools, "tools with min_tokens, which counts from the start of every turn", "leave one of them out"),
        (any(a.is_prompt_learning for a in adapters.values()), "prompt-learning adapters", "use LoRA"),
    ]
    return [(feature, remedy) for in_use, feature, remedy in table if in_use]


def check_dropout(model: nn.Module) -> None:
    """UserError for any dropout that is on: two forwards of the same text would differ, and their noise would count as
    KL."""
    for name, module in model.named_modules():
        for key in dropouts(module):
            raise UserError(
                f"dropout: {key} is {getattr(module, key)} in {name or type(model).__name__}, and log-probs with "
                "dropout are noise; set disable_dropout=True, or the model's and the adapter's dropout to 0."
            )
