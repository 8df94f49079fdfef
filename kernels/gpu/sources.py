"""Sources of raw logits for the kernels, which apply bias, rounding, softcap, scale and temperature as they read.

A head's output is a product by the BLAS; given logits are read where they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..cpu import sources as cpu
from ..passes import LogitOptions, Side


class HeadSource(cpu.HeadSource):
    """Half-precision heads multiplied as they are, with float32 logits straight from the accumulators.

    The gradient of the logits is written in the heads' dtype: d hidden and dW are half-precision products that
    accumulate in float32. (In the interpreter the heads are multiplied in `dtype`.)
    """

    raw = True
    picked = None
    """No row ids are left to the kernels: the rows were picked before the product."""
    has_inf = False
    """Products are finite; a bias need not be, which the kernels are told of separately."""

    def __init__(
        self,
        policy: Side,
        reference: Side | None,
        row_ids: Tensor | None,
        options: LogitOptions,
        chunk_rows: int,
        dtype: torch.dtype,
    ) -> None:
        dtype = policy.hidden.dtype if policy.hidden.is_cuda else dtype
        super().__init__(policy, reference, row_ids, options, chunk_rows, dtype)
        self.dtype = torch.float32  # of the logits
        biases = [None if side is None else side.bias for side in (policy, reference)]
        if policy.hidden.is_cuda and options.rounded_by_product(dtype, *biases):
            self.dtype = torch.bfloat16
        self.dlogits_buffer: Tensor | None = None

    def biases(self) -> tuple[Tensor | None, Tensor | None]:
        """The policy's and the reference's, f32 [V]."""
        ref_bias = None if self.reference is None else self.reference.bias
        policy, reference = (None if b is None else b.float() for b in (self.policy.bias, ref_bias))
        return policy, reference

    def gradient_buffer(self, z: Tensor) -> Tensor:
        """Where the gradient of the chunk z goes: over the logits if the dtype is the same."""
        if self.policy.weight.dtype == z.dtype:
            return z
        if self.dlogits_buffer is None:
            assert self.logits_buffers is not None
            self.dlogits_buffer = torch.empty_like(self.logits_buffers[0], dtype=self.policy.weight.dtype)
        return self.dlogits_buffer[: len(z)]

    def _product(self, head: Side, hidden: Tensor, out: Tensor) -> None:
        if hidden.dtype == out.dtype:
            torch.mm(hidden, head.weight.t(), out=out)
        else:
            torch.mm(hidden, head.weight.t(), out_dtype=torch.float32, out=out)

    def _accumulate_weight(self, dlogits: Tensor, hidden: Tensor) -> None:
        if hidden.dtype == torch.float32:
            super()._accumulate_weight(dlogits, hidden)
        elif self.grad_weight is None:
            self.grad_weight = torch.mm(dlogits.t(), hidden, out_dtype=torch.float32)
        else:
            torch.addmm(self.grad_weight, dlogits.t(), hidden, out_dtype=torch.float32, out=self.grad_weight)


class LogitsSource(cpu.LogitsSource):
    """The caller's logits, read in place; where rows are masked the kernel picks them by row_ids."""

    has_inf = True
    """Samplers write -inf over the ids that they exclude."""

    def __init__(
        self, policy_logits: Tensor, ref_logits: Tensor | None, row_ids: Tensor | None, options: LogitOptions, *_: Any
    ) -> None:
        given = (x.detach() for x in (policy_logits, ref_logits) if x is not None)
        self.logits = [x if x.stride(1) == 1 else x.contiguous() for x in given]  # rows may be strided, ids may not
        self.row_ids, self.options, self.vocab = row_ids, options, policy_logits.shape[1]
        self.grad_logits: Tensor | None = None

    @property
    def picked(self) -> Tensor | None:
        """The row ids by which the kernel has to find its rows."""
        return self.row_ids

    def biases(self) -> tuple[None, None]:
        """Given logits have none left to add."""
        return None, None

    def load(self, lo: int, hi: int, need_ref: bool = True) -> tuple[Tensor, Tensor | None]:
        """Rows lo..hi; or all rows, if the kernel has to find them through row_ids."""
        self.rows = slice(lo, hi) if self.row_ids is None else slice(None)
        out = [x[self.rows] for x in self.logits]
        return out[0], out[1] if len(out) == 2 else None

    def gradient_buffer(self, z: Tensor) -> Tensor:
        """The same rows of the gradient that is handed back."""
        return self.grad_logits[self.rows]

    def store(self, lo: int, hi: int, dlogits: Tensor) -> None:
        """Nothing to do, since the kernel has written the gradient."""
