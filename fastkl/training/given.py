"""What a caller of `fastkl.train` hands over in the place of names: reward functions, prompts, a model.

In: the settings and the objects. Out: settings that a file can hold, and the objects. In the settings a function is
python:NAME and a list of prompts python:TYPE, so that a run that is resumed without its objects says what is missing. A
model in memory is written to OUTPUT/start, from where generator and reference read it.
"""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastkl.config.defaults import resolved
from fastkl.config.files import plain
from fastkl.config.settings import TrainConfig, check_config
from fastkl.errors import UserError
from fastkl.scoring.models import load_tokenizer
from fastkl.training.early import MARK, refuse_missing
from fastkl.training.run_folder import check_run_folder, holds_run

Reward = str | Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Given:
    """Objects in the place of what the settings name; None or empty where the settings are meant."""

    rewards: tuple[Reward, ...] = ()
    prompts: Any = None
    policy: nn.Module | None = None  # trained in place
    tokenizer: Any = None


def taken(
    config: TrainConfig,
    reward: Reward | Sequence[Reward] | None,
    prompts: Any,
    model: Any,
    tokenizer: Any,
) -> tuple[TrainConfig, Given]:
    """The settings with names in the place of the objects, every "auto" resolved, and the objects. UserError for an
    object that cannot be used, or that a run which is resumed lacks."""
    rewards = () if reward is None else tuple(reward) if isinstance(reward, list | tuple) else (reward,)
    if reward is not None:
        config = replace(config, reward=tuple(map(_reward_name, rewards)))
    if prompts is not None:
        is_name = isinstance(prompts, str | os.PathLike)
        config = replace(config, prompts=os.fspath(prompts) if is_name else f"{MARK}{type(prompts).__name__}")
        prompts = None if is_name else prompts
    policy = None
    if isinstance(model, str | os.PathLike):
        config = replace(config, model=os.fspath(model))
    elif model is not None:
        policy = checked_module(model)
        config = replace(config, model=_name_of(policy))
    config = resolved(plain(config))
    refuse_missing(config, rewards, prompts)
    if policy is not None and config.lora_rank:
        raise UserError("lora_rank: adapters are not put into a model in memory; give its folder.")
    if policy is not None:
        config, tokenizer = written_down(config, policy, tokenizer)
    return config, Given(rewards if any(map(callable, rewards)) else (), prompts, policy, tokenizer)


def _reward_name(reward: Reward) -> str:
    """A name that a file can hold."""
    if isinstance(reward, str):
        return reward
    if not callable(reward):
        raise UserError(f"reward: {reward!r} is neither a function nor the name of one.")
    return f"{MARK}{getattr(reward, '__name__', type(reward).__name__)}"


def _name_of(model: nn.Module) -> str:
    """Where a module came from, for the name of the run's folder."""
    return getattr(model, "name_or_path", "") or type(model).__name__


def checked_module(model: Any) -> nn.Module:
    """The module, if it can be trained in place. UserError else."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise UserError(
            f"model: {type(model).__name__} is no model of transformers (PreTrainedModel); give one, or its folder."
        )
    other = next((p.dtype for p in model.parameters() if p.dtype != torch.float32), None)
    if other is not None:
        raise UserError(
            f"model: it is trained in place, in float32, and has weights in {str(other).removeprefix('torch.')}; give "
            "model.float()."
        )
    frozen = next((name for name, p in model.named_parameters() if not p.requires_grad), None)
    if frozen is not None:
        raise UserError(f"model: all its weights are trained, and {frozen} is frozen; give model.requires_grad_(True).")
    return model


def written_down(config: TrainConfig, policy: Any, tokenizer: Any) -> tuple[TrainConfig, Any]:
    """The settings with OUTPUT/start for the model, which holds the module as it is now; and its tokenizer."""
    start = Path(config.output).expanduser() / "start"
    started = replace(config, model=str(start))
    check_config(started)
    check_run_folder(started)
    if tokenizer is None:
        if not getattr(policy, "name_or_path", ""):
            raise UserError("model: the module does not say where its tokenizer is; give tokenizer=... beside it.")
        tokenizer = load_tokenizer(policy.name_or_path)
    if not (config.resume and holds_run(start.parent) and start.is_dir()):
        try:
            policy.save_pretrained(start)
            tokenizer.save_pretrained(start)
        except OSError as failure:
            reason = failure.strerror or failure
            message = f"output: {str(start)!r} cannot be written ({reason}); choose another output."
            raise UserError(message) from failure
    return started, tokenizer


def source_of(rewards: Iterable[Reward]) -> dict[str, bytes]:
    """The functions' source, for a fingerprint: a resumed run says which has changed. None where there is no source."""
    found = {}
    for reward in rewards:
        with contextlib.suppress(OSError, TypeError):  # typed at a prompt, or written in C
            found[_reward_name(reward)] = inspect.getsource(_code(reward)).encode()
    return found


def _code(reward: Any) -> Any:
    """What has a source: the function, or the class of a callable object."""
    return reward if inspect.isroutine(reward) else type(reward)
