"""The Triton kernels without a GPU: interpreted, and compiled to machine code that keeps to a budget."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent


def run(arguments: list[str], **environment: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": os.pathsep.join([str(HERE.parent.parent), str(HERE)]), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, cwd=HERE)


def interpreter_needs_an_older_numpy() -> bool:
    """Triton 3.6 takes arrays of one number for integers, which NumPy does no longer since 2.5."""
    from triton.runtime import interpreter

    numpy = [int(part) for part in version("numpy").split(".")[:2]]
    return numpy >= [2, 5] and "int(self.handle.data)" in inspect.getsource(interpreter)


@pytest.mark.slow
def test_kernels_match_float64_under_the_interpreter():
    if interpreter_needs_an_older_numpy():
        pytest.skip("this Triton's interpreter does not run with NumPy 2.5 or newer")
    done = run(["-m", "pytest", "-q", "-x", str(HERE / "interpreted_triton.py")], TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "failed" not in done.stdout


@pytest.fixture(scope="module")
def resources() -> list[dict]:
    done = run(["-W", "ignore", "-m", "fastkl.kernels.resources", "--json"], TRITON_DEFAULT_FP_FUSION="1")
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.slow
def test_no_kernel_spills_registers_on_any_architecture(resources):
    assert len(resources) > 30
    spills = {(r["name"], r["architecture"]): r["spilled_bytes"] for r in resources if r["spilled_bytes"]}
    assert spills == {}


@pytest.mark.slow
def test_shared_memory_stays_within_the_chips_limit(resources):
    limits = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
    assert {r["architecture"] for r in resources} == set(limits)
    for r in resources:
        assert r["shared_bytes"] <= limits[r["architecture"]], r


@pytest.mark.slow
def test_row_kernels_leave_room_for_twelve_warps(resources):
    """65536 registers per multiprocessor / (12 warps x 32 threads) = 170 per thread."""
    for r in resources:
        if not r["name"].startswith("linear"):
            assert r["registers"] <= 170, r


@pytest.mark.slow
def test_the_matrix_kernels_use_the_newest_tensor_core_instructions(resources):
    newest = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
    linear = [r for r in resources if r["name"].startswith("linear")]
    assert len(linear) == 12
    for r in linear:
        assert r["tensor_cores"] == newest[r["architecture"]], r


@pytest.mark.slow
def test_scoring_needs_neither_triton_nor_a_gpu():
    code = (
        "import sys; sys.modules['triton'] = None; sys.modules['vllm'] = None; sys.modules['transformers'] = None\n"
        "import torch\nfrom fastkl.kernels.operators import linear_token_scores\n"
        "h, w = torch.randn(3, 4), torch.randn(5, 4)\n"
        "print(float(linear_token_scores(h, w, h, w, torch.tensor([0, 1, 4])).kl.sum()))"
    )
    done = run(["-c", code])
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == 0.0
