"""Imports run one way: the contracts of pyproject.toml hold, and the lowest folders need little beyond Python."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cases import slow_rows

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def tree(tmp_path) -> Path:
    """A copy of the package in which kernels/ is a plain sub-package, as in a wheel: import-linter follows no link."""
    pytest.importorskip("importlinter")
    shutil.copytree(ROOT / "fastkl", tmp_path / "fastkl", ignore=shutil.ignore_patterns("__pycache__", "model"))
    (tmp_path / "fastkl" / "kernels" / "__init__.py").touch()
    return tmp_path


def lint(tree: Path) -> str:
    """What import-linter says of the package in `tree`, in one line per contract and broken import."""
    code = "import sys; from importlinter.cli import lint_imports_command; lint_imports_command(sys.argv[1:])"
    command = [sys.executable, "-c", code, "--no-cache", "--no-logo", str(ROOT / "pyproject.toml")]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tree, env={**os.environ, "PYTHONPATH": str(tree)}
    )
    return done.stdout + done.stderr


def test_every_import_contract_holds(tree):
    said = lint(tree)
    assert " 0 broken" in said, said


@pytest.mark.parametrize(
    ("importer", "imported", "contract"),
    [
        ("kernels/types.py", "fastkl.errors", "Each stage imports only what lies below it"),
        *slow_rows(
            ("objective/rloo.py", "fastkl.rollout.generator", "Each stage imports only what lies below it"),
            ("scoring/pack.py", "vllm", "Only the rollout stage imports vLLM"),
            (
                "audit/alarm.py",
                "fastkl.scoring.models",
                "Reports and audits look at files and metrics, never at models",
            ),
            ("version.py", "fastkl.errors", "No circles between or within folders"),
        ),
    ],
)
def test_an_import_that_runs_up_breaks_its_contract(tree, importer, imported, contract):
    with (tree / "fastkl" / importer).open("a") as file:
        file.write(f"\nimport {imported}\n")
    if importer == "version.py":
        with (tree / "fastkl" / "errors.py").open("a") as file:
            file.write("\nimport fastkl.version\n")
    said = lint(tree)
    assert re.search(rf"{contract}.* BROKEN", said), said


def imports(tree: ast.AST) -> Iterator[str]:
    """The top-level names of the packages that a parsed module imports, without relative imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield (node.module or "").partition(".")[0]


@pytest.mark.parametrize(
    ("folder", "allowed"),
    [("kernels", {"torch", "triton"}), ("fastkl/storyteller", {"fastkl"}), ("fastkl/version.py", set())],
)
def test_the_lowest_folders_import_the_standard_library_and_little_else(folder, allowed):
    path = ROOT / folder
    for file in [path] if path.is_file() else path.rglob("*.py"):
        foreign = set(imports(ast.parse(file.read_text()))) - sys.stdlib_module_names - allowed
        assert not foreign, f"{file} imports {foreign}"


def test_vllm_is_imported_inside_functions_only():
    for file in (ROOT / "fastkl").rglob("*.py"):
        text = file.read_text()
        for node in ast.parse(text).body if "vllm" in text else ():
            assert isinstance(node, ast.FunctionDef | ast.ClassDef) or "vllm" not in set(imports(node)), file
