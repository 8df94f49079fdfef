"""Files that change behind a run's back: flipped bits, cut, emptied and deleted files.

A flip is told from its effect: `--resume` must refuse or name what has changed, or read exactly what it would have read
without the flip. The functions asked here are those that a resumed run asks; a file that is cut, emptied or deleted is
resumed from for real.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

from tools.faults import runs
from tools.faults.fault import Bench, Row

INTERRUPTED_AT = 6  # the newest checkpoint of the runs that are resumed; there is an older one
LOGS = ("metrics.jsonl", "samples.jsonl")
Verdict = Callable[[bytes], str]  # of the flipped file's content: "found", "no effect", or what it changes


def interrupted(whole: Path, output: Path) -> Path:
    """A run that was killed in step 8: a copy of the whole one, without its last checkpoint."""

    def linked_or_copied(source: str, target: str) -> None:
        (os.link if "checkpoints" in source else shutil.copy2)(source, target)

    shutil.copytree(whole, output, copy_function=linked_or_copied)
    shutil.rmtree(runs.last_checkpoint(output))
    return output


def small_model(folder: Path) -> None:
    """A Llama of 100,000 parameters with the embedded tokenizer: opening its checkpoints takes no time."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from fastkl.storyteller import model_path

    tokenizer = AutoTokenizer.from_pretrained(model_path())
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **sizes, **special)
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write(path: Path, content: bytes) -> None:
    """Gives a file other content, and leaves the copies that are linked to it as they are."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


# ------------------------------------------------------------------------------------------------------------- flips


def flips(bench: Bench) -> Iterator[Row]:
    """A random bit of a random byte, 3,000 times in each kind of file that a run of a small model leaves."""
    model, whole = bench.folder / "small-model", bench.folder / "whole-small"
    saved = ("--save-every", "2", "--keep-checkpoints", "0")
    child = runs.finished(whole, "--model", str(model), *saved, before=lambda: small_model(model))
    if child.code:
        raise SystemExit(f"faults: a run without a fault failed:\n{child.text}")
    output = interrupted(whole, bench.output("flips", 0))
    newest = output / "checkpoints" / f"step-{INTERRUPTED_AT}"
    small = sorted(p.name for p in newest.iterdir() if p.name not in (*runs.TENSOR_FILES, "checkpoint.json"))
    kinds = [
        ("checkpoint.json", [newest / "checkpoint.json"], opened),
        *((name, [newest / name], opened) for name in runs.TENSOR_FILES),
        ("the checkpoint's other files", [newest / name for name in small], opened),
        ("config.yaml beside a checkpoint", [output / "config.yaml"], settings_of_resumed),
        ("config.yaml before the first checkpoint", [output / "config.yaml"], settings_of_anew),
        *((name, [output / name], log_of_resumed) for name in LOGS),
    ]
    for name, files, verdict in kinds:
        yield flipped(bench, name, files, verdict)
    bench.clear(output)


def flipped(bench: Bench, name: str, files: list[Path], verdict: Callable[[Path], Verdict]) -> Row:
    """The row of one kind of file."""
    row = Row(f"a flipped bit in {name}", "a random bit; what --resume makes of the file")
    wholes = {path: path.read_bytes() for path in files}
    judges = {path: verdict(path) for path in files}
    found = 0
    for trial in bench.trials(bench.times(3000, 15)):
        rng = bench.random(f"flip in {name}", trial)
        path = rng.choice(files)
        content, where, bit = bytearray(wholes[path]), rng.randrange(len(wholes[path])), rng.randrange(8)
        content[where] ^= 1 << bit
        try:
            said = judges[path](bytes(content))
        except Exception as failure:
            said = f"{type(failure).__name__}: {failure}"
        row.runs += 1
        found += said == "found"
        row.failed(trial, f"byte {where}, bit {bit} of {path.name}", [] if said in ("found", "no effect") else [said])
    for path, content in wholes.items():
        write(path, content)
    row.outcome = f"{found} found, {row.runs - found - len(row.failures)} change nothing that is read"
    return row


def opened(path: Path) -> Verdict:
    """A checkpoint's file: opening the checkpoint refuses it, or gives the same manifest over the same files; and a run
    that goes on has the settings that it had.
    """
    from fastkl.errors import UserError
    from fastkl.training.checkpoint import open_checkpoint
    from fastkl.training.run_folder import started_with

    expected = open_checkpoint(path.parent).manifest
    run = path.parents[2]
    settings = started_with(run)
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(whole)  # a file of its own

    def verdict(content: bytes) -> str:
        where = next(i for i, (a, b) in enumerate(zip(content, whole, strict=True)) if a != b)
        with path.open("r+b") as file:
            file.seek(where), file.write(content[where : where + 1])
        try:
            if path.name == "checkpoint.json" and started_with(run) != settings:
                return "other settings"
            manifest = open_checkpoint(path.parent).manifest
        except UserError as refused:
            return "found" if path.parent.name in str(refused) else f"a message without the folder: {refused}"
        finally:
            with path.open("r+b") as file:
                file.seek(where), file.write(whole[where : where + 1])
        same = manifest == expected and path.name == "checkpoint.json"
        return "no effect" if same else "the checkpoint is opened"

    return verdict


def settings_of_resumed(path: Path) -> Verdict:
    """config.yaml beside a checkpoint, whose own settings decide: nothing may change. The report must not stumble."""
    from fastkl.audit.doctor import read_config
    from fastkl.training.run_folder import started_with

    expected = started_with(path.parent)

    def verdict(content: bytes) -> str:
        path.write_bytes(content)
        read_config(path)
        return "no effect" if started_with(path.parent) == expected else "other settings"

    return verdict


def settings_of_anew(path: Path) -> Verdict:
    """config.yaml of a run that was killed before its first checkpoint: it is refused, or says what it said."""
    from fastkl.errors import UserError
    from fastkl.training.run_folder import started_with

    alone = path.parent.with_name("config-alone")
    alone.mkdir(exist_ok=True)
    write(alone / "config.yaml", path.read_bytes())
    expected = started_with(alone)

    def verdict(content: bytes) -> str:
        (alone / "config.yaml").write_bytes(content)
        try:
            now = started_with(alone)
        except UserError:
            return "found"
        return "no effect" if now == expected else "other settings"

    return verdict


def log_of_resumed(path: Path) -> Verdict:
    """A log: the lines up to the checkpoint are as they were, or the checkpoint knows that they are not."""
    import json

    from fastkl.report.loggers import drop_later_steps
    from fastkl.training.resume import lost_lines

    manifest = json.loads((path.parent / "checkpoints" / f"step-{INTERRUPTED_AT}" / "checkpoint.json").read_text())
    claimed = manifest["state"]["logs"][path.name]
    copy = path.with_name(f"{path.name}.flipped")
    lines = path.read_bytes().splitlines(keepends=True)
    kept = b"".join(line for line in lines if json.loads(line)["step"] <= INTERRUPTED_AT)

    def verdict(content: bytes) -> str:
        copy.write_bytes(content)
        digest = drop_later_steps(copy, INTERRUPTED_AT).hexdigest()
        lost_lines(copy, INTERRUPTED_AT)
        if copy.read_bytes() == kept:
            return "no effect" if digest == claimed else "whole lines are called damaged"
        return "found" if digest != claimed else "other lines are kept"

    return verdict


# ---------------------------------------------------------------------------------------- cut, emptied, deleted files

CHANGES: dict[str, Callable[[bytes, Random], bytes | None]] = {
    "cut": lambda content, rng: content[: rng.randrange(1, len(content))],
    "emptied": lambda content, rng: b"",
    "deleted": lambda content, rng: None,
}


def changed_files(bench: Bench) -> Iterator[Row]:
    """Each file of an interrupted run is cut, emptied and deleted, and the run is resumed for real."""
    names = sorted(
        p.relative_to(bench.whole).as_posix()
        for p in bench.whole.rglob("*")
        if p.is_file() and (p.parent == bench.whole or p.parent.name == f"step-{INTERRUPTED_AT}")
    )
    names = names if not bench.quick else [names[0]]
    for change, of in CHANGES.items():
        row = Row(f"a file is {change}", "each file of an interrupted run in turn, then --resume")
        for trial, name in enumerate(names):
            if bench.trial in (None, trial):
                resumed_with(bench, row, trial, name, lambda content, rng, of=of: of(content, rng))
        row.outcome = "goes on from the checkpoint before a damaged one, names lost or changed lines; bit for bit whole"
        yield row


def resumed_with(
    bench: Bench, row: Row, trial: int, name: str, change: Callable[[bytes, Random], bytes | None]
) -> None:
    """One changed file, and the run that goes on in spite of it."""
    rng, output = bench.random(row.fault, trial), interrupted(bench.whole, bench.output(row.fault, trial))
    content = change((output / name).read_bytes(), rng)
    (output / name).unlink()
    if content is not None:
        (output / name).write_bytes(content)
    child = runs.finished(output, "--keep-checkpoints", "0", "--resume")
    row.runs += 1
    text = " ".join(child.text.split())
    wrong = runs.damaged_beyond_one_line(child, (0,))
    if not wrong:
        differ = runs.differences(output, bench.whole)
        named = [log for log in LOGS if f"{log} " in text]
        wrong += [log for log in differ if log not in named]
        if "checkpoints" in name and "continuing after step 4" not in text:
            wrong.append("it does not go on from the checkpoint before")
        if name in LOGS and name not in named:
            wrong.append("nothing is said of the log")
    row.failed(trial, f"{name}, {len(content or b'')} bytes left", wrong)
    if not wrong:
        bench.clear(output)


def both_damaged(bench: Bench) -> Row:
    """No checkpoint is whole: one sentence, and nothing is touched."""
    row = Row("every checkpoint is damaged", "a byte of each one's weights, then --resume")
    for trial in bench.trials(bench.times(4, 1)):
        rng, output = bench.random("both", trial), interrupted(bench.whole, bench.output("both", trial))
        for folder in (output / "checkpoints").iterdir():
            path = folder / rng.choice(runs.TENSOR_FILES)
            content = bytearray(path.read_bytes())
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            write(path, bytes(content))
        before = {path.name for path in (output / "checkpoints").iterdir()}
        child = runs.finished(output, "--resume")
        row.runs += 1
        wrong = runs.damaged_beyond_one_line(child, (2,))
        wrong += [] if child.text.count("\n") == 1 else ["more than one line"]
        wrong += [] if {path.name for path in (output / "checkpoints").iterdir()} == before else ["folders changed"]
        row.failed(trial, "all checkpoints", wrong)
        if not wrong:
            bench.clear(output)
    row.outcome = "refused in one sentence (2) that names the newest and what to do"
    return row
