"""Forking: a new run that begins where a step of another has ended, with other settings if wanted.

In: `fork`, "RUN" or "RUN:STEP". The new run starts from that checkpoint's weights, moments, random states and counters;
its metrics.jsonl and samples.jsonl begin with the lines up to that step. With no setting changed it equals the other
run resumed, bit for bit.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path

from fastkl.config.files import renamed, with_settings
from fastkl.config.settings import TrainConfig
from fastkl.errors import UserError
from fastkl.report.loggers import EVALUATIONS, LOG_FILES
from fastkl.training import checkpoint
from fastkl.training.manifest import read_manifest
from fastkl.training.resume import resume
from fastkl.training.run_folder import MAY_CHANGE_ON_RESUME, has_checkpoint, unused_name
from fastkl.training.state import Run

NOT_THE_RUNS = ("output", "resume", "fork")
"""Settings that differ between a run and its fork in any case."""


def origin(fork: str) -> Path:
    """The folder of the checkpoint that "RUN", "RUN:STEP" or "RUN:best" names. UserError where there is none."""
    run, _, step = fork.rpartition(":")
    named = bool(run) and (step.isdigit() or step == "best")
    try:
        return checkpoint.checkpoint_folder(Path(run if named else fork).expanduser(), step if named else "")
    except UserError as mistake:
        raise UserError(f"fork: {mistake}") from None


def settings_of(folder: Path) -> TrainConfig:
    """The settings that the checkpoint in `folder` was trained with, for a fork beside its run, from this step."""
    run = folder.parents[1]
    step = folder.name.removeprefix("step-")
    return replace(recorded(folder), output=str(unused_name(run)), fork=f"{run}:{step}", resume=False)


def recorded(folder: Path) -> TrainConfig:
    """The settings that a checkpoint holds. UserError where it does not."""
    try:
        return with_settings(TrainConfig(), dict(map(renamed, read_manifest(folder)["config"].items())))
    except UserError as mistake:
        raise UserError(f"fork: {str(mistake).removeprefix('resume: ')}") from mistake


def forked(config: TrainConfig, folder: Path) -> checkpoint.Checkpoint | None:
    """What the run in `folder` begins from, if it is a fork that has no checkpoint of its own yet."""
    if not config.fork or has_checkpoint(folder):
        return None
    saved = checkpoint.open_checkpoint(origin(config.fork))
    if saved.step >= config.steps:
        raise UserError(
            f"fork: {str(saved.folder)!r} is after step {saved.step}, and the fork ends at --steps {config.steps}; "
            "give more steps, or an earlier step of the run (RUN:STEP)."
        )
    return saved


def copy_lines(saved: checkpoint.Checkpoint, folder: Path) -> None:
    """The logs of the run that is forked; RunLog then drops what comes after the step."""
    for name in (*LOG_FILES, EVALUATIONS):
        source, target = saved.folder.parents[1] / f"{name}.jsonl", folder / f"{name}.jsonl"
        if source.is_file():
            shutil.copyfile(source, target.with_suffix(".partial"))
            os.replace(target.with_suffix(".partial"), target)


def begin(run: Run, saved: checkpoint.Checkpoint) -> None:
    """Continues in a folder of its own where `saved` ended, and says what is different from here on."""
    before = recorded(saved.folder)
    changed = {
        name: (old, getattr(run.config, name))
        for name, old in asdict(before).items()
        if name not in NOT_THE_RUNS and old != getattr(run.config, name)
    }
    state = dict(saved.manifest["state"])
    if {"prompts", "seed"} & changed.keys():
        state["prompts"] = run.prompts.state()  # another data set, or another order: from its beginning
    if {"kl_coef", "kl_target"} & changed.keys():
        state["kl_coef"] = run.config.kl_coef
    if changed.keys() - set(MAY_CHANGE_ON_RESUME):
        state.pop("ahead", None)  # other settings draw other completions
    resume(run, replace(saved, manifest=saved.manifest | {"state": state}), own=False)
    told = ", ".join(f"{name} {old!r} -> {new!r}" for name, (old, new) in changed.items())
    run.view.note(f"forked from {saved.folder}; " + (f"changed: {told}" if told else "all settings as they were"))
