"""The doctor: is the KL estimate significantly negative, and which known cause fits the evidence?

In: a run folder, or a JSONL file of rollouts from any trainer (__init__.py says what it holds). Out: a Diagnosis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fastkl.audit.alarm import Moments, ever_negative
from fastkl.audit.findings import Clear, Finding
from fastkl.audit.json_lines import LARGEST, is_number, json_lines, rows_of_steps
from fastkl.audit.rollout_checks import CAUSES, Rollout, RolloutTotals
from fastkl.audit.run_checks import CHECKS, RunRecord, SampleTotals
from fastkl.audit.thresholds import MIN_COMPLETIONS, SIGMAS
from fastkl.config.files import read_yaml
from fastkl.errors import UserError
from fastkl.sampling.params import DEFAULTS, replayed_names

ALIASES = {  # what TRL, verl and OpenRLHF call the fields
    "logprobs": ("old_per_token_logps", "old_log_probs", "action_log_probs"),
    "ref_logprobs": ("ref_per_token_logps", "ref_log_prob", "base_action_log_probs"),
    "sampler_logprobs": ("sampling_per_token_logps", "rollout_log_probs"),
    "mask": ("completion_mask", "response_mask", "action_mask"),
    "token_ids": ("completion_ids", "responses"),
}


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
    too_few: bool = False  # fewer than MIN_COMPLETIONS are scored

    @property
    def exit_code(self) -> int:
        """0: not negative. 1: negative. 3: too few completions to tell."""
        return 3 if self.too_few else int(self.negative)

    @property
    def estimate(self) -> str:
        """The estimate in words."""
        sigmas = "" if not math.isfinite(self.error) else f" ± {self.error:.2g}"
        return f"{self.num_completions} completions, KL estimate {self.mean:.4g}{sigmas} nats each"

    @property
    def verdict(self) -> str:
        """Whether it can be a KL."""
        if self.too_few:
            return f"That is too few scored completions to tell: {MIN_COMPLETIONS} are needed."
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


def diagnose_rollouts(source: str, rollouts: Iterable[Rollout]) -> Diagnosis:
    """Audits rollouts with per-token log-probs, in one pass that keeps none of them."""
    totals = RolloutTotals.of(rollouts)
    if not totals.by_step:
        raise UserError(f"doctor: {source!r} holds no rollouts.")
    estimate = sum(totals.by_step.values(), Moments())
    findings = tuple(found for cause in CAUSES if (found := cause(totals)) is not None)
    return Diagnosis(
        source, estimate.count, *estimate.mean_and_error(), ever_negative(totals.by_step), findings,
        too_few=totals.num_scored < MIN_COMPLETIONS,
    )  # fmt: skip


def read_rollouts(path: Path) -> Iterator[Rollout]:
    """The documented JSONL, a rollout at a time. UserError names the line and the field that do not fit."""
    settings: dict[str, Any] = {}
    for number, record in json_lines(path):
        try:
            if isinstance(record, Exception):
                raise ValueError(f"not JSON: {record}")
            if not isinstance(record, dict):
                raise ValueError("not a JSON object")
            if record.keys() == {"settings"}:
                settings = settings | _sampling(record["settings"])
                continue
            rollout = _rollout(record, settings)
        except ValueError as failure:
            raise UserError(
                f"doctor: line {number} of {str(path)!r} is no rollout ({failure}); `fastkl doctor --help` says what a "
                "line holds."
            ) from failure
        yield rollout


def _rollout(record: Mapping[str, Any], settings: dict[str, Any]) -> Rollout:
    """One line. settings: of the lines above it. ValueError names the field that does not fit."""
    if record.get("settings") is not None:
        settings = settings | _sampling(record["settings"])
    values: dict[str, Any] = {"settings": settings}
    for field in (field.name for field in fields(Rollout) if field.name != "settings"):
        names = (field, *ALIASES.get(field, ()))
        name = next((name for name in names if record.get(name) is not None), field)
        if name in record and record[name] is not None:
            values[field] = record[name]
            if why := FIELDS[field](record[name]):
                raise ValueError(f"{name}{why}")
        elif field in ("logprobs", "ref_logprobs"):
            raise ValueError(f"it has no {' or '.join(names)}")
    if len({len(values[name]) for name in ("logprobs", "ref_logprobs", "mask", "token_ids") if name in values}) > 1:
        raise ValueError("logprobs, ref_logprobs, mask and token_ids differ in length")
    return Rollout(**values)


def _list_of(what: str, fits: Callable[[Any], bool]) -> Callable[[Any], str]:
    """A check of a field: what is wrong with the value, as the end of a sentence that begins with the field's name."""

    def why(value: Any) -> str:
        if not isinstance(value, list) or not value:
            return " is not a list" if not isinstance(value, list) else " is empty"
        return next((f"[{t}] is {str(item)[:40]}, not {what}" for t, item in enumerate(value) if not fits(item)), "")

    return why


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


NUMBERS, IDS = _list_of(f"a finite number up to {LARGEST:g}", is_number), _list_of("a whole number", _is_whole)


FIELDS: dict[str, Callable[[Any], str]] = {
    **dict.fromkeys(("logprobs", "ref_logprobs", "sampler_logprobs"), NUMBERS),
    **dict.fromkeys(("token_ids", "sampled_token_ids"), IDS),
    "mask": _list_of("0 or 1", lambda value: isinstance(value, int | float) and value in (0, 1)),
    "finish_reason": lambda value: "" if isinstance(value, str) else " is not a text",
    "step": lambda value: "" if _is_whole(value) else " is not a whole number",
}


def _sampling(settings: Any) -> dict[str, Any]:
    """How tokens were drawn, as the checks read it. ValueError for values that are of another kind."""
    if not isinstance(settings, dict):
        raise ValueError("settings is not an object")
    given = {name: value for name, value in settings.items() if value is not None}
    for name in ("eos_token_ids", "allowed_token_ids", "banned_token_ids"):
        if _is_whole(given.get(name)):
            given[name] = [given[name]]
        if given.get(name) and (why := IDS(given[name])):
            raise ValueError(f"settings: {name}{why}")
    for name in replayed_names():
        if name in given and not isinstance(DEFAULTS[name], tuple) and not is_number(given[name]):
            raise ValueError(f"settings: {name} is not a number")
    return given


def diagnose_run(folder: Path) -> Diagnosis:
    """Audits a run of fastkl from what its folder holds. UserError where it has no scored samples."""
    damaged: list[str] = []
    metrics = list(rows_of_steps(folder / "metrics.jsonl", damaged))
    samples = SampleTotals.of(rows_of_steps(folder / "samples.jsonl", damaged))
    if damaged:
        raise UserError(f"doctor: {damaged[0]}.")
    return diagnose_record(str(folder), RunRecord(read_config(folder / "config.yaml"), metrics, samples))


def diagnose_record(source: str, run: RunRecord) -> Diagnosis:
    """Audits what a run has logged (run_checks.py). UserError where it has no scored samples, or no KL."""
    if run.config.get("no_reference"):
        raise UserError(f"doctor: {source!r} was trained without a reference (no_reference), so it has no KL to audit.")
    by_step = {number: step.kl for number, step in run.samples.scored().items()}
    total = sum(by_step.values(), Moments())
    if not total.count:
        raise UserError(f"doctor: {source!r} holds no scored samples; give a run folder or a JSONL file.")
    verdicts = [check(run) for check in CHECKS]
    return Diagnosis(
        source, total.count, *total.mean_and_error(), ever_negative(by_step),
        tuple(v for v in verdicts if isinstance(v, Finding)), tuple(v for v in verdicts if isinstance(v, Clear)),
        too_few=total.count < MIN_COMPLETIONS,
    )  # fmt: skip


def read_config(path: Path) -> dict[str, Any]:
    """The run's settings; none where they cannot be read: what needs them is left out."""
    try:
        settings = read_yaml(path)
    except (OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}
