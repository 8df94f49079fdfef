"""The run folder: whether it is free, whether it can be resumed, and its config.yaml."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
from dataclasses import fields
from pathlib import Path
from typing import TextIO

from fastkl.config.defaults import resolved
from fastkl.config.settings import TrainConfig
from fastkl.errors import UserError
from fastkl.training.manifest import read_manifest

STARTED_BY = "FASTKL_STARTED_BY"
"""The environment variable that the Makefile sets."""

MAY_CHANGE_ON_RESUME = (
    *("output", "resume", "steps", "save_every", "keep_checkpoints", "sample_every", "report_to", "device"),
    *("micro_batch_tokens", "gradient_checkpointing", "compile", "shard", "gpu_memory_utilization", "engine_sleep"),
    *("engine_tp", "engines", "engine_weights"),
    *("eval_every", "best"),
)


def command_with(options: str) -> str:
    """The command to type, for someone who may have started this through make."""
    return f'make train ARGS="{options}"' if os.environ.get(STARTED_BY) == "make" else f"fastkl train {options}"


def way_on(output: str | Path) -> str:
    """What to type to go on with the run in `output`."""
    return command_with(f"--output {shlex.quote(str(output))} --resume")


def has_checkpoint(folder: Path) -> bool:
    """Whether `folder` is a run folder that can be resumed."""
    return any(path.is_dir() for path in (folder / "checkpoints").glob("step-*"))


def holds_run(folder: Path) -> bool:
    """Whether a run has left results in `folder`; settings alone (a run that failed at the start) do not count."""
    metrics = folder / "metrics.jsonl"
    return has_checkpoint(folder) or (metrics.is_file() and metrics.stat().st_size > 0)


def check_run_folder(config: TrainConfig) -> None:
    """Raises UserError if `output` is no folder, holds another run, or cannot be resumed although `resume` asks so."""
    folder = Path(config.output).expanduser()
    blocking = next((path for path in (folder, *folder.parents) if path.exists() and not path.is_dir()), None)
    if blocking:
        raise UserError(f"output: {str(blocking)!r} is a file, not a folder; choose another --output.")
    if not config.resume:
        if holds_run(folder):
            raise UserError(
                f"output: {str(folder)!r} holds another run; continue it with `{way_on(config.output)}`, or choose "
                f"another name, for example `{command_with(f'--output {shlex.quote(str(unused_name(folder)))}')}`."
            )
        return
    if not has_checkpoint(folder) and not (folder / "config.yaml").is_file():
        if holds_run(folder):
            raise UserError(
                f"resume: {str(folder)!r} holds neither a checkpoint nor config.yaml, so nothing says how its run was "
                "started; delete that folder, or choose another --output, and start without --resume."
            )
        raise UserError(f"resume: there is no checkpoint in {str(folder)!r}; start without --resume.")
    check_same_run(config, folder)


def started_with(folder: Path) -> TrainConfig | None:
    """The settings that the run in `folder` was started with; None where there is no such run.

    Those of its newest checkpoint whose manifest is whole: config.yaml is a copy for people, which may have been edited
    since. Only a run that ended before its first checkpoint has no other record, and then it must be as it was written.
    """
    from fastkl.config.files import load_own_config, renamed, with_settings

    for checkpoint in sorted((folder / "checkpoints").glob("step-*"), key=_step_of, reverse=True):
        with contextlib.suppress(UserError):
            return with_settings(TrainConfig(), dict(map(renamed, read_manifest(checkpoint)["config"].items())))
    return load_own_config(folder / "config.yaml") if (folder / "config.yaml").is_file() else None


def nothing_left(config: TrainConfig) -> str | None:
    """Why there is nothing to resume: the newest whole checkpoint is of the last step, or of a later one. None where
    steps are left, or where it is set-up's business to say what is wrong. Reads the checkpoint, and no model.
    """
    folder = Path(config.output).expanduser()
    newest = max(map(_step_of, (folder / "checkpoints").glob("step-*")), default=0)
    if not config.resume or newest < config.steps:
        return None
    from fastkl.training.checkpoint import newest_checkpoint

    output = f"--output {shlex.quote(config.output)}"
    with contextlib.suppress(UserError):
        if (step := newest_checkpoint(folder / "checkpoints").step) >= config.steps:
            return (
                f"The run in {str(folder)!r} is finished: it stands at step {step} of {config.steps}. Go on with more, "
                f"for example: {command_with(f'{output} --steps {step + max(1, step // 2)} --resume')}"
            )
    return None


def _step_of(checkpoint: Path) -> int:
    number = checkpoint.name.removeprefix("step-")
    return int(number) if number.isdigit() else -1


def check_same_run(config: TrainConfig, folder: Path) -> None:
    """Raises UserError if a setting that shapes the results differs from those that the run was started with."""
    started = started_with(folder)
    if started is None:
        return
    started, config = resolved(started), resolved(config)
    for name in (field.name for field in fields(config) if field.name not in MAY_CHANGE_ON_RESUME):
        before, now = getattr(started, name), getattr(config, name)
        if before != now:
            raise UserError(
                f"{name}: {now!r}, but the run in {str(folder)!r} was started with {before!r}; resume with that, or "
                "start a new run with another --output."
            )


def lock_run_folder(config: TrainConfig) -> TextIO:
    """Keeps other processes out of `output` as long as the returned file stays open. UserError names who has it."""
    check_run_folder(config)
    folder = Path(config.output).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a+", encoding="utf-8")  # noqa: SIM115  # open until the run ends
    except OSError as failure:
        reason = failure.strerror or failure
        raise UserError(f"output: {str(folder)!r} cannot be written ({reason}); choose another --output.") from failure
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as failure:
        file.seek(0)
        owner = file.read().strip() or "unknown"
        file.close()
        raise UserError(
            f"output: process {owner} is training in {str(folder)!r}; wait for it, or choose another --output."
        ) from failure
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def prepare_run_folder(config: TrainConfig) -> Path:
    """Checks the run folder, makes it, and writes config.yaml. Raises UserError where that cannot be done."""
    from fastkl.config.files import save_config

    check_run_folder(config)
    folder = Path(config.output).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_config(config, folder / "config.yaml")
    except OSError as failure:
        reason = failure.strerror or failure
        raise UserError(f"output: {str(folder)!r} cannot be written ({reason}); choose another --output.") from failure
    return folder


def unused_name(folder: Path) -> Path:
    """The first of folder-2, folder-3, ... that does not exist."""
    return next(path for n in range(2, 10**9) if not (path := folder.with_name(f"{folder.name}-{n}")).exists())
