"""Which implementation serves a call: the Triton kernels on a GPU, plain PyTorch elsewhere."""

from __future__ import annotations

import os
from importlib.util import find_spec

from torch import Tensor


def interpreting() -> bool:
    """Whether Triton's interpreter was asked for (TRITON_INTERPRET=1): the kernels then run on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


def uses_triton(policy: Tensor) -> bool:
    """Triton serves CUDA tensors where it is installed, and CPU tensors under its interpreter."""
    return (policy.is_cuda or (policy.device.type == "cpu" and interpreting())) and find_spec("triton") is not None
