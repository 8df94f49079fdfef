"""docs/drop-in.md: its examples are those that are run, its numbers those measured."""

from __future__ import annotations

import json
import re
import sys
import textwrap
from pathlib import Path

from fastkl.integrations import transformers

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "drop-in.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_the_loop_is_the_one_of_the_module_that_its_tests_run():
    assert textwrap.indent(EXAMPLES[0], "    ").rstrip() in transformers.__doc__


def test_the_example_with_hidden_states_runs():
    names: dict = {}
    exec(EXAMPLES[1], names)
    assert names["hidden"].grad.abs().sum() > 0
    assert names["scores"].ref_logprobs.shape == (64,)


def test_the_tables_are_those_of_the_recorded_run(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    from bench.operators.drop_in import table

    record = json.loads((ROOT / "bench" / "results" / "drop_in.json").read_text())
    script = record["machine"]["command"].rpartition("/")[2]
    for text in (table(record).strip(), script, record["machine"]["device"].split(" ")[0]):
        assert text in PAGE
