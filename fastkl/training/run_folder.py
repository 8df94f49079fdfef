"""The run folder: whether it is free, whether it can be resumed, and its config.yaml."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from fastkl.config.settings import TrainConfig
from fastkl.errors import UserError

MAY_CHANGE_ON_RESUME = (
    *("output", "resume", "steps", "save_every", "keep_checkpoints", "sample_every", "report_to", "device"),
    *("micro_batch_tokens", "gradient_checkpointing", "gpu_memory_utilization"),
)


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
                f"output: {str(folder)!r} holds another run; continue it with --resume, or choose another name, for "
                f"example --output {unused_name(folder)}."
            )
        return
    if not has_checkpoint(folder):
        remedy = "delete that folder to start the run anew" if holds_run(folder) else "start without --resume"
        raise UserError(f"resume: there is no checkpoint in {str(folder)!r}; {remedy}.")
    check_same_run(config, folder)


def check_same_run(config: TrainConfig, folder: Path) -> None:
    """Raises UserError if a setting that shapes the results differs from those that the run was started with."""
    from fastkl.config.files import load_config

    if not (folder / "config.yaml").is_file():
        return  # the checkpoint holds its settings too
    started = load_config(folder / "config.yaml")
    for name in (field.name for field in fields(config) if field.name not in MAY_CHANGE_ON_RESUME):
        before, now = getattr(started, name), getattr(config, name)
        if before != now:
            raise UserError(
                f"{name}: {now!r}, but the run in {str(folder)!r} was started with {before!r}; resume with that, or "
                "start a new run with another --output."
            )


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
