"""Inputs: what a run starts from, checked in the order of cost before a weight is read.

Settings, rewards, tokenizer, prompts, generator's ability, folder. Every user's mistake ends in one UserError.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from fastkl.config.settings import TrainConfig, check_config
from fastkl.distributed.world import ALONE, World
from fastkl.errors import UserError
from fastkl.evaluation.evaluate import Evaluator
from fastkl.evaluation.plan import eval_rewards, evaluator_of, prompts_of, split, text_windows
from fastkl.report.loggers import check_report_to
from fastkl.report.metrics import taken_reward_names
from fastkl.rewards.call import check_columns
from fastkl.rewards.load import RewardFunction, load_rewards
from fastkl.rollout.generator import choose_generator
from fastkl.sampling.params import Sampling, check_ids
from fastkl.scoring import models
from fastkl.scoring.adapters import check_adapters
from fastkl.scoring.compiled import check_compiler
from fastkl.scoring.source import resolve_model
from fastkl.training import checkpoint
from fastkl.training.engines import check_engine_groups, check_engine_tp
from fastkl.training.fork import forked
from fastkl.training.given import Given
from fastkl.training.places import check_sleep, choose_device, compute_dtype
from fastkl.training.run_folder import has_checkpoint, lock_run_folder, prepare_run_folder
from fastkl.training.teacher import teacher_of
from fastkl.types import Prompt


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a run starts from, checked before any weight is read."""

    device: torch.device
    source: str  # folder or hub id of the reference
    model_config: Any
    tokenizer: Any
    rewards: tuple[RewardFunction, ...]
    prompts: list[Prompt]
    evaluator: Evaluator | None
    sampling: Sampling
    generator: str
    generator_reason: str
    folder: Path
    lock: TextIO | None  # held while it is open; the first process has it
    resumed: checkpoint.Checkpoint | None  # what the run continues
    is_fork: bool  # `resumed` is another run's
    given: Given  # objects in the place of what the settings name
    teacher: str = ""  # folder or hub id of a reference that is another model; empty: it is the policy's start


def check_inputs(
    config: TrainConfig,
    given: Given | None = None,
    say: Callable[[str], None] = lambda message: None,
    world: World = ALONE,
) -> Inputs:
    """Everything that a user can get wrong, in the order of cost. Raises UserError.

    given: objects in the place of what the settings name. say: shows a person what happens.
    """
    given = given or Given()
    check_config(config)
    check_engine_groups(config, world.size)
    check_report_to(config.report_to)
    check_adapters(config.lora_rank, config.lora_targets)
    device = choose_device(config.device, world)
    if config.compile:
        check_compiler(device)
    rewards = load_rewards(given.rewards or config.reward, config.reward_weights, taken_reward_names())
    rewards_of_held = eval_rewards(config, rewards)
    models.quiet_transformers()
    source = resolve_model(config.model, config.revision)
    model_config = models.load_config(source)
    tokenizer = given.tokenizer or models.load_tokenizer(source)
    room = room_for_prompt(config, model_config)
    teacher = ""
    if config.reference:
        teacher, teacher_config = teacher_of(config.reference, tokenizer, model_config)
        room = min(room, room_for_prompt(config, teacher_config))
    prompts = prompts_of(config, config.prompts if given.prompts is None else given.prompts, tokenizer, room, say)
    check_columns(rewards, dict.fromkeys(name for prompt in prompts for name in prompt.columns))
    prompts, held = split(config, prompts, tokenizer, room)
    text = text_windows(config, tokenizer, models.context_length(model_config))
    sampling = Sampling.of(config, models.stop_token_ids(model_config, source, tokenizer))
    check_vocabulary(models.vocabulary(model_config), [*prompts, *held], sampling)
    evaluator = evaluator_of(config, held, prompts, rewards_of_held, sampling, text)
    generator, reason = choose_generator("server" if config.engines else config.generator, model_config, device)
    check_sleep(config, generator, device)
    check_engine_tp(config.engine_tp, generator, models.text_config(model_config))
    if config.engines:
        from fastkl.rollout.server import check_servers

        check_servers(
            config.engines,
            sampling,
            vocab=models.text_config(model_config).vocab_size,
            dtype=str(compute_dtype(config.dtype, device)).removeprefix("torch."),
            max_model_len=longest_sequence((*prompts, *held), config),
            weights=config.engine_weights,
            device=device,
            world=world,
        )
    lock = lock_run_folder(config) if world.is_first else None
    with closed_on_failure(lock):
        folder, resumed, is_fork = world.once(lambda: folder_of(config))
    return Inputs(
        *(device, source, model_config, tokenizer, rewards, prompts, evaluator, sampling, generator, reason, folder),
        *(lock, resumed, is_fork, given, teacher),
    )


def folder_of(config: TrainConfig) -> tuple[Path, checkpoint.Checkpoint | None, bool]:
    """The run's folder, made; the checkpoint that it goes on from, if any; whether that is another run's."""
    folder = prepare_run_folder(config)
    saved = config.resume and has_checkpoint(folder)
    resumed = checkpoint.newest_checkpoint(folder / "checkpoints") if saved else None
    fork = forked(config, folder)
    return folder, resumed or fork, fork is not None


def check_vocabulary(vocab: int | None, prompts: Iterable[Prompt], sampling: Sampling) -> None:
    """UserError for an id that the model has no embedding for, or that is never sampled since it does not exist."""
    if vocab is None:
        return
    check_ids(sampling, vocab)
    for prompt in prompts:
        if (wrong := max(prompt.token_ids, default=0)) >= vocab:
            raise UserError(
                f"prompts: row {prompt.row} has the token id {wrong}, which is not in the model's vocabulary, 0 to "
                f"{vocab - 1}; the tokenizer has tokens that the model was not resized for."
            )


def room_for_prompt(config: TrainConfig, model_config: Any) -> int:
    """Tokens that a prompt may have so that its completion fits the model's context. UserError if none fits."""
    context = models.context_length(model_config)
    if context is None:
        return 1 << 30
    if config.max_new_tokens >= context:
        raise UserError(
            f"max_new_tokens: {config.max_new_tokens} does not fit the model's context of {context} tokens; "
            f"use at most {context - 1}, less the longest prompt."
        )
    return context - config.max_new_tokens


def max_sequence_tokens(inputs: Inputs, config: TrainConfig) -> int:
    """Tokens of the longest prompt, a held-out one included, with its completion."""
    return longest_sequence((*inputs.prompts, *(inputs.evaluator.prompts if inputs.evaluator else ())), config)


def longest_sequence(prompts: Iterable[Prompt], config: TrainConfig) -> int:
    """Tokens of the longest of these prompts with its completion."""
    return max(len(prompt.token_ids) for prompt in prompts) + config.max_new_tokens


@contextlib.contextmanager
def closed_on_failure(lock: TextIO | None) -> Iterator[None]:
    """A run that does not come about leaves its folder to the next one, in this process, too."""
    try:
        yield
    except BaseException:
        if lock is not None:
            lock.close()
        raise
