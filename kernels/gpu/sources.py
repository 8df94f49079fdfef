"""Sources of raw logits for the kernels, which apply bias, rounding, softcap, scale and temperature as they read.

A head's output is a product by the BLAS; given logits are read where they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..cpu import sources as cpu
from ..passes import LogitOptions, Side


def new_source(
    policy: Side | Tensor,
    reference: Side | Tensor | None,
    row_ids: Tensor | None,
    options: LogitOptions,
    chunk_rows: int,
    dtype: torch.dtype,
) -> HeadSource | LogitsSource:
    """The source of one call; the products keep the heads' dtype, but for the interpreter's, which are `dtype`."""
    if isinstance(policy, Side):
        assert not isinstance(reference, Tensor)
        dtype = policy.hidden.dtype if policy.hidden.is_cuda else dtype
        return HeadSource(policy, reference, row_ids, options, chunk_rows, dtype)
    assert not isinstance(reference, Side)
    return LogitsSource(policy, reference, row_ids, options)


class HeadSource(cpu.HeadSource):
    """Half-precision heads multiplied as they are, with float32 logits straight from the accumulators.

    The gradient of the logits is written in the heads' dtype: d hidden and dW are half-precision products that
    accumulate in float32.
    """

    picked = None
    """No row ids are left to the kernels: the rows were picked before the product."""

    def __init__(
        self,
        policy: Side,
        reference: Side | None,
        row_ids: Tensor | None,
        options: LogitOptions,
        chunk_rows: int,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(policy, reference, row_ids, options, chunk_rows, dtype, raw=True)
        self.dtype = torch.float32  # of the logits
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
        if hidden.dtype == torch.float32:
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


class LogitsSource:
    """The caller's logits, read in place; where rows are masked the kernel picks them by row_ids."""

    def __init__(
        self, policy_logits: Tensor, ref_logits: Tensor | None, row_ids: Tensor | None, options: LogitOptions
    ) -> None:
        # rows may be strided, ids may not
        self.policy, self.reference = (
            x if x is None or x.stride(1) == 1 else x.contiguous()
            for x in (policy_logits.detach(), None if ref_logits is None else ref_logits.detach())
        )
        self.row_ids, self.options, self.vocab = row_ids, options, policy_logits.shape[1]
        self.grad_logits: Tensor | None = None

    @property
    def picked(self) -> Tensor | None:
        """The row ids by which the kernel has to find its rows."""
        return self.row_ids

    def biases(self) -> tuple[None, None]:
        """Given logits have none left to add."""
        return None, None

    def collect_gradients(self, needed: Sequence[bool], inplace: bool) -> None:
        """See Source.collect_gradients."""
        self.grad_logits = cpu.room_for_gradient(self.policy, self.row_ids, inplace)

    def gradients(self, inputs: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """See Source.gradients."""
        return (self.grad_logits,)

    def load(self, lo: int, hi: int, need_ref: bool = True) -> tuple[Tensor, Tensor | None]:
        """Rows lo..hi; or all rows, if the kernel has to find them through row_ids."""
        self.rows = slice(lo, hi) if self.row_ids is None else slice(None)
        return self.policy[self.rows], None if self.reference is None else self.reference[self.rows]

    def gradient_buffer(self, z: Tensor) -> Tensor:
        """The same rows of the gradient that is handed back."""
        return self.grad_logits[self.rows]

    def store(self, lo: int, hi: int, dlogits: Tensor) -> None:
        """Nothing to do, since the kernel has written the gradient."""
