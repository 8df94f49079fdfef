"""`make faults` in miniature: it runs, nothing comes out wrong, and what is wrong it sees."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import commands
import pytest

ROOT = Path(__file__).resolve().parents[2]


def faults(folder: Path, *options: str, prologue: str = "") -> commands.Done:
    """Forked from what has imported everything."""
    code = f"import runpy, sys\nsys.path.insert(0, {str(ROOT)!r})\n{prologue}\n"
    code += "runpy.run_module('tools.faults', run_name='__main__')"
    return commands.run("--quick", "--folder", str(folder), *options, script=code, timeout=900)


@pytest.mark.slow
def test_one_fault_of_two_kinds(tmp_path):
    done = faults(tmp_path, "--only", "kills", "processes", "--times", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAILED" not in done.stdout and done.stdout.count("green") == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.long
def test_every_fault_in_miniature(tmp_path):
    done = faults(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAILED" not in done.stdout and done.stdout.count("green") >= 17
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_checkpoint_that_is_not_verified_is_seen_and_can_be_repeated(tmp_path):
    blind = "from fastkl.training import checkpoint; checkpoint._fingerprint = lambda path: [0, '']"
    done = faults(tmp_path, "--only", "flips", "--seed", "3", "--times", "2", prologue=blind)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "of 2 FAILED a flipped bit in model.safetensors" in done.stdout
    assert "again: python -m tools.faults --seed 3 --only flips --trial 0" in done.stdout


def test_the_table_of_the_page_is_that_of_the_recorded_run(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    from tools.faults.table import BEGIN, END, PAGE, RESULTS, markdown

    record = json.loads(RESULTS.read_text())
    assert BEGIN + markdown(record) + END in PAGE.read_text()
    assert not any(row["failures"] or row["skipped"] for row in record["rows"])
