"""`fastkl export`: a checkpoint's model as a folder of its own, which from_pretrained and any server load.

In: a run folder and a step. Out: a new folder with model, tokenizer and a model card, without the trainer's state. It
is written under another name and renamed last, so it is whole or not there.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from fastkl.errors import UserError
from fastkl.training import checkpoint
from fastkl.version import __version__

OF_THE_TRAINER = (checkpoint.MANIFEST, checkpoint.TENSORS, checkpoint.REFERENCE)
"""Files of a checkpoint that are no part of the model."""


def export(run: Path, output: Path, step: str = "") -> Path:
    """Writes `output` from the run's checkpoint of `step`: a number, "best", or the newest. UserError where the run has
    no such checkpoint, a file of it is damaged, or `output` exists."""
    if output.exists():
        raise UserError(f"output: {str(output)!r} exists already; choose another --output.")
    found = checkpoint.open_checkpoint(checkpoint.checkpoint_folder(run, step))
    scratch = output.with_name(f".{output.name}.partial")
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        for name in (name for name in found.manifest["files"] if name not in OF_THE_TRAINER):
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(found.folder / name, scratch / name)
        (scratch / "README.md").write_text(model_card(output.name, found.step, found.manifest["config"]))
        checkpoint.flush_folder(scratch)
        os.rename(scratch, output)
    except OSError as failure:
        shutil.rmtree(scratch, ignore_errors=True)
        reason = failure.strerror or failure
        raise UserError(f"output: {str(output)!r} cannot be written ({reason}); choose another --output.") from failure
    return output


def model_card(name: str, step: int, config: dict[str, Any]) -> str:
    """What the model is, and how it came about."""
    said = ("model", "prompts", "reward", "kl_coef", "lr", "steps", "seed")
    lines = [f"* {name}: `{config[name]}`" for name in said if name in config]
    return "\n".join(
        [
            "---", "library_name: transformers", "tags: [fastkl, rloo]", "---",
            f"# {name}", "",
            f"Trained with fastkl {__version__}: RLOO with a KL penalty, the model after step {step}.", "",
            *lines, "",
        ]
    )  # fmt: skip


def push(folder: Path, name: str) -> str:
    """Uploads the folder to the hub as model `name`, which is made, private, if it is not there; returns its address.
    UserError for whatever prevents it."""
    from huggingface_hub import HfApi

    try:
        hub = HfApi(library_name="fastkl", library_version=__version__)
        address = hub.create_repo(name, private=True, exist_ok=True)
        hub.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload by fastkl export")
    except Exception as failure:  # no network, no token, a name that is none: the library has an error for each
        reason = " ".join(str(failure).split())[:300] or type(failure).__name__
        raise UserError(
            f"push_to_hub: {name!r} could not be uploaded ({reason}); the model lies in {str(folder)!r}, and "
            f"`hf upload {name} {folder}` tries again."
        ) from failure
    return str(address)
