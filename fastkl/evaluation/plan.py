"""Held-out data of a run: from the settings to the prompts that are left to train on, and an `Evaluator`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from fastkl.config.held_out import samples_of, share_of
from fastkl.config.settings import TrainConfig
from fastkl.data.prompts import PromptFormat, load_prompts
from fastkl.errors import UserError
from fastkl.evaluation.evaluate import Evaluator
from fastkl.evaluation.split import hold_out, in_both
from fastkl.evaluation.text_loss import windows_of
from fastkl.gym import first_seed_beyond
from fastkl.rewards.call import check_columns
from fastkl.rewards.load import RewardFunction, load_rewards
from fastkl.sampling.params import Sampling
from fastkl.types import Prompt


def eval_rewards(config: TrainConfig, training: tuple[RewardFunction, ...]) -> tuple[RewardFunction, ...]:
    """The functions of --eval-reward; without it, those of the training with their weights."""
    if not config.eval_reward:
        return training
    with named_as("eval_reward", "reward"):
        return load_rewards(config.eval_reward, None)


def due(config: TrainConfig, step: int) -> bool:
    """Whether the model is evaluated after this step: before the first, at the last, and every eval_every steps."""
    return step in (0, config.steps) or bool(config.eval_every and step % config.eval_every == 0)


def prompts_of(
    config: TrainConfig,
    source: Any,
    tokenizer: Any,
    max_prompt_tokens: int,
    say: Callable[[str], None] = lambda message: None,
) -> list[Prompt]:
    """The prompts of `source`, for training or evaluation, read as the settings say. say: shows what was dropped."""
    form = PromptFormat.of(config)
    return load_prompts(source, tokenizer, max_prompt_tokens=max_prompt_tokens, form=form, say=say)


def split(
    config: TrainConfig, prompts: Sequence[Prompt], tokenizer: Any, max_prompt_tokens: int
) -> tuple[list[Prompt], tuple[Prompt, ...]]:
    """(the prompts to train on, the held-out ones). UserError for held-out prompts that cannot be read."""
    if not config.eval_prompts:
        return list(prompts), ()
    if (share := share_of(config.eval_prompts)) is not None:
        train, held = hold_out(prompts, share)
        return train, tuple(held)
    with named_as("eval_prompts", "prompts"):
        return list(prompts), tuple(prompts_of(config, config.eval_prompts, tokenizer, max_prompt_tokens))


@contextmanager
def named_as(setting: str, other: str) -> Iterator[None]:
    """A UserError that begins with the `other` setting begins with this one: both are read by the same function."""
    try:
        yield
    except UserError as mistake:
        raise UserError(re.sub(f"^{other}: ", f"{setting}: ", str(mistake))) from mistake


def evaluator_of(
    config: TrainConfig,
    held: tuple[Prompt, ...],
    train: Sequence[Prompt],
    rewards: tuple[RewardFunction, ...],
    sampling: Sampling,
    text: tuple[tuple[int, ...], ...],
) -> Evaluator | None:
    """What the run evaluates; None: nothing."""
    if not held and not text:
        return None
    with named_as("eval_prompts", "reward"):
        check_columns(rewards, dict.fromkeys(name for prompt in held for name in prompt.columns))
    temperature = sampling.temperature if config.eval_temperature is None else config.eval_temperature
    return Evaluator(
        prompts=held,
        rewards=rewards,
        num_samples=samples_of(config.eval_samples, config.eval_temperature),
        sampling=replace(sampling, temperature=temperature),
        scored_as=sampling,
        pass_mark=config.eval_pass,
        seed=config.seed,
        max_steps=config.steps,
        reward_timeout=config.reward_timeout,
        text=text,
        notes=(note,) if (note := shared_note(config, train, held)) else (),
    )


def shared_note(config: TrainConfig, train: Sequence[Prompt], held: Sequence[Prompt]) -> str:
    """How many held-out prompts are trained on, too, with the remedy for questions of a gym; empty for none."""
    shared = in_both(train, held)
    if not shared:
        return ""
    ours, theirs = str(config.prompts), str(config.eval_prompts)
    gym = ours.startswith("gym:") and theirs.startswith("gym:")
    beyond = first_seed_beyond(ours.removeprefix("gym:"), theirs.removeprefix("gym:")) if gym else None
    why = f": question n of a gym comes from seed + n; give them seed={beyond} or more" if beyond is not None else ""
    return f"eval_prompts: {shared} of the {len(held)} are trained on, too{why}"


def text_windows(config: TrainConfig, tokenizer: Any, context: int | None) -> tuple[tuple[int, ...], ...]:
    """The text of --eval-text, cut into windows; none without one."""
    return windows_of("eval_text", config.eval_text, tokenizer, context) if config.eval_text else ()
