"""The report's section on the KL audit: the verdict of `fastkl doctor` on each run, and what it looked at.

In: `RunFiles`. Out: a plain dict for page.html, or None where the folders hold no scored samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastkl.audit.doctor import Diagnosis, diagnose_record
from fastkl.errors import UserError
from fastkl.report.page.run_files import RunFiles


def kl_audit(runs: Sequence[RunFiles]) -> dict[str, Any] | None:
    """One run: a row per check. Several: a row per run. `bad` rows are those that name a cause or a negative KL."""
    found = [(run, diagnosis) for run in runs if (diagnosis := _diagnosis(run)) is not None]
    if not found:
        return None
    if len(runs) > 1:
        rows = [_row_of_run(run.label, diagnosis) for run, diagnosis in found]
        return {"intro": "A KL is never below zero. What fastkl doctor says about each run.", "rows": rows}
    (_, diagnosis), *_ = found
    intro = f"A KL is never below zero. {diagnosis.verdict} fastkl doctor looked at {diagnosis.estimate}."
    rows = [
        {"name": f.cause, "texts": [f"{f.certainty}: {f.evidence}", f.remedy], "bad": True} for f in diagnosis.findings
    ]
    rows += [{"name": c.what, "texts": [c.evidence], "bad": False} for c in diagnosis.clear]
    return {"intro": intro, "rows": rows}


def _diagnosis(run: RunFiles) -> Diagnosis | None:
    try:
        return None if run.record is None else diagnose_record(str(run.folder), run.record)
    except UserError:
        return None  # the page does without this section


def _row_of_run(label: str, diagnosis: Diagnosis) -> dict[str, Any]:
    causes = "; ".join(finding.cause for finding in diagnosis.findings)
    texts = [f"{diagnosis.estimate}. {diagnosis.verdict}", *([f"Causes that fit: {causes}"] if causes else [])]
    return {"name": label, "texts": texts, "bad": diagnosis.negative or bool(diagnosis.findings)}
