"""docs/models.md: the rows of a sweep as a page, and the rows of a page."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from tools.models.trial import TOLERANCE, Row

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"

OUTCOMES = ("trains", "refused", "fails")
LAYOUTS = ("shared", "packed", "padded")
DECODINGS = ("shared", "alike", "anew")
"""From good to bad."""

FAILS = "**fails**"
TRAINS = "| architecture | model type | layout | decoding | error, nats |\n|---|---|---|---|---:|\n"
REFUSED = "| architecture | model type | what it says |\n|---|---|---|\n"

TEXT = """# Models

What happens to every causal language model of transformers {version}: {count} model types. A tiny random model of each
(a layer of every kind that it has, but at least two; width 32, {vocab} words) is saved to a folder, and `fastkl train`
takes two steps on it with the transformers generator in float32. It has to score random completions like its own
logits, to {tolerance:g} nats at each token, and to load from the checkpoint that it leaves. `make models` tries them
all, in some minutes on two cores, and writes this page; it fails where one does worse than here.

{trains} train, {refused} are refused{fails}.

## Those that train

* **layout** of what is scored: one row without padding, which holds what sequences begin with alike once
  ("shared") or every sequence whole ("packed"); or a padded row for each sequence ("padded").
* **decoding** in the transformers generator: "shared" pads prompts of different lengths and repeats their caches;
  "alike" takes prompts of one length at a time; "anew" forwards all tokens at each step, since the cache cannot be
  repeated or its logits are others.
* **error**: the largest difference of a token's log-prob from log-softmax of the model's own logits, one sequence at a
  time, in eager attention.

{table}
## Those that are refused

{refusals}"""


def page(rows: Iterable[Row]) -> str:
    """The page that shows these rows."""
    import transformers

    from tools.models.tiny import VOCAB

    rows = sorted(rows, key=lambda row: (row.architecture.lower(), row.kind))
    trains, refused, fails = ([row for row in rows if row.outcome == outcome] for outcome in OUTCOMES)
    scored = [(*names(row), row.layout, row.decoding, f"{row.error:.1e}") for row in trains]
    others = [(*names(row), plain(row)) for row in [*refused, *fails]]
    return TEXT.format(
        version=transformers.__version__,
        count=len(rows),
        vocab=VOCAB,
        tolerance=TOLERANCE,
        trains=len(trains),
        refused=len(refused),
        fails=f", {len(fails)} fail" if fails else "",
        table=TRAINS + lines(scored),
        refusals=REFUSED + lines(others),
    )


def names(row: Row) -> tuple[str, str]:
    """The first two cells."""
    return row.architecture, row.kind


def lines(cells: Iterable[Iterable[str]]) -> str:
    """The lines of a table."""
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def plain(row: Row) -> str:
    """A sentence that fits into a table; a failure is called one."""
    sentence = re.sub(r"\s+", " ", row.sentence).replace("|", "/").replace("<", "&lt;")
    return f"{FAILS}: {sentence}" if row.outcome == "fails" else sentence


def rows_of(text: str) -> list[Row]:
    """The rows that a page shows."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:2] == "| "]
    return [_row(*cells) for cells in lines if cells[1] != "model type"]


def _row(architecture: str, kind: str, *rest: str) -> Row:
    if len(rest) == 3:
        return Row(kind, architecture, "trains", rest[0], rest[1], float(rest[2]))
    return Row(kind, architecture, "fails" if rest[0].startswith(FAILS) else "refused", sentence=rest[0])


def worse(row: Row, before: Row | None) -> bool:
    """Whether it has lost its training, or the fast layout or decoding that it had; a new one, whether it fails."""
    if before is None:
        return row.outcome == "fails"
    if row.outcome != before.outcome or row.outcome != "trains":
        return OUTCOMES.index(row.outcome) > OUTCOMES.index(before.outcome)
    slower = LAYOUTS.index(row.layout) > LAYOUTS.index(before.layout)
    return slower or DECODINGS.index(row.decoding) > DECODINGS.index(before.decoding)
