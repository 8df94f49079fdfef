"""Sources of logits in PyTorch: heads with hidden states, or the caller's logits.

Each turns a range of rows into processed logits in a reused buffer, and takes the gradient of that range back:
d hidden = d logits @ W, dW += d logits^T @ hidden, accumulated in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..passes import LogitOptions, Side
from ..stats import EXCLUDED

ROW_MULTIPLE = 16
"""Matrix products get a multiple of this many rows, because below 12 rows MKL's order of summation depends on their
number."""


class HeadSource:
    """A Source: logits of a policy head and, optionally, a reference head.

    row_ids i64 [n] picks the scored rows of the hidden states (None: all of them). `excluded`: whether any of the
    logits loaded last may be EXCLUDED.
    """

    raw = False
    """Whether bias and options are left to the kernels that read the logits."""

    def __init__(
        self,
        policy: Side,
        reference: Side | None,
        row_ids: Tensor | None,
        options: LogitOptions,
        chunk_rows: int,
        dtype: torch.dtype,
    ) -> None:
        shared = reference is not None and policy.shares_weights_with(reference)
        self.policy = policy.to(dtype)
        self.reference = None if reference is None or shared else reference.to(dtype)
        if shared:
            self.reference = replace(self.policy, hidden=reference.hidden.detach())
        self.excluded = False
        if not self.raw:
            self._clamp_biases()
        self.shared, self.row_ids, self.options, self.dtype = shared, row_ids, options, dtype
        self.vocab = len(policy.weight)
        self.buffer_rows = -(-chunk_rows // ROW_MULTIPLE) * ROW_MULTIPLE
        new = policy.hidden.new_zeros
        widths = [side.hidden.shape[1] for side in (policy, reference) if side is not None]
        self.hidden_buffers: Any = (
            new(2, self.buffer_rows, widths[0], dtype=dtype)  # one product reads both
            if shared
            else [new(self.buffer_rows, width, dtype=dtype) for width in widths]
        )
        self.logits_buffers: Any = None  # a tensor or a list of two, made by the first load
        self.grad_hidden: Tensor | None = None
        self.grad_weight: Tensor | None = None
        self.grad_bias: Tensor | None = None
        self.weight_for_gradient: Tensor | None = None  # the policy's, made by the first store
        self.loaded_from = 0

    def _clamp_biases(self) -> None:
        """-inf in a bias becomes EXCLUDED, so that 0 * -inf never arises."""
        for name in ("policy", "reference"):
            side = getattr(self, name)
            if side is not None and side.bias is not None and bool((side.bias < EXCLUDED).any()):
                setattr(self, name, replace(side, bias=side.bias.clamp(min=EXCLUDED)))
                self.excluded = True

    def _new_logits_buffers(self) -> Any:
        """[sides, rows, V] where one product fills both sides; else two tensors, since smaller ones are easier to
        allocate."""
        sides, rows = len(self.hidden_buffers), self.buffer_rows
        device = self.hidden_buffers[0].device
        if self.shared:
            return torch.empty(sides, rows, self.vocab, dtype=self.dtype, device=device)
        return [torch.empty(rows, self.vocab, dtype=self.dtype, device=device) for _ in range(sides)]

    def collect_gradients(self, needed: Sequence[bool], inplace: bool) -> None:
        hidden, self.needs_weight_grad, bias = needed
        self.grad_hidden = torch.zeros_like(self.policy.hidden) if hidden else None
        self.grad_weight = None  # the first chunk creates it, which saves a pass over zeros
        self.grad_bias = torch.zeros_like(self.policy.bias) if bias and self.policy.bias is not None else None

    def gradients(self, inputs: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        if self.needs_weight_grad and self.grad_weight is None:  # no row had a gradient
            self.grad_weight = torch.zeros_like(self.policy.weight)
        grads = self.grad_hidden, self.grad_weight, self.grad_bias
        return tuple(g if g is None or x is None else g.to(x.dtype) for g, x in zip(grads, inputs, strict=True))

    def load(self, lo: int, hi: int, need_ref: bool = True) -> tuple[Tensor, Tensor | None]:
        self.loaded_from = lo
        if self.logits_buffers is None:
            self.logits_buffers = self._new_logits_buffers()
        sides = [self.policy] if self.reference is None or not need_ref else [self.policy, self.reference]
        n = -(-(hi - lo) // ROW_MULTIPLE) * ROW_MULTIPLE
        for side, head in enumerate(sides):
            self._read_hidden(head.hidden, lo, hi, self.hidden_buffers[side][:n])
        if len(sides) == 2 and self.shared and n == self.buffer_rows:
            self._product(self.policy, self.hidden_buffers.flatten(0, 1), self.logits_buffers.flatten(0, 1))
        else:
            for side, head in enumerate(sides):
                self._product(head, self.hidden_buffers[side][:n], self.logits_buffers[side][:n])
        logits = [self.logits_buffers[side][: hi - lo] for side in range(len(sides))]
        if not self.raw:
            for x in logits:
                self.options.apply_(x)
        return logits[0], logits[1] if len(logits) == 2 else None

    def store(self, lo: int, hi: int, dlogits: Tensor) -> None:
        hidden = self.hidden_buffers[0][lo - self.loaded_from : hi - self.loaded_from]
        if self.grad_bias is not None:
            self.grad_bias.add_(dlogits.sum(0, dtype=self.grad_bias.dtype))
        if self.weight_for_gradient is None:
            weight = self.policy.weight
            narrow = self.options.gradient_dtype == "bfloat16" and not self.raw and weight.dtype == torch.float32
            self.weight_for_gradient = weight.bfloat16() if narrow else weight
        dlogits, hidden = (x.to(self.weight_for_gradient.dtype) for x in (dlogits, hidden))
        if self.grad_hidden is not None:
            grad = (dlogits @ self.weight_for_gradient).to(self.grad_hidden.dtype)
            if self.row_ids is None:
                self.grad_hidden[lo:hi] = grad
            else:
                self.grad_hidden.index_copy_(0, self.row_ids[lo:hi], grad)
        if self.needs_weight_grad:
            self._accumulate_weight(dlogits, hidden)

    def _accumulate_weight(self, dlogits: Tensor, hidden: Tensor) -> None:
        if self.grad_weight is None:
            self.grad_weight = (dlogits.t() @ hidden).to(self.policy.weight.dtype)
        elif dlogits.dtype == self.grad_weight.dtype:
            self.grad_weight.addmm_(dlogits.t(), hidden)
        else:
            self.grad_weight.add_(dlogits.t() @ hidden)

    def _read_hidden(self, hidden: Tensor, lo: int, hi: int, out: Tensor) -> None:
        out[hi - lo :].zero_()
        out[: hi - lo].copy_(hidden[lo:hi] if self.row_ids is None else hidden.index_select(0, self.row_ids[lo:hi]))

    def _product(self, head: Side, hidden: Tensor, out: Tensor) -> None:
        torch.mm(hidden, head.weight.t(), out=out)
        if head.bias is not None and not self.raw:
            out.add_(head.bias)


class LogitsSource:
    """A Source: given logits [*, V] of policy and reference; the gradient goes into a tensor like the policy's."""

    def __init__(
        self,
        policy_logits: Tensor,
        ref_logits: Tensor | None,
        row_ids: Tensor | None,
        options: LogitOptions,
        chunk_rows: int,
        dtype: torch.dtype,
    ) -> None:
        self.logits = [x.detach() for x in (policy_logits, ref_logits) if x is not None]
        self.row_ids, self.options, self.dtype = row_ids, options, dtype
        self.vocab = policy_logits.shape[1]
        device = policy_logits.device
        self.buffers = [torch.empty(chunk_rows, self.vocab, dtype=dtype, device=device) for _ in self.logits]
        self.excluded = False
        self.grad_logits: Tensor | None = None

    def collect_gradients(self, needed: Sequence[bool], inplace: bool) -> None:
        logits = self.logits[0]
        self.grad_logits = logits if inplace else torch.zeros_like(logits, memory_format=torch.contiguous_format)
        if inplace and self.row_ids is not None:  # rows that are not scored have no gradient
            scored = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
            logits.masked_fill_(~scored.index_fill_(0, self.row_ids, True)[:, None], 0)

    def gradients(self, inputs: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        return (self.grad_logits,)

    def load(self, lo: int, hi: int, need_ref: bool = True) -> tuple[Tensor, Tensor | None]:
        """-inf becomes EXCLUDED, so that 0 * -inf never arises."""
        out, self.excluded = [], False
        for logits, buffer in zip(self.logits[: 2 if need_ref else 1], self.buffers, strict=False):
            x = logits[lo:hi] if self.row_ids is None else logits.index_select(0, self.row_ids[lo:hi])
            x = buffer[: hi - lo].copy_(x)
            if bool((x.amin(1) < EXCLUDED).any()):  # looking is cheaper than clamping
                x.clamp_(min=EXCLUDED)
                self.excluded = True
            out.append(x)
        return out[0], out[1] if len(out) == 2 else None

    def store(self, lo: int, hi: int, dlogits: Tensor) -> None:
        if self.row_ids is None:
            self.grad_logits[lo:hi] = dlogits.to(self.grad_logits.dtype)
        else:
            self.grad_logits.index_copy_(0, self.row_ids[lo:hi], dlogits.to(self.grad_logits.dtype))
