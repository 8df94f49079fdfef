"""What can be checked of a run's names before torch is loaded: a mistake is answered in well under a second."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastkl.config.settings import TrainConfig, check_config
from fastkl.data.rows import place_of
from fastkl.errors import UserError
from fastkl.gym import task_of
from fastkl.rewards.load import load_rewards
from fastkl.scoring.source import local_model
from fastkl.training.run_folder import check_run_folder

MARK = "python:"
"""Begins the name of what was handed over from Python, in the settings of a run."""


def check_names(config: TrainConfig, say: Callable[[str], None] = lambda message: None) -> None:
    """UserError for a wrong setting, an output folder that is not free, a file that does not exist, a reward function
    that cannot be found, or a model folder that lacks what is needed. say: shows a person what takes seconds."""
    check_config(config)
    check_run_folder(config)
    refuse_missing(config)
    if place_of(config.prompts) == "gym":
        say("loading reasoning-gym ...")
        task_of(config.prompts.removeprefix("gym:"))
    load_rewards(config.reward, config.reward_weights)
    local_model(config.model, config.revision)
    if config.reference:
        try:
            local_model(config.reference)
        except UserError as mistake:
            raise UserError(f"reference: {str(mistake).removeprefix('model: ')}") from None


def refuse_missing(config: TrainConfig, rewards: Sequence[Any] = (), prompts: Any = None) -> None:
    """UserError where the settings name a function or rows that only Python can hand over, and they are not at hand."""
    handed_over = {"reward": () if any(map(callable, rewards)) else config.reward}
    handed_over["prompts"] = (config.prompts,) if prompts is None else ()
    for setting, names in handed_over.items():
        if lost := next((name for name in names if name.startswith(MARK)), None):
            raise UserError(
                f"{setting}: {lost.removeprefix(MARK)!r} was handed over from Python; go on with the run from there, "
                f"by fastkl.train(config, {setting}=...)."
            )
