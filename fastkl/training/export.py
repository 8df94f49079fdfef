"""`fastkl export`: a checkpoint's model as a folder of its own, which from_pretrained and any server load.

In: a run folder and a step. Out: a new folder with model, tokenizer and a model card, without the trainer's state. Of a
run with adapters these are the adapters, in PEFT's format, or, merged, a model without any. It is written under another
name and renamed last, so it is whole or not there.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from fastkl.errors import UserError
from fastkl.scoring import models
from fastkl.scoring.adapters import CONFIG, WEIGHTS, add_adapters, load_adapters, merged
from fastkl.training import checkpoint
from fastkl.version import __version__

OF_THE_TRAINER = (checkpoint.MANIFEST, checkpoint.TENSORS, checkpoint.REFERENCE)
"""Files of a checkpoint that are no part of the model."""

OF_ADAPTERS = (CONFIG, WEIGHTS)


def export(run: Path, output: Path, step: str = "", *, merge: bool = False) -> Path:
    """Writes `output` from the run's checkpoint of `step`: a number, "best", or the newest. UserError where the run has
    no such checkpoint, a file of it is damaged, or `output` exists.

    merge: adds adapters to the weights that they adapt, in float32, and rounds once to the base model's own dtype.
    """
    if output.exists():
        raise UserError(f"output: {str(output)!r} exists already; choose another --output.")
    found = checkpoint.open_checkpoint(checkpoint.checkpoint_folder(run, step))
    if merge and WEIGHTS not in found.manifest["files"]:
        raise UserError(f"merge: {str(found.folder)!r} has no adapters to merge; leave --merge out.")
    scratch = output.with_name(f".{output.name}.partial")
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        left_out = (*OF_THE_TRAINER, *(OF_ADAPTERS if merge else ()))
        for name in (name for name in found.manifest["files"] if name not in left_out):
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(found.folder / name, scratch / name)
        if merge:
            merged_model(found).save_pretrained(scratch)
        (scratch / "README.md").write_text(model_card(output.name, found.step, found.manifest["config"]))
        checkpoint.flush_folder(scratch)
        os.rename(scratch, output)
    except OSError as failure:
        shutil.rmtree(scratch, ignore_errors=True)
        reason = failure.strerror or failure
        raise UserError(f"output: {str(output)!r} cannot be written ({reason}); choose another --output.") from failure
    return output


def merged_model(found: checkpoint.Checkpoint) -> Any:
    """The base model with the checkpoint's adapters added to its weights."""
    settings = found.manifest["config"]
    source = models.resolve_model(settings["model"])
    adapted, plain = (models.load_model(source, torch.device("cpu")) for _ in range(2))
    add_adapters(adapted, settings["lora_rank"], settings["lora_alpha"], settings["lora_targets"], settings["seed"])
    load_adapters(found.folder, adapted)
    plain.load_state_dict(dict(merged(adapted)), strict=False)  # a tied head has one name of its two
    return plain.to(getattr(models.load_config(source), "dtype", None) or torch.float32)


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
