"""The doctor: is the KL estimate significantly negative, and which known cause fits the evidence?

In: a run folder, or a JSONL file of rollouts from any trainer (__init__.py says what it holds). Out: a Diagnosis.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastkl.audit.alarm import is_negative, mean_and_error
from fastkl.audit.findings import Clear, Finding
from fastkl.audit.rollout_checks import CAUSES, Rollout, Rollouts
from fastkl.audit.run_checks import CHECKS, RunRecord
from fastkl.audit.thresholds import SIGMAS, WINDOW_STEPS
from fastkl.errors import UserError


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The verdict on an estimate, and the causes that fit."""

    source: str
    num_completions: int
    mean: float  # k1 per completion, nats
    error: float  # its standard error
    negative: bool  # significantly, overall or in some window of steps
    findings: tuple[Finding, ...]
    clear: tuple[Clear, ...] = ()  # what was looked at and is in order

    @property
    def estimate(self) -> str:
        """The estimate in words."""
        sigmas = "" if not math.isfinite(self.error) else f" ± {self.error:.2g}"
        return f"{self.num_completions} completions, KL estimate {self.mean:.4g}{sigmas} nats each"

    @property
    def verdict(self) -> str:
        """Whether it can be a KL."""
        if self.negative:
            return f"The estimate is significantly negative (more than {SIGMAS:g} standard errors): it cannot be a KL."
        return "The estimate is not significantly negative."

    def text(self) -> str:
        """The diagnosis for a terminal."""
        lines = [f"{self.source}: {self.estimate}", self.verdict]
        for n, finding in enumerate(self.findings, start=1):
            lines += ["", f"{n}. {finding.cause} ({finding.certainty})", f"   evidence: {finding.evidence}"]
            lines += [f"   remedy:   {finding.remedy}"]
        if self.negative and not self.findings:
            lines += ["", "No known cause fits. Record sampler_logprobs, token_ids and masks, and ask again."]
        if self.clear:
            lines += ["", "In order:", *(f"   {clear.what}: {clear.evidence}" for clear in self.clear)]
        return "\n".join(lines)


def diagnose(path: Path) -> Diagnosis:
    """Audits a run folder or a JSONL file. Raises UserError where there is nothing to audit."""
    return diagnose_run(path) if path.is_dir() else diagnose_rollouts(str(path), read_rollouts(path))


def diagnose_rollouts(source: str, rollouts: Rollouts) -> Diagnosis:
    """Audits rollouts with per-token log-probs."""
    estimates = [row.k1() for row in rollouts.rows]
    steps = [row.step or 0 for row in rollouts.rows]
    findings = tuple(found for cause in CAUSES if (found := cause(rollouts)) is not None)
    return Diagnosis(source, len(estimates), *mean_and_error(estimates), ever_negative(steps, estimates), findings)


def ever_negative(steps: Sequence[int], estimates: Sequence[float]) -> bool:
    """Whether the mean is significantly below zero, overall or over some WINDOW_STEPS steps in a row."""
    by_step: dict[int, list[float]] = {}
    for step, value in zip(steps, estimates, strict=True):
        by_step.setdefault(step, []).append(value)
    ordered = [by_step[step] for step in sorted(by_step)]
    windows = [ordered[i : i + WINDOW_STEPS] for i in range(max(1, len(ordered) - WINDOW_STEPS + 1))]
    return is_negative(estimates) or any(is_negative([v for step in window for v in step]) for window in windows)


def read_rollouts(path: Path) -> Rollouts:
    """Reads the documented JSONL. UserError names the line that does not fit."""
    settings: dict[str, Any] = {}
    rows: list[Rollout] = []
    names = {*Rollout.__slots__}
    for number, line in enumerate(_lines(path), start=1):
        try:
            record = json.loads(line)
            if "settings" in record:
                settings |= record["settings"]
                continue
            row = Rollout(**{name: value for name, value in record.items() if name in names})
            if len(row.logprobs) != len(row.ref_logprobs) or (row.mask and len(row.mask) != len(row.logprobs)):
                raise ValueError("logprobs, ref_logprobs and mask differ in length")
        except (ValueError, TypeError) as failure:
            raise UserError(
                f"doctor: line {number} of {str(path)!r} is no rollout ({failure}); `fastkl doctor --help` says what a "
                "line holds."
            ) from failure
        rows.append(row)
    if not rows:
        raise UserError(f"doctor: {str(path)!r} holds no rollouts.")
    return Rollouts(rows, settings)


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as failure:
        raise UserError(f"doctor: {str(path)!r} cannot be read ({failure}).") from failure


def diagnose_run(folder: Path) -> Diagnosis:
    """Audits a run of fastkl from what its folder holds (run_checks.py). UserError where it has no scored samples."""
    run = RunRecord(
        _settings(folder / "config.yaml"),
        _whole_lines(folder / "metrics.jsonl"),
        _whole_lines(folder / "samples.jsonl"),
    )
    scored = run.scored()
    if not scored:
        raise UserError(f"doctor: {str(folder)!r} holds no scored samples; give a run folder or a JSONL file.")
    estimates, steps = [s["kl"] for s in scored], [s["step"] for s in scored]
    verdicts = [check(run) for check in CHECKS]
    return Diagnosis(
        str(folder), len(scored), *mean_and_error(estimates), ever_negative(steps, estimates),
        tuple(v for v in verdicts if isinstance(v, Finding)), tuple(v for v in verdicts if isinstance(v, Clear)),
    )  # fmt: skip


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a run's JSONL file, one or more per step; a last line that is still being written is left out."""
    found = []
    lines = _lines(path)
    for number, line in enumerate(lines, start=1):
        try:
            found.append(json.loads(line))
        except ValueError as failure:
            if number < len(lines):
                raise UserError(f"doctor: line {number} of {str(path)!r} is damaged ({failure}).") from failure
    return [row for row in found if isinstance(row, dict) and isinstance(row.get("step"), int)]


def _settings(path: Path) -> dict[str, Any]:
    """The run's settings; none where they cannot be read: the checks that need them are left out."""
    import yaml

    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return settings if isinstance(settings, dict) else {}
