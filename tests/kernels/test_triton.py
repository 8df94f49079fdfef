"""The Triton kernels without a GPU: interpreted, and compiled to machine code that keeps to a budget."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from itertools import product
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent
GPU = HERE.parent.parent / "kernels" / "gpu"


def run(arguments: list[str], **environment: str) -> subprocess.CompletedProcess:
    """Python in a process of its own, which is no worker of pytest-xdist even where this one is."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and not k.startswith("PYTEST_XDIST")}
    env |= {"PYTHONPATH": os.pathsep.join([str(HERE.parent.parent), str(HERE)]), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, cwd=HERE)


def interpreter_needs_an_older_numpy() -> bool:
    """Triton 3.6 takes arrays of one number for integers, which NumPy does no longer since 2.5."""
    from triton.runtime import interpreter

    numpy = [int(part) for part in version("numpy").split(".")[:2]]
    return numpy >= [2, 5] and "int(self.handle.data)" in inspect.getsource(interpreter)


@pytest.mark.slow
def test_kernels_match_float64_under_the_interpreter():
    """The part of interpreted_triton.py that launches every kernel with every flag; `make kernels` runs all of it."""
    if interpreter_needs_an_older_numpy():
        pytest.skip("this Triton's interpreter does not run with NumPy 2.5 or newer")
    done = run(["-m", "pytest", "-q", "-x", str(HERE / "interpreted_triton.py")], TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and not any(word in done.stdout for word in (" failed", " skipped"))


NEWEST = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
"""The instruction of a matrix product on every architecture."""

MATRIX_KERNELS = {"linear_score_kernel", "linear_gradient_kernel"}
ALL_KERNELS = {
    name
    for file in ("divergences", "heads", "rows", "slices", "supports")
    for name in re.findall(r"^def (\w+_kernel)\(", (GPU / f"{file}.py").read_text(), re.M)
}


@pytest.fixture(scope="module", params=["brief", pytest.param("whole", marks=pytest.mark.kernels)])
def table(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def resources(table) -> list[dict]:
    """What the kernels need on every architecture: of most one configuration, or all of them."""
    options = ["--brief"] if table == "brief" else []
    command = ["-W", "ignore", "-m", "fastkl.kernels.resources", "--json", *options]
    done = run(command, TRITON_DEFAULT_FP_FUSION="1")
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.slow
def test_every_kernel_is_compiled_for_every_architecture(resources, table):
    """In brief, the matrix kernels for every architecture, and all for sm_90."""
    expected = set(product(ALL_KERNELS, NEWEST))
    if table == "brief":
        expected = set(product(MATRIX_KERNELS, NEWEST)) | set(product(ALL_KERNELS, [90]))
    assert ALL_KERNELS > MATRIX_KERNELS
    assert {(r["kernel"], r["architecture"]) for r in resources} == expected


@pytest.mark.slow
def test_no_kernel_spills_registers_in_its_loops_on_any_architecture(resources):
    """Up to 16 bytes may be put aside before the loop over the vocabulary and fetched after it, at no cost that can be
    measured: ptxas of Triton 3.9 does so with the target's two logits in support_sums_kernel on sm_80, where it prefers
    96 registers to 98. No other kernel spills at all."""
    spills = {(r["name"], r["architecture"]): r["spills_in_loops"] for r in resources if r["spilled_bytes"]}
    assert not any(spills.values()), spills
    assert {r["kernel"] for r in resources if r["spilled_bytes"]} <= {"support_sums_kernel"}, spills
    assert max(r["spilled_bytes"] for r in resources) <= 16


@pytest.mark.slow
def test_shared_memory_stays_within_the_chips_limit(resources):
    limits = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
    for r in resources:
        assert r["shared_bytes"] <= limits[r["architecture"]], r


@pytest.mark.slow
def test_row_kernels_leave_room_for_twelve_warps(resources):
    """65536 registers per multiprocessor / (12 warps x 32 threads) = 170 per thread."""
    for r in resources:
        if r["kernel"] not in MATRIX_KERNELS:
            assert r["registers"] <= 170, r


@pytest.mark.slow
def test_the_matrix_kernels_and_no_others_use_the_newest_tensor_core_instructions(resources):
    for r in resources:
        newest = NEWEST[r["architecture"]] if r["kernel"] in MATRIX_KERNELS else ""
        assert r["tensor_cores"] == newest, r


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
