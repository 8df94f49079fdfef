"""Which block and how many warps the kernel that scores a chunk and writes its gradient should have, on this GPU.

    python bench/operators/row_shapes.py [--output bench/results/gpu/row_shapes.json]

Float32 logits of policy and reference, 1,664 rows of 151,936 ids: read twice, with a bfloat16 gradient written, 18
bytes a pair. Each shape's rate stands beside that of a large copy in the same run. The constants in
kernels/gpu/passes.py come from here.
"""

from __future__ import annotations

import sys
from statistics import median
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench import common
from fastkl.kernels.gpu import passes
from fastkl.kernels.gpu.rows import VECTOR
from fastkl.kernels.operators import TokenCoefficients, linear_token_loss

ROWS, HIDDEN, VOCAB = 1664, 64, 151936
SHAPES = [(512, 1), (1024, 1), (1024, 2), (2048, 2), (1024, 4), (2048, 4), (4096, 4), (1024, 8), (2048, 8), (4096, 8),
          (2048, 16), (4096, 16)]  # fmt: skip


def score_with_gradient(chunks: int = 2) -> Any:
    """A call whose time is the kernel's: the head has so few features that its products hardly count."""
    g = torch.Generator("cuda").manual_seed(0)

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=g, device="cuda").bfloat16()

    rows = chunks * ROWS
    hidden, ref_hidden, weight, ref_weight = (randn(n, HIDDEN) for n in (rows, rows, VOCAB, VOCAB))
    targets = torch.randint(0, VOCAB, (rows,), generator=g, device="cuda")
    factors = TokenCoefficients(policy_logprobs=torch.randn(rows, device="cuda"), kl=torch.rand(rows, device="cuda"))
    hidden.requires_grad_()
    return lambda: linear_token_loss(
        hidden, weight / 4, ref_hidden, ref_weight / 4, targets, factors, chunk_tokens=ROWS
    )


def rates(call: Any, repeats: int = 4) -> tuple[float, float]:
    """Terabytes per second of the kernel and of a copy."""
    x = torch.randn(1 << 28, device="cuda")
    y = torch.empty_like(x)
    call(), call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(repeats):
            call()
        y.copy_(x)
        torch.cuda.synchronize()
    events = [e for e in recorded.events() if e.device_type == DeviceType.CUDA]
    kernel_us = median(e.time_range.elapsed_us() for e in events if "score_kernel" in e.name)
    copy_us = max(e.time_range.elapsed_us() for e in events if "Memcpy" in e.name)
    return 18 * ROWS * VOCAB / kernel_us / 1e6, 8 * x.numel() / copy_us / 1e6


def main() -> None:
    """Times every shape and writes the table."""
    options = common.parser(__doc__, "gpu/row_shapes.json").parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench/operators/row_shapes.py needs an NVIDIA GPU")
    call, table = score_with_gradient(), []
    for block, warps in SHAPES:
        passes.SCORE_AND_GRADIENT = passes.Shape(block, VECTOR.value * 32 * warps, warps)
        kernel, copy = rates(call)
        table.append({"block": block, "warps": warps, "tb_per_s": round(kernel, 2), "copy_tb_per_s": round(copy, 2)})
        print(table[-1], flush=True)
    common.write(options.output, {"shapes": table})


if __name__ == "__main__":
    main()
