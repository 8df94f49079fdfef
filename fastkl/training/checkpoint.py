"""Checkpoints: a folder that is either whole or not there.

checkpoints/step-N/ holds the policy and its tokenizer in Hugging Face format (from_pretrained loads it), the
optimizer's moments and torch's random state as safetensors (trainer.safetensors), the reference where the run renews it
(reference.safetensors), the next step's completions where they were drawn ahead (ahead.safetensors), and
checkpoint.json: step, prompt position, Python's and NumPy's random states, the run's settings, and size and hash of
every other file. Nothing is pickled. checkpoints/best/ is one of them by another name.

It is written under another name, flushed to disk, and renamed last: a kill at any moment leaves the last good one.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from fastkl.errors import UserError
from fastkl.scoring.pieces import piece_for
from fastkl.training.manifest import FORMAT, MANIFEST, REMEDY, checksum, read_manifest
from fastkl.training.whole_state import WholeState

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TENSORS = "trainer.safetensors"


REFERENCE = "reference.safetensors"
AHEAD = "ahead.safetensors"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint on disk whose files have been verified."""

    folder: Path
    step: int
    manifest: dict[str, Any]
    note: str = ""  # what is wrong with newer ones


def save_checkpoint(
    root: Path,
    step: int,
    *,
    policy: PreTrainedModel,
    tokenizer: Any,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    random: RandomState,
    config: Mapping[str, Any],
    keep: int,
    others: Sequence[RandomState] = (),
    state_of: WholeState | None = None,
    reference: nn.Module | None = None,
    ahead: dict[str, torch.Tensor] | None = None,
) -> Path:
    """Writes root/step-N atomically, then deletes all but the `keep` newest (0: none).

    random: the global generators at the end of the step; others: those of a run's other processes.
    state_of: the tensors, where policy, optimizer and reference have pieces of them only.
    reference: only where it changes during the run; a frozen one is the model that the run started from. ahead: the
    next step's completions, where they have been drawn. Raises what the disk or the libraries raise, of whatever type.
    """
    final, scratch = root / f"step-{step}", root / f".step-{step}.partial"
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob(".*.partial"):
        shutil.rmtree(leftover)
    try:
        policy.save_pretrained(scratch, **({"state_dict": state_of.weights} if state_of else {}))
        tokenizer.save_pretrained(scratch)
        write_index(scratch)
        moments = state_of.moments if state_of else _optimizer_tensors(policy, optimizer)
        moving = state_of.reference if state_of and reference is not None else _parameters_of(reference)
        files = {TENSORS: moments | tensors_of([random, *others]), REFERENCE: moving, AHEAD: ahead or {}}
        _save_tensors(scratch, files)
        numbers = {"step": step, "state": dict(state), "config": dict(config), "random": random.states}
        if others:
            numbers["random_of_others"] = [other.states for other in others]
        _write_manifest(scratch, numbers)
        _as_umask_asks(_files_in(scratch))
        flush_folder(scratch)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    if final.exists():
        shutil.rmtree(final)
    os.rename(scratch, final)
    _flush(root)
    if keep:
        for old in list_checkpoints(root)[:-keep]:
            shutil.rmtree(old)
    return final


def _parameters_of(model: nn.Module | None) -> dict[str, torch.Tensor]:
    """A model's parameters as they are saved; none of no model."""
    named = [] if model is None else model.named_parameters()
    return {name: parameter.detach().cpu().contiguous() for name, parameter in named}


def _save_tensors(folder: Path, files: Mapping[str, dict[str, torch.Tensor]]) -> None:
    """The tensors of each file by its name; none where there is nothing to write."""
    from safetensors.torch import save_file

    for name, tensors in files.items():
        if tensors:
            save_file(tensors, folder / name)


def _write_manifest(folder: Path, numbers: Mapping[str, Any]) -> None:
    """What is no tensor, and the fingerprint of every file that is there by now."""
    files = {path.relative_to(folder).as_posix(): _fingerprint(path) for path in _files_in(folder)}
    manifest = {"format": FORMAT, **numbers, "files": files}
    manifest["checksum"] = checksum(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))


def keep_as(saved: Path, name: str) -> Path:
    """Makes `name`, beside it, the same checkpoint as `saved`, which may be deleted later: of hard links, or of copies
    where the file system has none. What was called so before is deleted. Raises OSError.
    """
    final, scratch = saved.with_name(name), saved.with_name(f".{name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(saved, scratch, copy_function=_link_or_copy)
    if final.exists():
        shutil.rmtree(final)
    os.rename(scratch, final)
    _flush(saved.parent)
    return final


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def write_index(folder: Path) -> None:
    """Says which file holds the model: engines such as vLLM would load the trainer's tensors beside it as weights."""
    from safetensors import safe_open

    weights, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if not weights.is_file():
        return  # in several files, which have an index, or adapters alone
    with safe_open(weights, framework="pt") as file:
        where = dict.fromkeys(file.keys(), weights.name)
    index.write_text(json.dumps({"metadata": {"total_size": weights.stat().st_size}, "weight_map": where}, indent=1))


def list_checkpoints(root: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    found = [(int(p.name[5:]), p) for p in root.glob("step-*") if p.name[5:].isdigit()]
    return [path for _, path in sorted(found)]


def newest_checkpoint(root: Path) -> Checkpoint:
    """The newest checkpoint that is whole; its `note` says which newer ones are damaged.

    UserError when there is none, or none that is whole and fastkl's.
    """
    folders = list_checkpoints(root)
    if not folders:
        raise UserError(f"resume: {str(root)!r} holds no checkpoint; start the run without --resume.")
    complaints: list[UserError] = []
    for folder in reversed(folders):
        try:
            found = open_checkpoint(folder)
        except UserError as complaint:
            complaints.append(complaint)
            continue
        skipped = [str(complaint).partition("; ")[0].removeprefix("resume: ") for complaint in complaints]
        return replace(found, note="; ".join(skipped))
    raise complaints[0]


def checkpoint_folder(run: Path, step: str = "") -> Path:
    """Where the run's checkpoint of `step` (a number, "best", or empty: the newest) is. UserError where it has none."""
    root = run / "checkpoints"
    there = [folder.name.removeprefix("step-") for folder in list_checkpoints(root)]
    there += ["best"] if (root / "best").is_dir() else []
    if not there:
        raise UserError(f"{str(run)!r} holds no checkpoint; name the --output folder of a training run.")
    if step and step not in there:
        raise UserError(f"{str(run)!r} has no checkpoint {step!r}; it has {', '.join(there)}.")
    steps = list_checkpoints(root)
    return root / ("best" if step == "best" or not steps else f"step-{step}" if step else steps[-1].name)


def set_aside_newer(checkpoint: Checkpoint) -> None:
    """Renames the damaged checkpoints that are newer than this one, so that the run does not count them as its own."""
    for folder in list_checkpoints(checkpoint.folder.parent):
        if int(folder.name[5:]) > checkpoint.step:
            shutil.rmtree(folder.with_name(f"damaged-{folder.name}"), ignore_errors=True)
            folder.rename(folder.with_name(f"damaged-{folder.name}"))


def open_checkpoint(folder: Path) -> Checkpoint:
    """Verifies format, sizes and hashes of every file."""
    manifest = read_manifest(folder)
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file() or _fingerprint(path) != expected:
            raise UserError(f"resume: the checkpoint file {str(path)!r} is missing or damaged; {REMEDY}.")
    return Checkpoint(folder, int(manifest["step"]), manifest)


def restore_training_state(
    checkpoint: Checkpoint, policy: nn.Module, optimizer: torch.optim.Optimizer, rank: int = 0
) -> None:
    """Optimizer moments and every random state, exactly as saved; from_pretrained loads the policy's weights.

    The random states are those of the process of this rank. One that the run had no such process for keeps its own.
    """
    from safetensors import safe_open

    parameters = dict(policy.named_parameters())
    own_state = getattr(optimizer, "own_state", piece_for)
    others = {}
    with safe_open(checkpoint.folder / TENSORS, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118  # one at a time: a process that has pieces never has them all
            kind, _, name = key.partition("/")
            if name in parameters:
                optimizer.state[parameters[name]][kind] = own_state(parameters[name], file.get_tensor(key))
            else:
                others[key] = file.get_tensor(key)
    states = [checkpoint.manifest["random"], *checkpoint.manifest.get("random_of_others", ())]
    if rank < len(states):
        prefix = _place_of(rank)
        own = {name.removeprefix(prefix): x for name, x in others.items() if name.startswith(f"{prefix}random/")}
        _restore_random(states[rank], own)


@torch.no_grad()
def restore_reference(checkpoint: Checkpoint, reference: nn.Module) -> None:
    """The renewed reference, exactly as saved. Raises UserError where the checkpoint holds none."""
    from safetensors import safe_open

    if not (checkpoint.folder / REFERENCE).is_file():
        raise UserError(f"reference_every: {str(checkpoint.folder)!r} holds no {REFERENCE}; resume with 0.")
    with safe_open(checkpoint.folder / REFERENCE, framework="pt") as saved:
        for name, parameter in reference.named_parameters():
            parameter.copy_(piece_for(parameter, saved.get_tensor(name)))


def _optimizer_tensors(policy: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{key}/{name}": value.detach().cpu().contiguous()
        for name, parameter in policy.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


@dataclass(frozen=True, slots=True)
class RandomState:
    """Python's, NumPy's and torch's global generators at one moment."""

    states: dict[str, Any]  # JSON-able
    tensors: dict[str, torch.Tensor]

    @classmethod
    def now(cls) -> RandomState:
        """That of this moment."""
        return cls(_random_states(), _random_tensors())

    def restore(self) -> None:
        """Puts the generators back to it."""
        _restore_random(self.states, self.tensors)


def tensors_of(random: Sequence[RandomState]) -> dict[str, torch.Tensor]:
    """The tensors of every process's generators; those of the first one have no prefix."""
    return {f"{_place_of(rank)}{name}": x for rank, state in enumerate(random) for name, x in state.tensors.items()}


def _place_of(rank: int) -> str:
    return f"process-{rank}/" if rank else ""


def _random_tensors() -> dict[str, torch.Tensor]:
    states = {"random/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"random/cuda-{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def _random_states() -> dict[str, Any]:
    version, internal, gauss = random.getstate()
    state: Any = np.random.get_state()
    name, keys, position, has_gauss, cached = state
    numpy_state = [name, keys.tolist(), position, has_gauss, cached]
    return {"python": [version, list(internal), gauss], "numpy": numpy_state}


def _restore_random(states: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(tensors["random/cpu"])
    cuda = [value for name, value in tensors.items() if name.startswith("random/cuda-")]
    if cuda and torch.cuda.is_available() and len(cuda) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(cuda)


def check_savable(root: Path, policy: Any, tokenizer: Any) -> str | None:
    """Saves what surrounds the weights once, before the first step: what transformers will not write is found now.

    Returns a note where that had to be repaired: a generation_config.json whose values contradict one another is
    reduced to its token ids (fastkl does not sample by it). UserError where saving fails for another reason.
    """
    from transformers import GenerationConfig

    trial, note = root / ".trial.partial", None
    root.mkdir(parents=True, exist_ok=True)
    try:
        try:
            policy.generation_config.save_pretrained(trial)
        except ValueError as failure:
            ids = {name: getattr(policy.generation_config, f"{name}_token_id", None) for name in ("bos", "eos", "pad")}
            policy.generation_config = GenerationConfig(**{f"{name}_token_id": value for name, value in ids.items()})
            reason = " ".join(str(failure).split())[:160]
            note = f"generation_config.json cannot be saved as it is ({reason}); checkpoints keep its token ids only."
        policy.save_pretrained(trial, state_dict={"none": torch.zeros(1)})
        tokenizer.save_pretrained(trial)
    except Exception as failure:  # transformers raises many types
        reason = " ".join(str(failure).split())[:200]
        raise UserError(
            f"model: its checkpoints could not be saved ({reason}); mend its configuration first."
        ) from failure
    finally:
        shutil.rmtree(trial, ignore_errors=True)
    return note


def _files_in(folder: Path) -> list[Path]:
    """All files, those in folders of the tokenizer's too."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _as_umask_asks(files: Iterable[Path]) -> None:
    """Gives files the mode of any other new file; safetensors keeps its own from everybody else."""
    umask = os.umask(0o077)
    os.umask(umask)
    for path in files:
        path.chmod(0o666 & ~umask)


def _fingerprint(path: Path) -> list[Any]:
    """[bytes, hash] of a file."""
    with open(path, "rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "blake2b").hexdigest()[:32]]


def flush_folder(folder: Path) -> None:
    """Asks the system to write everything in a folder to the disk before going on."""
    for path in (*folder.rglob("*"), folder):
        _flush(path)


def _flush(path: Path) -> None:
    """Asks the system to write a file or folder to the disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
