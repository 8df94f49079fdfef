"""The sweep: one training run for each KL coefficient, one after another, then the page that compares them.

Every run is a process of its own (`fastkl train --config ITS_FOLDER/config.yaml`), so that each starts from a fresh
engine and a failure leaves the finished runs as they are. SIGINT and SIGTERM are handed to the run under way, which
finishes its step and saves; the sweep then stops.
"""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from fastkl.config.settings import TrainConfig, check_config
from fastkl.errors import UserError
from fastkl.training.run_folder import check_run_folder, holds_run, prepare_run_folder
from fastkl.training.signals import SIGNALS


def sweep(config: TrainConfig, kl_coefs: Sequence[float]) -> int:
    """Runs `config` once for every value; OUTPUT/kl_coef-VALUE holds each run, OUTPUT/report.html the comparison.

    With `resume`, finished runs are kept, an interrupted one goes on, and the rest start. All settings and folders are
    checked before the first run. Returns the exit code: that of the run that failed, 130 when stopped by a signal.
    """
    runs = [run_config(config, kl_coef) for kl_coef in kl_coefs]
    folders = [Path(run.output) for run in runs]
    if len(set(folders)) < len(folders):
        raise UserError(f"kl_coef: {' '.join(map('{:g}'.format, kl_coefs))} names a value twice; give each once.")
    for run in runs:
        check_config(run)
        check_run_folder(run)
    for number, run in enumerate(runs, start=1):
        where = f"run {number} of {len(runs)}, --kl-coef {run.kl_coef:g}"
        if is_finished(run):
            print(f"sweep: {where}: finished before, {run.output}", flush=True)
            continue
        print(f"sweep: {where} -> {run.output}", flush=True)
        code, stopped = train_in_a_process(run)
        if code or stopped:
            print(f"sweep: stopped at {where}. Go on with the same command and --resume.", file=sys.stderr)
            return code or 130
    from fastkl.report.page.write import write_report

    print(f"sweep: {write_report(folders, Path(config.output).expanduser() / 'report.html')}")
    return 0


def run_config(config: TrainConfig, kl_coef: float) -> TrainConfig:
    """The settings of the run for one value."""
    folder = Path(config.output).expanduser() / f"kl_coef-{kl_coef:g}"
    return replace(config, kl_coef=kl_coef, output=str(folder), resume=config.resume and holds_run(folder))


def is_finished(run: TrainConfig) -> bool:
    """Whether the run to be resumed has saved its last step."""
    return run.resume and (Path(run.output) / "checkpoints" / f"step-{run.steps}").is_dir()


def train_in_a_process(run: TrainConfig) -> tuple[int, bool]:
    """(exit code of the run, whether a signal stopped it)."""
    folder = prepare_run_folder(run)
    command = [sys.executable, "-m", "fastkl", "train", "--config", str(folder / "config.yaml")]
    # A process group of its own: Ctrl-C reaches the sweep alone, which passes it on exactly once.
    child = subprocess.Popen(command + ["--resume"] * run.resume, process_group=0, preexec_fn=_end_with_parent)
    with signals_passed_to(child) as relay:
        code = child.wait()
    return (128 - code if code < 0 else code), relay.used


def _end_with_parent() -> None:
    """In the child: a sweep that is killed takes the run under way along, which saves and ends (Linux's prctl)."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


@dataclass(slots=True)
class Relay:
    """Hands signals on to a child."""

    child: subprocess.Popen[bytes]
    used: bool = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.used = True
        self.child.send_signal(number)


@contextmanager
def signals_passed_to(child: subprocess.Popen[bytes]) -> Iterator[Relay]:
    """Signals that end a run go to the child while the context lasts."""
    relay = Relay(child)
    previous = [(number, signal.signal(number, relay)) for number in SIGNALS]
    try:
        yield relay
    finally:
        for number, handler in previous:
            signal.signal(number, handler)
