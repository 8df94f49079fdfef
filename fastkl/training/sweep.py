"""The sweep: one training run for each combination of settings, one after another, then the page that compares them.

Every run is a process of its own (`fastkl train --config ITS_FOLDER/config.yaml`), so that each starts from a fresh
engine and a failure leaves the finished runs as they are. SIGINT and SIGTERM are handed to the run under way, which
finishes its step and saves; the sweep then stops.
"""

from __future__ import annotations

import ctypes
import itertools
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from fastkl.config.defaults import resolved
from fastkl.config.settings import TrainConfig, check_config, settings
from fastkl.errors import UserError, nearest
from fastkl.training.run_folder import check_run_folder, holds_run, prepare_run_folder
from fastkl.training.signals import SIGNALS

Point = Mapping[str, Any]  # one value for each setting that the sweep varies


NOT_VARIED = ("output", "resume", "fork")
"""Settings that say where a run is."""


def parse_varied(groups: Sequence[str]) -> dict[str, list[Any]]:
    """What `--vary NAME VALUE ... --vary NAME VALUE ...` asks for, given as one list: values by setting.

    A setting's name begins a group. A list's items are joined by commas. UserError for an unknown name, a value that is
    none, a setting without values or with one value twice.
    """
    varied: dict[str, list[Any]] = {}
    name = ""
    for word in groups:
        known = word.removeprefix("--").replace("-", "_")
        if known in settings() and (not name or varied[name]):
            name = known
            if name in varied or name in NOT_VARIED:
                raise UserError(f"vary: {name} {'is given twice' if name in varied else 'cannot be varied'}.")
            varied[name] = []
        elif not name:
            raise UserError(f"vary: there is no setting {word!r}.{nearest(known, settings())} Example: {EXAMPLE}")
        else:
            varied[name].append(value_of(name, word))
    for name, values in varied.items():
        if not values:
            raise UserError(f"vary: {name} has no values. Example: {EXAMPLE}")
        if len(set(values)) < len(values):
            given = " ".join(as_typed(value) for value in values)
            raise UserError(f"{name}: {given} names a value twice; give each once.")
    return varied


EXAMPLE = "--vary lr 1e-6 1e-5 --vary seed 0 1"


def value_of(name: str, word: str) -> Any:
    """The text as this setting's value."""
    setting = settings()[name]
    if setting.type is bool:
        return setting.converted({"true": True, "false": False}.get(word.lower(), word))
    return setting.converted(word.split(",") if setting.is_list else word)


def as_typed(value: Any) -> str:
    """The value as it is typed."""
    if isinstance(value, tuple):
        return ",".join(map(as_typed, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def points_of(varied: Mapping[str, Sequence[Any]]) -> list[Point]:
    """The product: every combination, the last setting changing fastest."""
    return [dict(zip(varied, values, strict=True)) for values in itertools.product(*varied.values())]


def options_of(point: Point) -> str:
    """The point as options: --lr 1e-05 --seed 0."""
    return " ".join(f"{settings()[name].option} {as_typed(value)}" for name, value in point.items())


def sweep(config: TrainConfig, varied: Mapping[str, Sequence[Any]]) -> int:
    """Runs `config` once for every combination of `varied`; OUTPUT/NAME-VALUE holds each run, OUTPUT/report.html the
    comparison.

    With `resume`, finished runs are kept, an interrupted one goes on, and the rest start. All settings and folders are
    checked before the first run. Returns the exit code: that of the run that failed, 130 when stopped by a signal.
    """
    points = points_of(varied)
    runs = [run_config(config, point) for point in points]
    folders = [Path(run.output) for run in runs]
    if len(set(folders)) < len(folders):
        raise UserError("vary: two runs would have one folder; give values that differ in more than punctuation.")
    for run in runs:
        check_config(run)
        check_run_folder(run)
    for number, (run, point) in enumerate(zip(runs, points, strict=True), start=1):
        where = f"run {number} of {len(runs)}, {options_of(point)}"
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


def run_config(config: TrainConfig, point: Point) -> TrainConfig:
    """The settings of the run at one point."""
    name = "-".join(f"{name}-{re.sub(r'[^A-Za-z0-9.,+=_-]+', '_', as_typed(value))}" for name, value in point.items())
    folder = Path(config.output).expanduser() / name[:200]
    return resolved(replace(config, **point, output=str(folder), resume=config.resume and holds_run(folder)))


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
