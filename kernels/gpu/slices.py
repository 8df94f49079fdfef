"""The gradient of a head's scores from known statistics, by slices of the vocabulary: what autograd's backward needs.

Once the statistics of every row are known, the gradient of a tile of logits needs nothing but that tile. So the
backward goes over the vocabulary instead of over the rows: for one slice of ids, `linear_gradient_kernel` multiplies
hidden states and head once more and writes dL/dlogits straight from the registers, in the heads' dtype; two products by
the BLAS make d hidden and the slice of dW from it. Against chunks of rows no float32 logits are stored, and dW is
written once, in its own dtype, instead of being read and written in float32 by every chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..passes import LogitOptions, Side, chunk_ranges
from ..stats import RowStats
from ..types import TokenCoefficients
from .heads import BLOCK_ROWS, NUM_WARPS, Operands, Sizes, descriptor, has_target, place_of_program, raw_logits
from .rows import LOG2E, before_processing, one_minus_exp, process_logits, weighted

SLICE_IDS, SLICE_ROWS = 16384, 16384
"""How many logits' gradients are held at a time: 0.5 GiB in 16 bits."""

ELEMENT_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Known(NamedTuple):
    """The statistics and factors of the rows, f32 [n] a field, fields a stride apart; and the first id of the slice."""

    stats: Any
    stats_stride: Any
    factors: Any  # a, b, c of gradient_block: of the log-prob, the entropy and the KL
    factors_stride: Any
    first_id: Any


@triton.jit
def stat(known, field: tl.constexpr, rows, inside):
    """A field of the rows' RowStats, [rows, 1]."""
    return tl.load(known.stats + field * known.stats_stride + rows, mask=inside, other=0.0)[:, None]


@triton.jit
def factor(known, index: tl.constexpr, rows, inside):
    """A factor of the rows, [rows, 1]."""
    return tl.load(known.factors + index * known.factors_stride + rows, mask=inside, other=0.0)[:, None]


@triton.jit
def slope(centred, gap, known, rows, inside, FLAGS: tl.constexpr):
    """What multiplies p in gradient_block, the target's own a left out of it: -a - b (z - E_p[z]) + c (d - E_p[d]).
    centred: z - max; gap: that less the reference's."""
    result = -factor(known, 0, rows, inside)
    if FLAGS.has_b:
        result = result - factor(known, 1, rows, inside) * (centred - stat(known, 2, rows, inside))
    if FLAGS.has_c:  # an infinite KL without a factor has no gradient
        c = factor(known, 2, rows, inside)
        result = result + tl.where(c == 0.0, 0.0, c * (gap - stat(known, 7, rows, inside)))
    return result


@triton.jit
def at_target(known, rows, inside, FLAGS: tl.constexpr):
    """The gradient at the rows' own targets, [rows, 1], from their statistics alone: a (1 - p) in place of -a p,
    without cancellation where p is near 1."""
    logprob = stat(known, 3, rows, inside)
    centred = logprob + stat(known, 1, rows, inside)
    gap = centred
    if FLAGS.has_c:
        gap = centred - (stat(known, 6, rows, inside) + stat(known, 5, rows, inside))
    a = factor(known, 0, rows, inside)
    p = tl.exp2(logprob * LOG2E)
    others = weighted(p, slope(centred, gap, known, rows, inside, FLAGS) + a)  # infinite where the target is excluded
    return others + a * one_minus_exp(logprob)


@triton.jit
def linear_gradient_kernel(
    h, w, hr, wr, out, strides, out_stride, vectors, known, sizes, softcap, scale,
    FLAGS: tl.constexpr, TILE: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """dL/d(head's output) of one tile of rows and of the slice's ids, by the formula of rows.gradient_block."""
    num_rows, vocab, hidden, num_row_blocks, num_tiles = sizes
    BLOCK_ROWS: tl.constexpr = TILE.rows
    BLOCK_VOCAB: tl.constexpr = TILE.vocab
    row_block, tile = place_of_program(num_row_blocks, num_tiles, TILE)
    first_row = row_block * BLOCK_ROWS
    first_id = tile * BLOCK_VOCAB
    rows = first_row + tl.arange(0, BLOCK_ROWS)
    ids = first_id + tl.arange(0, BLOCK_VOCAB)
    inside = rows < num_rows
    scale += tl.zeros([BLOCK_ROWS, 1], tl.float32)
    if FLAGS.row_temperature:
        scale /= tl.load(vectors.temperature + rows, mask=inside, other=1.0)[:, None]
    numbers = (vocab, softcap, scale)
    place = first_row, num_rows, first_id, vocab, hidden
    z, r = raw_logits(h, w, hr, wr, strides, vectors, place, FLAGS, TILE)

    z = process_logits(z, numbers, FLAGS, False)
    if FLAGS.has_c:
        r = process_logits(r, numbers, FLAGS, False)
    centred = z - stat(known, 0, rows, inside)
    gap = centred - (r - stat(known, 4, rows, inside))
    d = tl.exp2((centred - stat(known, 1, rows, inside)) * LOG2E) * slope(centred, gap, known, rows, inside, FLAGS)
    target = tl.load(vectors.target + rows, mask=inside, other=-1).to(tl.int32) - known.first_id
    if has_target(target, first_id, BLOCK_VOCAB):
        d = tl.where(ids[None, :] == target[:, None], at_target(known, rows, inside, FLAGS), d)
    d = before_processing(d, z, numbers, FLAGS).to(OUT)
    if TILE.descriptors:
        out.store([first_row, first_id], d)
    else:
        place = out + rows[:, None].to(tl.int64) * out_stride + ids[None, :]
        tl.store(place, d, mask=inside[:, None] & (ids < vocab)[None, :])


class Gradients:
    """What the slices add up to: d hidden [n, H] in float32, dW [V, H] in the head's dtype, d bias f32 [V].

    needed: whether hidden states, weight and bias want a gradient.
    """

    def __init__(self, operands: Operands, needed: Sequence[bool]) -> None:
        states, weight, bias = operands.states[0], operands.weights[0], operands.bias
        self.states, self.weight = states, weight
        self.hidden = states.new_zeros(states.shape, dtype=torch.float32) if needed[0] else None
        new = torch.empty_like if len(states) else torch.zeros_like
        self.head = new(weight, memory_format=torch.contiguous_format) if needed[1] else None
        self.bias = torch.zeros_like(bias) if needed[2] and bias is not None else None

    def add(self, d: Tensor, rows: slice, ids: slice, of_head: Tensor | None) -> None:
        """d: of the logits of these rows and ids. of_head: where dW of these ids is added up, if of several blocks of
        rows."""
        if self.hidden is not None:
            add_product_(self.hidden[rows], d, self.weight[ids])
        if of_head is not None:
            add_product_(of_head, d.t(), self.states[rows])
        elif self.head is not None:
            torch.mm(d.t(), self.states[rows], out=self.head[ids])
        if self.bias is not None:
            self.bias[ids] += d.sum(0, dtype=torch.float32)


def add_product_(x: Tensor, a: Tensor, b: Tensor) -> None:
    """x += a @ b, in float32."""
    if a.dtype == torch.float32:
        x.addmm_(a, b)
    else:
        torch.addmm(x, a, b, out_dtype=torch.float32, out=x)


def linear_gradient(
    policy: Side,
    reference: Side | None,
    target_ids: Tensor,
    row_ids: Tensor | None,
    options: LogitOptions,
    stats: RowStats,
    coefficients: TokenCoefficients,
    needed: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients of (hidden, weight, bias), each where it is needed, from the statistics over the full vocabulary of
    the n scored rows and their coefficients.

    Rows that are not scored have none. Memory beyond these gradients: one slice, and d hidden in float32.
    """
    operands = Operands(policy, None if coefficients.kl is None else reference, row_ids, options)
    operands.flags = operands.flags._replace(has_b=coefficients.entropy is not None, has_c=coefficients.kl is not None)
    gradients = Gradients(operands, needed)
    num_rows, vocab = len(target_ids), len(policy.weight)
    several = num_rows > SLICE_ROWS
    width = -(-min(vocab, SLICE_IDS) // operands.shape.vocab) * operands.shape.vocab
    buffer = policy.hidden.new_empty(min(num_rows, SLICE_ROWS), width, dtype=operands.dtype)
    factors = factors_of(coefficients, num_rows, target_ids.device)
    for first, end in chunk_ranges(vocab, SLICE_IDS):
        ids = slice(first, end)
        of_head = None
        if several and gradients.head is not None:
            of_head = gradients.head.new_zeros(end - first, policy.weight.shape[1], dtype=torch.float32)
        for lo, hi in chunk_ranges(num_rows, SLICE_ROWS):
            rows = slice(lo, hi)
            d = buffer[: hi - lo, : end - first]
            launch(operands, d, target_ids, stats, factors, rows, ids)
            gradients.add(d, rows, ids, of_head)
        if of_head is not None:
            gradients.head[ids] = of_head
    hidden, head, bias = gradients.hidden, gradients.head, gradients.bias
    if hidden is not None and row_ids is not None:
        hidden = torch.zeros_like(policy.hidden).index_copy_(0, row_ids, hidden.to(policy.hidden.dtype))
    return tuple(
        None if grad is None or x is None else grad.to(x.dtype)
        for grad, x in zip((hidden, head, bias), (policy.hidden, policy.weight, policy.bias), strict=True)
    )


def launch(
    operands: Operands, d: Tensor, target_ids: Tensor, stats: RowStats, factors: Tensor, rows: slice, ids: slice
) -> None:
    """Fills d with the gradient of the logits of these rows and ids."""
    num_rows, num_ids = d.shape
    tile, shape, options = operands.tile, operands.shape, operands.options
    matrices, strides = operands.matrices(rows, ids)
    out = descriptor(d, BLOCK_ROWS, shape.vocab) if tile.descriptors else d
    num_row_blocks, num_tiles = triton.cdiv(num_rows, BLOCK_ROWS), triton.cdiv(num_ids, shape.vocab)
    known = Known(stats[rows].max, stats.stride, factors[:, rows], factors.stride(0), ids.start)
    linear_gradient_kernel[(num_row_blocks * num_tiles,)](
        *matrices, out, strides, d.stride(0), operands.vectors(target_ids, factors, rows, ids), known,
        Sizes(num_rows, num_ids, operands.states[0].shape[1], num_row_blocks, num_tiles),
        float(options.softcap or 1.0), options.scale,
        FLAGS=operands.flags, TILE=tile, OUT=ELEMENT_TYPES[d.dtype], num_warps=NUM_WARPS, num_stages=shape.stages,
    )  # fmt: skip


def factors_of(coefficients: TokenCoefficients, num_rows: int, device: torch.device) -> Tensor:
    """The coefficients over the full vocabulary as float32 [3, n], zero where not given."""
    factors = torch.zeros(3, num_rows, device=device)
    for out, value in zip(factors, coefficients.values()[:3], strict=True):
        if value is not None:
            out.copy_(value)
    return factors
