"""Builds the wheel that the tests look into."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def build_wheel(folder: Path) -> Path:
    """A wheel, built in `folder` from a copy of the tree so that nothing is left behind in the checkout."""
    pytest.importorskip("setuptools", minversion="77", reason="building a wheel needs setuptools")
    tree = folder / "tree"
    for name in ("fastkl", "kernels"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    build = "import setuptools.build_meta; setuptools.build_meta.build_wheel('dist')"
    done = subprocess.run([sys.executable, "-c", build], capture_output=True, text=True, cwd=tree)
    assert done.returncode == 0, done.stderr
    (built,) = (tree / "dist").glob("fastkl-*-py3-none-any.whl")
    return built
