"""Type checkers see the public names with their whole signatures, from an installed wheel and from a checkout."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from building import ROOT, build_wheel

import fastkl

pytestmark = pytest.mark.slow

FUNCTIONS = ("token_scores", "linear_token_scores", "linear_token_loss", "train")
PROBE = "import fastkl\n" + "".join(f"reveal_type(fastkl.{name})\n" for name in FUNCTIONS)
PROBE += "reveal_type(fastkl.TrainConfig(steps=1).steps)\nreveal_type(fastkl.TokenScores.kl)\n"
OTHERS = ("accelerate", "datasets", "peft", "tokenizers", "transformers", "trl", "vllm")
"""What mypy leaves unread, as in pyproject.toml: reading them takes minutes, and none of them is in these signatures
but that of `train`, whose types are not looked at."""


def run(folder: Path, *command: object) -> str:
    """Standard output of a command that runs in `folder` and knows nothing of how the tests find fastkl."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=folder, env=env)
    return done.stdout or done.stderr


@pytest.fixture(scope="module", params=["wheel", pytest.param("checkout", marks=pytest.mark.long)])
def environment(request, tmp_path_factory) -> Path:
    """The Python of a new environment where fastkl is installed, with torch from the environment of the tests."""
    folder = tmp_path_factory.mktemp(request.param)
    venv.create(folder / "venv", symlinks=True)
    site = folder / "venv" / Path(sysconfig.get_path("purelib")).relative_to(sys.prefix)
    lines = [sysconfig.get_path("purelib")]
    if request.param == "wheel":
        zipfile.ZipFile(build_wheel(folder)).extractall(site)
    else:  # what an editable installation leaves behind
        lines.insert(0, str(ROOT))
    (site / "paths.pth").write_text("\n".join(lines))
    (folder / "probe.py").write_text(PROBE)
    python = folder / "venv" / "bin" / "python"
    found = run(folder, python, "-c", "import fastkl; print(fastkl.__file__)")
    assert found.startswith(str(site if request.param == "wheel" else ROOT)), found
    return python


def mypy(python: Path) -> list[str]:
    """The revealed types, one per line of PROBE but the first."""
    pytest.importorskip("mypy")
    folder = python.parents[2]
    unread = ",".join(f"{name}.*" for name in OTHERS)
    settings = folder / "mypy.ini"
    settings.write_text(f"[mypy]\n[mypy-{unread}]\nfollow_imports = skip\nignore_missing_imports = True\n")
    options = ("--config-file", settings, "--python-executable", python, "--cache-dir", folder.parent / "mypy")
    return re.findall(r'Revealed type is "(.*)"', run(folder, sys.executable, "-m", "mypy", *options, "probe.py"))


def pyright(python: Path) -> list[str]:
    """The revealed types, one per line of PROBE but the first."""
    pytest.importorskip("basedpyright")
    command = (sys.executable, "-m", "basedpyright", "--outputjson", "--pythonpath", python, "probe.py")
    messages = [found["message"] for found in json.loads(run(python.parents[2], *command))["generalDiagnostics"]]
    return [message.partition('" is "')[2].rstrip('"') for message in messages if message.startswith("Type of")]


@pytest.mark.parametrize("checker", [pyright, pytest.param(mypy, marks=pytest.mark.long)])
def test_a_type_checker_sees_whole_signatures(environment, checker: Callable[[Path], list[str]]):
    *functions, steps, kl = checker(environment)
    assert len(functions) == len(FUNCTIONS)
    for name, revealed in zip(FUNCTIONS, functions, strict=True):
        parameters = inspect.signature(getattr(fastkl, name)).parameters
        assert re.findall(r"(\w+): ", revealed) == list(parameters), revealed
        if name != "train":  # which takes what other libraries make, and functions of any kind
            assert not re.search(r": Any\b|-> Any\b|Unknown", revealed), revealed
    assert functions[0].endswith("TokenScores")
    assert (steps.removeprefix("builtins."), kl.replace("torch._tensor.", "")) == ("int", "Tensor | None")
