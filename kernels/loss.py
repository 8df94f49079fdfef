"""A loss that is linear in the scores, with its gradient taken in the forward: four head products instead of six.

loss = sum over rows and scores of coefficient * score. The coefficients are either known beforehand, or follow from the
scores of whole groups of rows (the samples of one prompt share a baseline): then a function is called with each group's
finished scores, while the group's logits are still in the buffer. Rows whose coefficients are all zero cost no
backward.

A group whose logits are more than that buffer may hold (`chunk_tokens`, or HELD_BYTES) is gone over twice, in chunks:
the first time for its scores, the second, after the function, for the gradient. That takes six products again, and
memory does not follow the group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .active import active_rows
from .autograd import Chunk, Inputs, policy_of, without_autocast
from .call import Call
from .errors import UserError
from .passes import Passes, chunk_ranges
from .stats import RowStats
from .types import CoefficientsFunction, TokenCoefficients, TokenScores

HELD_BYTES = {"cpu": 1 << 30, "cuda": 8 << 30}
"""What the logits of one group may take, policy's and reference's together, where chunk_tokens does not say."""


class LossFunction(torch.autograd.Function):
    """(Call, coefficients, row_splits, *policy inputs) -> the loss, and the fields of TokenScores as constants."""

    @staticmethod
    @without_autocast()
    def forward(
        ctx: Any,
        call: Call,
        coefficients: TokenCoefficients | CoefficientsFunction,
        row_splits: list[int],
        *inputs: Tensor | None,
    ) -> Inputs:
        """row_splits: ascending from 0 to N, the rows at which a call of a coefficients function may begin or end."""
        needed = ctx.needs_input_grad[3:]
        if callable(coefficients):
            loss, scores, passes = _with_function(call, coefficients, row_splits, inputs, needed)
        else:
            loss, scores, passes = _with_constants(call, coefficients, inputs, needed)
        ctx.gradients = call.finished(passes.source.gradients(inputs)) if any(needed) else None
        ctx.use_triton = call.use_triton
        ctx.mark_non_differentiable(*(x for x in scores.values() if x is not None))
        ctx.set_materialize_grads(False)
        return loss.to(call.dtype), *scores.values()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> Inputs | None:
        """Scales the gradients taken in the forward."""
        if grad_loss is None:
            return None
        if ctx.gradients is None:
            raise RuntimeError("linear_token_loss keeps its gradient for one backward: call it again for another one")
        gradients, ctx.gradients = ctx.gradients, None
        for gradient in gradients:
            if gradient is not None:
                scale_(gradient, grad_loss, ctx.use_triton)
        return None, None, None, *gradients


def scale_(x: Tensor, factor: Tensor, use_triton: bool) -> None:
    """x *= factor, a number on the same device. It is usually 1, and then there is nothing to do."""
    if use_triton:
        from .gpu import passes

        passes.scale_(x, factor)
    elif factor.device.type != "cpu" or factor != 1:
        x.mul_(factor)


def _with_constants(
    call: Call, coefficients: TokenCoefficients, inputs: Inputs, needed: tuple[bool, ...]
) -> tuple[Tensor, TokenScores, Passes]:
    """Rows with a gradient first, the others after them; within that, chunk by chunk."""
    check_coefficients(coefficients, call.available(), call.num_rows)
    if call.row_ids is not None:
        coefficients = coefficients.select(call.row_ids)
    given, coefficients = coefficients, call.effective(coefficients)
    active = active_rows(coefficients, len(call.rows)) if any(needed) else torch.empty(0)
    num_active = len(active)
    if 0 < num_active < len(call.rows):
        inactive = torch.ones(len(call.rows), dtype=torch.bool, device=active.device).index_fill_(0, active, False)
        order = torch.cat([active, inactive.nonzero()[:, 0]])
        call, given, coefficients = call.select(order), given.select(order), coefficients.select(order)
    stats, support_stats = call.empty_stats()
    passes = _passes(call, inputs, needed, stats, support_stats)
    for lo, hi in chunk_ranges(len(call.rows), call.chunk_rows):
        if hi <= num_active:
            passes.score_and_gradient(lo, hi, coefficients.select(slice(lo, hi)))
            continue
        chunk = Chunk(passes, lo, *passes.score(lo, hi))
        if lo < num_active:
            chunk.gradient(coefficients.select(slice(lo, hi)))
    rows_only = replace(call, row_ids=None).scores(stats, support_stats)
    return _linear_loss(given, rows_only), call.scores(stats, support_stats), passes


def _passes(
    call: Call, inputs: Inputs, needed: tuple[bool, ...], stats: RowStats, support_stats: RowStats | None
) -> Passes:
    """The passes of a call, ready for its gradients."""
    source = call.source(policy_of(inputs))
    if any(needed):
        source.collect_gradients(needed, inplace=False)
    return call.passes(source, stats, support_stats)


def _with_function(
    call: Call, function: CoefficientsFunction, row_splits: list[int], inputs: Inputs, needed: tuple[bool, ...]
) -> tuple[Tensor, TokenScores, Passes]:
    """Chunks of whole groups of rows; the function is called for each chunk, in order. Of a group that is too large
    only the statistics are kept until then."""
    ranges = list(_pack(row_splits, call.chunk_rows))
    chunk_rows, held_rows = call.chunk_rows, _held_rows(call, inputs)
    offsets: Sequence[int] = range(call.num_rows + 1)  # offsets[i]: how many of the scored rows lie before row i
    if call.row_ids is not None:
        scored = torch.zeros(call.num_rows, dtype=torch.int64).index_fill_(0, call.row_ids.cpu(), 1)
        offsets = [0, *scored.cumsum(0).tolist()]
    sizes = [offsets[hi] - offsets[lo] for lo, hi in ranges]
    call = replace(call, chunk_rows=max((size if size <= held_rows else chunk_rows for size in sizes), default=1))
    stats, support_stats = call.empty_stats()
    passes = _passes(call, inputs, needed, stats, support_stats)
    loss = torch.zeros((), dtype=torch.float64, device=call.rows.target_ids.device)
    for lo, hi in ranges:
        first, last = offsets[lo], offsets[hi]
        fits = last - first <= held_rows
        pieces = (
            [(first, last)] if fits else [(first + i, first + j) for i, j in chunk_ranges(last - first, chunk_rows)]
        )
        for i, j in pieces:
            chunk = Chunk(passes, i, *passes.score(i, j))
        row_ids = None if call.row_ids is None else call.row_ids[first:last] - lo
        part = replace(call, num_rows=hi - lo, row_ids=row_ids, rows=call.rows.select(slice(first, last)))
        scores = part.scores(stats[first:last], None if support_stats is None else support_stats[first:last])
        coefficients = function(slice(lo, hi), scores)
        check_coefficients(coefficients, call.available(), hi - lo)
        loss += _linear_loss(coefficients, scores)
        if not any(needed):
            continue
        coefficients = part.effective(coefficients if row_ids is None else coefficients.select(row_ids))
        if fits:
            chunk.gradient(coefficients)
            continue
        for i, j in pieces:
            _gradient_again(passes, i, j, coefficients.select(slice(i - first, j - first)))
    return loss, call.scores(stats, support_stats), passes


def _held_rows(call: Call, inputs: Inputs) -> int:
    """Of how many rows of one group the logits may be held at once."""
    if call.chunk_given:
        return call.chunk_rows
    policy, *weights = inputs
    assert policy is not None
    vocab = policy.shape[-1] if not weights else len(weights[0])
    if call.rows.share is not None:
        vocab = call.rows.share.widest
    return max(call.chunk_rows, HELD_BYTES.get(policy.device.type, 0) // (2 * call.dtype.itemsize * vocab))


def _gradient_again(passes: Passes, lo: int, hi: int, coefficients: TokenCoefficients) -> None:
    """The gradient of rows whose logits are gone; their statistics are known. coefficients: of these rows."""
    if len(active_rows(coefficients, hi - lo)):
        passes.gradient_(lo, hi, *passes.reload(lo, hi, coefficients.need_reference), coefficients)


def _pack(row_splits: list[int], chunk_rows: int) -> Iterator[tuple[int, int]]:
    """Ranges of as many whole groups as fit into `chunk_rows` rows, but at least one group."""
    start = 0
    for previous, split in zip(row_splits, row_splits[1:], strict=False):
        if split - start > chunk_rows and previous > start:
            yield start, previous
            start = previous
    if row_splits[-1] > start:
        yield start, row_splits[-1]


def _linear_loss(coefficients: TokenCoefficients, scores: TokenScores) -> Tensor:
    """sum of coefficient * score over fields and rows, in float64."""
    loss = torch.zeros((), dtype=torch.float64, device=scores.policy_logprobs.device)
    for name in TokenCoefficients.__slots__:
        coefficient = getattr(coefficients, name)
        if coefficient is not None:
            loss += torch.dot(coefficient.double(), getattr(scores, name).double())
    return loss


def check_coefficients(coefficients: TokenCoefficients, available: set[str], num_rows: int) -> None:
    """One number per row, and only for scores that are computed."""
    for name in TokenCoefficients.__slots__:
        coefficient = getattr(coefficients, name)
        if coefficient is None:
            continue
        if name not in available:
            raise UserError(
                f"coefficients.{name} is given, but that score is not computed here: pass the reference, "
                "the support or the entry of `outputs` that it needs."
            )
        if list(coefficient.shape) != [num_rows]:
            raise UserError(f"coefficients.{name} has shape {list(coefficient.shape)}, expected [{num_rows}].")
