"""Writes one self-contained HTML page about a run, or about several side by side.

In: run folders (metrics.jsonl, and where there are any samples.jsonl and config.yaml). Out: one file that needs no
network, no script to be read (scripts add pointing at values and saving a chart as a picture), and no more than a
browser. Folders are read in run_files.py; what the page says is in one_run.py, several_runs.py, tables.py, kl_audit.py
and stories.py, its charts in ../charts.py.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from fastkl.errors import UserError
from fastkl.report.page import one_run, several_runs, stories, tables
from fastkl.report.page.kl_audit import kl_audit
from fastkl.report.page.run_files import RunFiles, load_runs
from fastkl.rewards.built_in import reward_spans

ASSETS = Path(__file__).parent


# What must not stand in the page, whatever a completion holds: control characters, and those that reorder the text
# after them (Unicode's explicit directional formatting). They are shown as a sign.
UNSAFE: dict[int, int | str] = {
    **{code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"},
    **dict.fromkeys((*range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)), "\ufffd"),
}


def write_report(folders: Sequence[Path], output: Path | None = None) -> Path:
    """Write the page and return where it is.

    folders: one run folder for a report, several for a comparison. output: the file to write; by default report.html in
    the run's folder, or in the folder that all runs share. Raises UserError for a folder without metrics, or where the
    page cannot be written.
    """
    runs = load_runs([Path(folder) for folder in folders])
    if output is None:
        output = Path(os.path.commonpath([run.folder for run in runs])) / "report.html"
    page = render(runs)
    partial = output.with_name(output.name + ".partial")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(page, encoding="utf-8")
        os.replace(partial, output)
    except OSError as error:
        raise UserError(f"report: cannot write {output} ({error.strerror}); give another place.") from error
    return output


def render(runs: Sequence[RunFiles]) -> str:
    """The page as HTML."""
    script = (ASSETS / "script.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = template().render(
        **(_of_one(runs[0]) if len(runs) == 1 else _of_several(runs)),
        style=Markup((ASSETS / "style.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=f"sha256-{digest}",  # the browser runs this script and no other, whatever a completion holds
        sources=", ".join(run.folder.name for run in runs),
        notices=[notice for run in runs for notice in one_run.notices(run)],
        audit=kl_audit(runs),
        settings=tables.settings(runs),
    )
    return page.translate(UNSAFE).encode(errors="replace").decode()  # lone surrogates, which some tokenizers decode to


@cache
def template() -> Template:
    """The page's template, which takes longer to compile than to fill in."""
    environment = Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html")


def _of_one(run: RunFiles) -> dict[str, Any]:
    """The page's parts for a single run."""
    return {
        "title": run.label,
        "lead": one_run.lead(run),
        "cards": one_run.cards(run),
        "comparison": None,
        "frontier": one_run.frontier(run),
        "charts": one_run.charts(run),
        "columns": stories.first_and_last(run),
        "stories_title": "Completions of the first and the last step",
        "stories_intro": _stories_intro([run]),
        "browse": stories.browse(run),
        "browse_intro": stories.browse_intro(run),
        "facts": tables.facts(run),
        "numbers": [tables.number_table(run, "The numbers as a table")],
    }


def _of_several(runs: Sequence[RunFiles]) -> dict[str, Any]:
    """The page's parts for a comparison."""
    groups = several_runs.by_seed(runs)
    return {
        "title": several_runs.title(runs),
        "lead": several_runs.lead(groups),
        "cards": [],
        "comparison": several_runs.comparison(groups),
        "frontier": several_runs.frontier(groups),
        "charts": several_runs.charts(groups),
        "columns": stories.last_of_each([group.runs[0] for group in groups]),
        "stories_title": "Completions of each run's last step",
        "stories_intro": _stories_intro(runs),
        "browse": [],
        "browse_intro": "",
        "facts": [],
        "numbers": [tables.number_table(run, f"The numbers of {run.label} as a table") for run in runs],
    }


def _stories_intro(runs: Sequence[RunFiles]) -> str:
    marked = any(reward_spans(run.reward_names, "an apple") for run in runs)
    return "Completions, picked by the rank of their reward only; the prompt is grey." + (
        " What earned the reward is marked." if marked else ""
    )
