"""Resuming: a run goes on where its checkpoint was taken, and says what is no longer as it was."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from fastkl.audit.json_lines import rows_of_steps
from fastkl.config.settings import TrainConfig
from fastkl.errors import UserError
from fastkl.evaluation.evaluate import Evaluator
from fastkl.rollout.ahead import Ahead, Rollout
from fastkl.scoring.unread import first_rows, is_unread
from fastkl.training import checkpoint
from fastkl.training.given import source_of
from fastkl.training.state import Run, Snapshot
from fastkl.types import Prompt


def resume(run: Run, saved: checkpoint.Checkpoint, *, own: bool = True) -> None:
    """Continues where `saved` ended: optimizer, random states, prompt position, counters. own: it is this run's."""
    if (kept := saved.manifest["config"].get("optimizer", "adamw")) != run.config.optimizer:
        raise UserError(f"optimizer: the moments in {str(saved.folder)!r} are those of {kept}; go on with that.")
    checkpoint.restore_training_state(saved, run.policy.model, run.optimizer, run.world.rank)
    state = saved.manifest["state"]
    if own and run.world.is_first:
        checkpoint.set_aside_newer(saved)
    run.prompts.load_state(state["prompts"])
    run.controller.coef = state.get("kl_coef", run.config.kl_coef)
    renewed = run.config.reference_every if own else (saved.folder / checkpoint.REFERENCE).is_file()
    if run.reference and renewed:
        checkpoint.restore_reference(saved, run.reference.model)
    run.saved_step = saved.step if own else 0
    gaps = state.get("first_gaps", {})
    run.completed = Snapshot(
        step=saved.step,
        prompts=state["prompts"],
        skipped_steps=state["skipped_steps"],
        tokens_generated=state["tokens_generated"],
        kl_coef=run.controller.coef,
        first_gaps=tuple(gaps["nats"]) if gaps.get("between") == run.both_sides else (),
    )
    if run.ahead and "ahead" in state:
        go_on_ahead(run, saved, run.ahead)
    if run.best and own:
        run.best.load_state(state.get("best", {}))
        is_lost = run.world.is_first and run.best.step == saved.step and not run.best.is_kept(saved.folder.parent)
        if is_lost:  # killed in between
            run.best.keep(saved.folder.parent)
    if own:
        note = f" ({saved.note})" if saved.note else ""
        run.view.note(f"continuing after step {saved.step} from {saved.folder}{note}")
    if changed := [name for name, value in state.get("inputs", {}).items() if run.inputs.get(name, value) != value]:
        run.view.note(
            f"changed since the run was started: {', '.join(changed)}; training goes on with what is there now"
        )
    run.view.recall(rows_of_steps(run.folder / "metrics.jsonl", []))
    if lost := lost_lines(run.folder / "metrics.jsonl", saved.step):
        run.view.note(f"metrics.jsonl lacks the lines of {lost}; training itself goes on from where it was.")
    claimed = state.get("logs", {})
    for name, digest in run.log.digests().items():
        if claimed.get(name, digest) != digest and not (lost and name == "metrics.jsonl"):
            run.view.note(f"{name} has lost, damaged or edited lines; training itself goes on from where it was.")


def go_on_ahead(run: Run, saved: checkpoint.Checkpoint, ahead: Ahead) -> None:
    """Takes over the completions that had been drawn for the next step, with their prompts, if these are the same."""
    from safetensors.torch import load_file

    tensors, words = load_file(saved.folder / checkpoint.AHEAD), saved.manifest["state"]["ahead"]
    position = run.prompts.state()
    prompts = run.prompts.take(run.config.prompts_per_step)
    ahead.rollout = Rollout.restored(words, tensors, prompts, position)
    if ahead.rollout is None:
        run.prompts.load_state(position)
        run.view.note(f"the prompts of step {saved.step + 1} have changed: its completions are drawn again")


def fingerprints(
    config: TrainConfig,
    prompts: Sequence[Prompt],
    reference: bytes | None,
    evaluator: Evaluator | None = None,
    functions: Iterable[Any] = (),
) -> dict[str, str]:
    """Hashes of what a run reads from outside: a resumed run says which of them have changed.

    functions: rewards that were handed over from Python. reference: the `first_numbers` of one, if there is one.
    """

    def digest(pieces: Iterable[bytes]) -> str:
        hashed = hashlib.blake2b(digest_size=16)
        for piece in pieces:
            hashed.update(piece)
        return hashed.hexdigest()

    found = {
        "prompts": digest(repr((prompt.token_ids, dict(prompt.columns))).encode() for prompt in prompts),
    }
    if reference is not None:
        found["reference"] = digest([reference])
    found |= {f"reward {name}": digest([source]) for name, source in source_of(functions).items()}
    if evaluator:
        found["eval_prompts"] = digest(repr((p.token_ids, dict(p.columns))).encode() for p in evaluator.prompts)
        found["eval_text"] = digest(repr(window).encode() for window in evaluator.text)
    for name in (*config.reward, *config.eval_reward):
        file = Path(name.rpartition(":")[0]).expanduser()
        if file.suffix == ".py" and file.is_file():
            found[f"reward {name}"] = digest([file.read_bytes()])
    return found


def first_numbers(model: nn.Module, source: str) -> bytes:
    """The first 256 numbers of every tensor of a model without adapters, read from its source if it is unread: another
    training changes them all."""
    own = (parameter.detach().flatten()[:256] for parameter in model.parameters())
    return b"".join(x.cpu().numpy().tobytes() for x in (first_rows(model, source, 256) if is_unread(model) else own))


def lost_lines(path: Path, last_step: int) -> str:
    """The steps up to `last_step` that have no line in metrics.jsonl, in words; empty if all have one."""
    logged = set()
    for line in path.read_bytes().split(b"\n") if path.is_file() else ():
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
            logged.add(json.loads(line)["step"])
    missing = [step for step in range(1, last_step + 1) if step not in logged]
    more = f" and {len(missing) - 5} more steps" if len(missing) > 5 else ""
    return f"step {', '.join(map(str, missing[:5]))}{more}" if missing else ""
