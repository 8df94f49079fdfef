"""Links, and files named in text, lead somewhere."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest
from pages import INLINE, PAGES, ROOT, anchors, links, prose

FILES = {path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*") if not {".venv", ".git"} & {*path.parts}}
NOT_OURS = {
    *("file.py", "my_rewards.py", "rewards.py", "PATH/TO/trl/tests/test_rloo_trainer.py", "testing_utils.py"),
    *("trl/trainer/rloo_trainer.py", "verl/trainer/ppo/core_algos.py"),
}
"""Python files that texts name and that are not in the repository: examples, and other projects' files."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    for link in links(page):
        target, _, anchor = link.partition("#")
        if "://" in target:
            continue
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), link
        assert path.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(path), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_in_a_page_exist(page):
    roots = ("fastkl/", "kernels/", "bench/", "tests/", "tools/", "docs/")
    for code in INLINE.findall(prose(page)):
        if code.startswith(roots) and re.fullmatch(r"[\w./-]+", code):
            assert code.rstrip("/") in FILES, code


def texts_of(path: Path) -> list[str]:
    """The comments and docstrings of a Python file."""
    source = path.read_text(encoding="utf-8")
    comments = [t.string for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT]
    strings = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Expr)]
    return comments + [s.value for s in strings if isinstance(s, ast.Constant) and isinstance(s.value, str)]


@pytest.mark.parametrize("folder", ["fastkl", "kernels", "bench", "tools", "tests"])
def test_python_files_named_in_docstrings_and_comments_exist(folder):
    """ "pack.py" and "kernels/reference.py" must be the end of some file's path."""
    ends = {"/".join(Path(file).parts[-n:]) for file in FILES for n in range(1, 6)} | NOT_OURS
    named = re.compile(r"(?<![\w/.{}*-])[\w/]+\.py\b(?![\w/])")
    for path in (ROOT / folder).rglob("*.py"):
        if set(named.findall(path.read_text(encoding="utf-8"))) <= ends:
            continue  # whether it is a comment that names them or not
        for text in texts_of(path):
            assert set(named.findall(text)) <= ends, path


def test_supported_versions_are_those_of_the_project():
    """The requirements in the table of docs/install.md stand in pyproject.toml, word for word."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    rows = re.findall(r"^\|[^|]+\| `([^`]+)` \|$", (ROOT / "docs" / "install.md").read_text(encoding="utf-8"), re.M)
    assert len(rows) == 5
    assert all(f'"{requirement}"' in project for requirement in rows)


def test_every_result_is_shown_somewhere():
    """No file of bench/results without a page that names it."""
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    results = (ROOT / "bench" / "results").rglob("*.json")
    hidden = {path.name for path in results if f"/{path.relative_to(ROOT / 'bench')})" not in text}
    assert hidden <= {"memory_target.json"}  # what the text under h200/bench.json draws on
