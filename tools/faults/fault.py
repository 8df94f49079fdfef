"""What the faults share: the place and the seed of their runs, and what becomes of each."""

from __future__ import annotations

import itertools
import random
import shutil
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tools.faults import runs


@dataclass(frozen=True, slots=True)
class Bench:
    """Where the runs lie, and the run that nothing has happened to."""

    folder: Path
    seed: int
    quick: bool
    whole: Path
    duration_s: float  # of an uninterrupted run
    trial: int | None = None  # only this one
    count: int = 0  # how often each fault is injected; 0: as often as its row says

    @classmethod
    def prepared(cls, folder: Path, seed: int, quick: bool, trial: int | None = None, count: int = 0) -> Bench:
        """Does the run that the others are compared with, twice: two runs must be equal before a fault can show."""
        whole, again = folder / "whole", folder / "again"
        for output in (whole, again):
            child = runs.finished(output, "--save-every", "2", "--keep-checkpoints", "0")
            if child.code:
                raise SystemExit(f"faults: a run without a fault failed:\n{child.text}")
            duration_s = time.monotonic() - child.started
        if differ := runs.differences(again, whole):
            raise SystemExit(f"faults: two runs without a fault differ in {', '.join(differ)}.")
        shutil.rmtree(again)
        return cls(folder, seed, quick, whole, duration_s, trial, count)

    def tell(self, words: str) -> None:
        """How far a row has come whose trials take a minute each."""
        print(f"         {words} ...", file=sys.stderr, flush=True)

    def random(self, name: str, trial: int) -> random.Random:
        """The random numbers of one trial: the same whichever trials come before it."""
        return random.Random(f"{name}, seed {self.seed}, trial {trial}")

    def times(self, full: int, quick: int) -> int:
        """How often a fault is injected."""
        return self.count or (quick if self.quick else full)

    def trials(self, count: int | None = None) -> Iterable[int]:
        """The numbers of the trials; without an end where there is no `count`."""
        if self.trial is not None:
            return (self.trial,)
        return itertools.count() if count is None else range(count)

    def output(self, name: str, trial: int) -> Path:
        """A run folder that does not exist yet."""
        return self.folder / f"{name.replace(' ', '-')}-{trial}"

    def clear(self, output: Path) -> None:
        """Removes a run that came out right."""
        shutil.rmtree(output, ignore_errors=True)
        output.with_name(f"{output.name}.txt").unlink(missing_ok=True)


@dataclass(slots=True)
class Row:
    """A line of the table: a fault and what became of it."""

    fault: str
    injected: str  # how
    runs: int = 0  # how often
    outcome: str = ""
    failures: list[str] = field(default_factory=list)  # each with what repeats it
    skipped: str = ""  # why it was not tried
    name: str = ""  # for --only
    minutes: float = 0.0

    def failed(self, trial: int, moment: str, wrong: Iterable[str]) -> None:
        """Notes what went wrong in one trial, if anything did."""
        if wrong := list(wrong):
            self.failures.append(f"trial {trial}, {moment}: {'; '.join(wrong)}")

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)
