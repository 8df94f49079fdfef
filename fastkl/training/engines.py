"""Whether engines that several processes share (--engine-tp) can be had; nothing of vLLM is imported."""

from __future__ import annotations

from typing import Any

from fastkl.config.settings import TrainConfig
from fastkl.errors import UserError


def check_engine_groups(config: TrainConfig, num_processes: int) -> None:
    """UserError where so many processes cannot be put into groups that share an engine; needs no model."""
    if config.engine_tp == 1:
        return
    if config.generator not in ("auto", "vllm"):
        raise _only_vllm(config.engine_tp, config.generator)
    if num_processes == 1:
        raise UserError(
            f"engine_tp: {config.engine_tp} processes cannot share an engine, since this run is one process; start it "
            f"with --nproc {config.engine_tp} or torchrun, or leave it at 1."
        )
    if num_processes % config.engine_tp:
        raise UserError(
            f"engine_tp: {num_processes} processes cannot be put into groups of {config.engine_tp}; use a divisor of "
            f"{num_processes}, or another number of processes."
        )


def check_engine_tp(engine_tp: int, generator: str, text_config: Any) -> None:
    """UserError where no engine of this generator and this model can be shared by so many processes.

    generator: the one that was chosen. text_config: of the model. Attention heads are dealt out whole; those of keys
    and values may be fewer than processes: then several hold the same one.
    """
    if engine_tp == 1:
        return
    if generator != "vllm":
        raise _only_vllm(engine_tp, generator)
    heads = getattr(text_config, "num_attention_heads", None) or 0
    pairs = getattr(text_config, "num_key_value_heads", None) or heads
    if heads % engine_tp:
        raise UserError(
            f"engine_tp: the model's {heads} attention heads cannot be dealt to {engine_tp} processes; use a divisor "
            f"of {heads}."
        )
    if pairs and pairs % engine_tp and engine_tp % pairs:
        raise UserError(
            f"engine_tp: the model's {pairs} heads of keys and values cannot be dealt to {engine_tp} processes; use a "
            f"divisor of {pairs}, or a multiple of it."
        )


def _only_vllm(engine_tp: int, generator: str) -> UserError:
    return UserError(
        f"engine_tp: {engine_tp} processes can share an engine of vLLM only, and the generator is {generator}; leave "
        "it at 1."
    )
