"""Writes what happens in a run: metrics.jsonl, samples.jsonl, TensorBoard, and W&B or trackio where asked; besides,
eval_samples.jsonl where there are evaluations.

In: one dict of metrics and one list of sample dicts per step. Out: one JSON object per line, passed to the operating
system before `log` returns. A number that is not finite becomes null, so that every line is JSON for every reader. A
full disk or a lost connection never stops training: it is reported once, and unwritten lines are kept and tried again.
Left out: drawing (page/) and the terminal (terminal.py).
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Protocol, Self

from fastkl.errors import UserError, printable
from fastkl.report.conversation import prompt_text
from fastkl.report.metrics import markdown as metrics_page

LOG_FILES = ("metrics", "samples")  # .jsonl


EVALUATIONS = "eval_samples"  # the third, where there are any


MAX_WAITING_LINES = 20_000  # lines kept in memory while the disk refuses them; the oldest go first


TEXT_SAMPLES = 8  # completions per step sent to TensorBoard, W&B and trackio; samples.jsonl has them all


Metrics = dict[str, float | int]


Sample = dict[str, Any]


def check_report_to(report_to: Sequence[str]) -> None:
    """Raise UserError for an unknown name in `report_to` or a package that is not installed. Cheap: call it early."""
    for name in report_to:
        if name not in TRACKERS:
            raise UserError(f"report_to: unknown {name!r}; choose from {', '.join(TRACKERS)}.")
        _import_tracker(name)


class RunLog:
    """The log of one run; a context manager. Only one process of a run may hold it.

    folder: the run folder, made if it is missing. report_to: any of "tensorboard", "wandb", "trackio".
    config: the run's settings, JSON-able, shown by W&B and trackio.
    resume_step: the step whose checkpoint training continues from, -1 to start anew; later lines are dropped from the
    files, as is a half-written last one. None starts a new log, and a folder that already holds one is a UserError.
    evaluates: whether there is a third file, eval_samples.jsonl.
    """

    def __init__(
        self,
        folder: Path,
        report_to: Sequence[str],
        config: dict[str, Any],
        resume_step: int | None,
        *,
        evaluates: bool = False,
        report_problem: Callable[[str], None] | None = None,
    ) -> None:
        check_report_to(report_to)
        self._report_problem = report_problem or _print_to_stderr
        self._reported: set[str] = set()
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held = evaluates or (folder / f"{EVALUATIONS}.jsonl").exists()
            names = (*LOG_FILES, *[EVALUATIONS] * held)
            self._files = {name: _JsonLines(folder / f"{name}.jsonl", resume_step) for name in names}
        except OSError as error:
            raise UserError(f"output: cannot write in {folder} ({error.strerror}); free it or name another.") from error
        self._trackers: dict[str, Tracker] = {}
        for name in dict.fromkeys(report_to):
            self._trackers[name] = _start_tracker(name, folder, config, resume_step)

    def log(self, metrics: Metrics, samples: Iterable[Sample]) -> None:
        """Append one step. `metrics` holds "step"; every sample gets it too where it has none. Raises nothing."""
        samples = [{"step": metrics["step"], **sample} for sample in samples]
        for name, rows in (("metrics", [metrics]), ("samples", samples)):
            self._attempt(f"{name}.jsonl", self._files[name].append, rows)
        for name in list(self._trackers):
            if name == "tensorboard" and self._reported & {"metrics.jsonl", "samples.jsonl"}:
                continue  # it would fail on the same full disk, in its own thread and with a traceback
            if not self._attempt(name, self._trackers[name].log, metrics, spread(samples, TEXT_SAMPLES)):
                del self._trackers[name]  # its connection or file is broken; the JSON files go on

    def digests(self) -> dict[str, str]:
        """Of what both files hold, by name: a checkpoint records them, and a resumed run sees whether lines are lost,
        damaged or edited."""
        return {f"{name}.jsonl": file.digest.hexdigest() for name, file in self._files.items()}

    def log_evaluation(self, step: int, samples: Iterable[Sample]) -> None:
        """Append the completions of an evaluation. Raises nothing."""
        rows = [{"step": step, **sample} for sample in samples]
        self._attempt(f"{EVALUATIONS}.jsonl", self._files[EVALUATIONS].append, rows)

    def flush(self) -> None:
        """Has the system write all files to the disk. Raises nothing."""
        for name, file in self._files.items():
            self._attempt(f"{name}.jsonl", file.flush)

    def close(self) -> None:
        """Write what is still waiting and end the trackers. Raises nothing; may be called twice."""
        for name, file in self._files.items():
            self._attempt(f"{name}.jsonl", file.append, [])
        while self._trackers:
            name, tracker = self._trackers.popitem()
            self._attempt(name, tracker.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _attempt(self, name: str, action: Callable[..., None], *arguments: Any) -> bool:
        """Run `action`; whether it worked. The first failure of each `name` is reported, and so is its recovery."""
        try:
            action(*arguments)
        except Exception as error:  # of any kind: trackers may raise anything, and a failed log must not end a run
            if name not in self._reported:
                self._reported.add(name)
                self._report_problem(f"cannot log to {name}: {error}. Training goes on.")
            return False
        if name in self._reported:
            self._reported.remove(name)
            self._report_problem(f"logging to {name} works again.")
        return True


class _JsonLines:
    """A file of one JSON object per line. A line that could not be written waits for the next `append`."""

    def __init__(self, path: Path, resume_step: int | None) -> None:
        self.path = path
        self._waiting: deque[bytes] = deque(maxlen=MAX_WAITING_LINES)
        self.digest = _digest()  # of all lines, those that wait, too
        if resume_step is not None:
            self.digest = drop_later_steps(path, resume_step)
        elif path.exists() and path.stat().st_size:
            raise UserError(f"output: {path.parent} already holds a run; add --resume or choose another --output.")
        path.touch()

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Append the waiting lines and `rows`. On OSError the file is cut back to whole lines and all of them wait."""
        for line in [f"{to_json(row)}\n".encode() for row in rows]:
            self._waiting.append(line)
            self.digest.update(line)
        if not self._waiting:
            return
        file = self.path.open("ab")
        size_bytes = file.tell()
        try:
            with file:
                file.write(b"".join(self._waiting))
        except OSError:
            os.truncate(self.path, size_bytes)
            raise
        self._waiting.clear()

    def flush(self) -> None:
        """Asks the system to write the file to the disk before going on."""
        with self.path.open("ab") as file:
            os.fsync(file.fileno())


def to_json(row: Any) -> str:
    """One line of strict JSON: numbers that are not finite become null, what JSON does not know (a date, an image in a
    data set's column) its text; characters stay readable."""
    return json.dumps(_plain(row), ensure_ascii=False, allow_nan=False).encode(errors="replace").decode()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:  # a tensor's or an array's single number
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | None) else str(value)


def drop_later_steps(path: Path, last_step: int) -> hashlib.blake2b:
    """Keep the lines of `path` whose step is at most `last_step`, atomically; a half-written last line goes too.

    Returns the digest of what is kept.
    """
    digest = _digest()
    if not path.exists():
        return digest
    partial = path.with_name(path.name + ".partial")
    with path.open("rb") as old, partial.open("wb") as new:
        for line in old:
            if line.endswith(b"\n") and _step_of(line) <= last_step:
                new.write(line)
                digest.update(line)
        new.flush()
        os.fsync(new.fileno())
    os.replace(partial, path)
    return digest


def _digest() -> hashlib.blake2b:
    return hashlib.blake2b(digest_size=16)


def _step_of(line: bytes) -> float:
    """The line's step; infinity where it has none, so that a broken line is dropped."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf
    return step if isinstance(step, int) else math.inf


class Tracker(Protocol):
    """What RunLog asks of a tracking tool."""

    def log(self, metrics: Metrics, samples: Sequence[Sample]) -> None: ...
    def close(self) -> None: ...


class _TensorBoard:
    def __init__(self, module: ModuleType, folder: Path, config: dict[str, Any], resume_step: int | None) -> None:
        # TensorBoard hides what an earlier process wrote at purge_step and later.
        purge_step = None if resume_step is None else resume_step + 1
        self._writer = module.SummaryWriter(log_dir=str(folder / "tensorboard"), purge_step=purge_step)
        if resume_step is None:
            self._writer.add_text("config", _markdown_table(("setting", "value"), config.items()), 0)
            self._writer.add_text("metrics", metrics_page(), 0)

    def log(self, metrics: Metrics, samples: Sequence[Sample]) -> None:
        step = metrics["step"]
        for key, value in metrics.items():
            if key != "step" and isinstance(value, int | float):
                self._writer.add_scalar(key, value, step)
        if samples:
            self._writer.add_text("samples", _markdown_table(*_text_table(samples)), step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _RunTracker:
    """W&B and trackio, whose runs are alike: log(data, step=...), Table(columns=..., data=...), finish()."""

    def __init__(self, module: ModuleType, run: Any) -> None:
        self._module, self._run = module, run

    def log(self, metrics: Metrics, samples: Sequence[Sample]) -> None:
        data: dict[str, Any] = {key: value for key, value in metrics.items() if key != "step"}
        if samples:
            columns, rows = _text_table(samples)
            data["samples"] = self._module.Table(columns=columns, data=rows)
        self._run.log(data, step=metrics["step"])

    def close(self) -> None:
        self._run.finish()


def _wandb(module: ModuleType, folder: Path, config: dict[str, Any], resume_step: int | None) -> _RunTracker:
    # A resumed run must meet its old id. Steps logged twice are ignored by W&B; here they are equal anyway.
    path = folder / "wandb_run_id.txt"
    if resume_step is None or not path.exists():
        path.write_text(hashlib.sha256(os.urandom(16)).hexdigest()[:12] + "\n")
    run = module.init(
        project=os.environ.get("WANDB_PROJECT", "fastkl"),
        name=folder.name,
        id=path.read_text().strip(),
        dir=str(folder),
        config=config,
        resume="never" if resume_step is None else "allow",
    )
    return _RunTracker(module, run)


def _trackio(module: ModuleType, folder: Path, config: dict[str, Any], resume_step: int | None) -> _RunTracker:
    project = os.environ.get("TRACKIO_PROJECT", "fastkl")
    resume = "never" if resume_step is None else "allow"
    return _RunTracker(module, module.init(project=project, name=folder.name, config=config, resume=resume))


TRACKERS: dict[str, tuple[str, Callable[..., Tracker]]] = {
    "tensorboard": ("torch.utils.tensorboard", _TensorBoard),
    "wandb": ("wandb", _wandb),
    "trackio": ("trackio", _trackio),
}


def _import_tracker(name: str) -> ModuleType:
    try:
        return importlib.import_module(TRACKERS[name][0])
    except ImportError as error:
        raise UserError(
            f"report_to: {name} is not installed; run `pip install {name}` or leave it out of report_to."
        ) from error


def _start_tracker(name: str, folder: Path, config: dict[str, Any], resume_step: int | None) -> Tracker:
    try:
        return TRACKERS[name][1](_import_tracker(name), folder, config, resume_step)
    except Exception as error:  # a missing key, no network, a full disk: all before anything expensive has started
        raise UserError(f"report_to: {name} did not start ({error}); mend that or leave it out.") from error


def spread(samples: Sequence[Sample], most: int) -> list[Sample]:
    """At most `most` of a step's samples, evenly spaced: with several prompts, of several prompts."""
    return [samples[i * len(samples) // most] for i in range(most)] if len(samples) > most else list(samples)


def _text_table(samples: Sequence[Sample]) -> tuple[list[str], list[list[Any]]]:
    """Column names and rows: prompt (chat messages as roles), completion, the data set's columns, the reward, that of
    each function where there are several, what the functions gave to log_extra, the KL."""

    def named(kind: str) -> list[str]:
        return list(dict.fromkeys(name for sample in samples for name in sample.get(kind, {})))

    data, functions, extra = map(named, ("columns", "rewards", "extra"))
    functions = functions if len(functions) > 1 else []
    names = ["prompt", "completion", *data, "reward", *(f"reward/{name}" for name in functions), *extra, "kl"]
    return names, [
        [
            prompt_text(sample),
            sample.get("completion"),
            *(_cell(sample.get("columns", {}).get(name)) for name in data),
            sample.get("reward"),
            *(sample.get("rewards", {}).get(name) for name in functions),
            *(_cell(sample.get("extra", {}).get(name)) for name in extra),
            sample.get("kl"),
        ]
        for sample in samples
    ]


def _cell(value: Any) -> Any:
    """A data set's value as a cell of a table: a number or a text."""
    value = _plain(value)
    return to_json(value) if isinstance(value, dict | list) else value


def _markdown_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table for TensorBoard's text tab, which renders Markdown and would swallow `|` and line breaks."""

    def cell(value: Any) -> str:
        text = f"{value:.3f}" if isinstance(value, float) else str(value)
        return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())

    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell(value) for value in line) + " |" for line in lines)


def _print_to_stderr(message: str) -> None:
    print(f"fastkl: {printable(message)}", file=sys.stderr, flush=True)
