"""The matrix of checks (matrix.py) in PyTorch on the CPU, and with the kernels on a GPU where there is one."""

from __future__ import annotations

import re

import pytest
import torch
from cases import slow_where
from matrix import CPU, CUDA, checks

AGAIN = re.compile("excluded logits .*support (top_k|min_p|banned)")  # as on the other supports


@pytest.mark.parametrize(
    "check", slow_where(lambda check: AGAIN.match(check.name), checks(CPU)), ids=lambda check: check.name
)
def test_the_operators_pass_the_matrix_on_a_cpu(check):
    check.run()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("check", list(checks(CUDA)), ids=lambda check: check.name)
def test_the_kernels_pass_the_matrix_on_a_gpu(check):
    check.run()
