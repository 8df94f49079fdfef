"""The small runs that faults are injected into: started by a fork of this process, which has everything imported
already, and compared file by file with a run that nothing has happened to.

The job is chosen so that all state counts: a reward that draws random numbers, a steered KL coefficient, a reference
that is renewed on the way.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

STEPS = 8
WORK = (
    *("--steps", str(STEPS), "--prompts-per-step", "2", "--num-samples", "4", "--max-new-tokens", "16"),
    *("--device", "cpu", "--dtype", "float32", "--kl-target", "0.5"),
    *("--reference-every", "3", "--reference-share", "0.5"),
    *("--reward", "alliteration", f"{Path(__file__).with_name('reward.py')}:noisy_length"),
)
JOB = (*WORK, "--generator", "transformers")
NOT_REPRODUCIBLE = ("time/", "throughput/", "memory/")
TENSOR_FILES = ("model.safetensors", "trainer.safetensors", "reference.safetensors")
MAX_RUN_S = 300


def import_everything() -> None:
    """What a run imports and first computes in Python alone, so that a fork need not do it again. torch computes
    nothing: a fork keeps no threads."""
    import torch
    import torch.utils.tensorboard
    import transformers
    from transformers import conversion_mapping
    from transformers.models.llama import modeling_llama

    import fastkl.cli.commands
    import fastkl.evaluation.plan
    import fastkl.rollout.server
    import fastkl.training.loop
    from fastkl.report.page.write import template
    from fastkl.storyteller.checker import well_formed_share

    assert all((transformers, modeling_llama, fastkl.cli, fastkl.training))
    torch.set_num_threads(1)
    well_formed_share(["Once there was a king."])
    template()
    conversion_mapping.get_checkpoint_conversion_mapping("llama")
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # or Triton's bindings complain at the end


@dataclass(slots=True)
class Child:
    """A run under way in a process of its own."""

    pid: int
    output: int  # the reading end of the pipe that its standard output and standard error go to
    said: Path  # where what it said is kept
    started: float = field(default_factory=time.monotonic)
    code: int | None = None  # as subprocess has it: minus the signal's number where one ended it
    text: str = ""  # what it has said, once it has ended

    def wait(self, seconds: float = MAX_RUN_S) -> bool:
        """Waits until it has ended or `seconds` have passed; whether it has ended."""
        if self.code is None:
            descriptor = os.pidfd_open(self.pid)
            try:
                ended, *_ = select.select([descriptor], [], [], max(0.0, seconds))
            finally:
                os.close(descriptor)
            if ended:
                self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
                self._read()
        return self.code is not None

    def _read(self) -> None:
        """All that fits into a pipe, 64 KiB; a file would be subject to the limits and disks that are tried here."""
        os.set_blocking(self.output, False)
        with suppress(BlockingIOError), os.fdopen(self.output, "rb", buffering=0) as pipe:
            self.text = (pipe.read(1 << 16) or b"").decode(errors="replace")
        with self.said.open("a") as file:
            file.write(f"[{self.code}]\n{self.text}")

    def until(self, moment_s: float) -> bool:
        """Waits until `moment_s` after its start; whether it has ended before."""
        return self.wait(self.started + moment_s - time.monotonic())

    def send(self, number: int) -> None:
        """Sends it a signal if it has not ended."""
        if self.code is None:
            os.kill(self.pid, number)


def train(output: Path, *more: str, before: Callable[[], None] = lambda: None, job: Sequence[str] = JOB) -> Child:
    """Starts `fastkl train` with the job in a fork. before: called there first."""
    read, write = os.pipe()
    arguments = ["train", *job, "--output", str(output), *more]
    sys.stdout.flush()
    if (pid := os.fork()) == 0:
        code = 70
        try:
            os.close(read), os.dup2(write, 1), os.dup2(write, 2)
            before()
            from fastkl.cli import main

            code = main(arguments)
            from fastkl.distributed.start import launched

            launched().close()
        except SystemExit as ending:
            code = int(ending.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            with suppress(BaseException):
                sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    os.close(write)
    return Child(pid, read, output.with_name(f"{output.name}.txt"))


def finished(
    output: Path,
    *more: str,
    before: Callable[[], None] = lambda: None,
    job: Sequence[str] = JOB,
    seconds: float = MAX_RUN_S,
) -> Child:
    """The same, ended. Killed, with the code -9, if it takes longer than a run may."""
    child = train(output, *more, before=before, job=job)
    if not child.wait(seconds):
        child.send(signal.SIGKILL)
        child.wait()
    return child


def in_fork(action: Callable[[], str]) -> str:
    """What action() returns in a process of its own: this one computes nothing, since a fork keeps no threads."""
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        answer = "it failed"
        try:
            answer = action()
        except BaseException as failure:
            answer = f"{type(failure).__name__}: {failure}"
        finally:
            os.write(write, answer[:60_000].encode())
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        answer = pipe.read()
    os.waitpid(pid, 0)
    return answer


def gone_on(output: Path, *more: str) -> Child:
    """Ends a run as a person would: --resume, and where there is nothing to resume, the same command without it."""
    child = finished(output, *more, "--resume")
    if child.code == 2 and "start without --resume" in child.text:
        child = finished(output, *more)
    return child


def steps_logged(output: Path) -> int:
    """How many steps metrics.jsonl holds."""
    path = output / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def last_checkpoint(output: Path) -> Path:
    """That of the last step."""
    return output / "checkpoints" / f"step-{STEPS}"


def differences(ours: Path, whole: Path) -> list[str]:
    """In what a run differs from one that nothing has happened to: logs, weights, moments, random states, counters."""
    found = []
    if not (last_checkpoint(ours) / "checkpoint.json").is_file():
        return [f"{ours.name} has no checkpoint of step {STEPS}"]
    if _metrics(ours) != _metrics(whole):
        found.append("metrics.jsonl")
    names = ("samples.jsonl", *(f"checkpoints/step-{STEPS}/{name}" for name in TENSOR_FILES))
    found += [name for name in names if (ours / name).read_bytes() != (whole / name).read_bytes()]
    if _state(ours) != _state(whole):
        found.append("the state in checkpoint.json")
    return found


def _metrics(run: Path) -> list[dict[str, object]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(NOT_REPRODUCIBLE)} for row in rows]


def _state(run: Path) -> dict[str, object]:
    """What the last checkpoint says, but for where the run lies and the times in its logs."""
    manifest = json.loads((last_checkpoint(run) / "checkpoint.json").read_text())
    state = {key: value for key, value in manifest["state"].items() if key != "logs"}
    return {"step": manifest["step"], "random": manifest["random"], "state": state}


def damaged_beyond_one_line(child: Child, codes: Sequence[int]) -> list[str]:
    """What is wrong with how a process ended: a traceback, an exit code that is none of these."""
    found = ["a traceback"] if "Traceback (most recent call last)" in child.text else []
    return found + ([] if child.code in codes else [f"exit code {child.code}"])
