"""Defaults that follow the model: the settings left at "auto", and what is said about a learning rate."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import PurePath

from fastkl.config.settings import NO_REWARD, TrainConfig, estimator_and_placement

LR_EMBEDDED, LR, LR_ADAPTERS = 1e-3, 1e-6, 1e-5
"""For the embedded model of 1.7 million parameters; for any other, whose size is not known yet; for its adapters."""

EMBEDDED_PARAMETERS = 1.7e6


def resolved(config: TrainConfig) -> TrainConfig:
    """The settings with a value in the place of every "auto" that the settings alone decide: lr, output, and the KL's
    estimator and placement."""
    estimator, placement = estimator_and_placement(config)
    reward = config.reward or NO_REWARD
    config = replace(config, reward=reward)
    return replace(config, lr=lr_of(config), output=output_of(config), kl_estimator=estimator, kl_placement=placement)


def lr_of(config: TrainConfig) -> float:
    """The peak learning rate."""
    if config.lr is not None:
        return config.lr
    return LR_EMBEDDED if config.model == "storyteller" else LR_ADAPTERS if config.lora_rank else LR


def output_of(config: TrainConfig) -> str:
    """The run folder; by default runs/MODEL-REWARD, and runs/alliteration for the embedded job."""
    if config.output != "auto":
        return config.output
    rewards = "-".join(map(_reward_word, config.reward))
    if config.model == "storyteller" and rewards == "alliteration":
        return "runs/alliteration"
    return f"runs/{_word(PurePath(config.model.rstrip('/')).name)}-{_word(rewards)}"


def _reward_word(name: str) -> str:
    """What a reward is called in a folder's name: rewards.py:brevity is brevity, regex?pattern=x is regex."""
    head = name.partition("?")[0]
    return re.split(r"[:/]", head.rstrip(":/"))[-1].removesuffix(".py")


def _word(text: str) -> str:
    """Text as a part of a file's name."""
    return re.sub(r"[^\w.+-]+", "_", text).strip("._")[:60] or "run"


def bearable_lr(parameters: int) -> float:
    """About the largest peak learning rate at which a model of this size learns and does not collapse at once.

    1e-3 (n / 1.7e6)^-0.7, between what was measured: 1e-3 for the embedded model of 1.7 million parameters; 2e-5 learns
    and 1e-3 collapses within two steps for SmolLM2-135M.
    """
    return float(LR_EMBEDDED * (max(parameters, EMBEDDED_PARAMETERS) / EMBEDDED_PARAMETERS) ** -0.7)


def lr_warnings(lr: float, parameters: int) -> Sequence[str]:
    """What to say about a learning rate far above what a model of this size bears; nothing up to twice that."""
    most = bearable_lr(parameters)
    if lr <= 2 * most:
        return ()
    return (
        f"lr: {lr:g} is far above what a model of {parameters / 1e6:,.0f} million parameters bears (about {most:.0e}); "
        "expect it to collapse. Begin with --lr 1e-6.",
    )
