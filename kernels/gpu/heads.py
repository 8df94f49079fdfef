"""Scores straight from hidden states: a matrix product whose epilogue is the online softmax. No logits are stored.

One program multiplies one block of rows with one share ("split") of the vocabulary, policy and reference side by side,
and folds every tile of logits into running sums while they are still in registers, in float32. `merge_kernel` adds the
shares up in order. The number of shares depends on the vocabulary alone and there are no atomics, so a row's scores are
the same bits whatever other rows are scored with it. Tiles come through tensor descriptors (TMA) on Hopper and later,
through pointers (cp.async) on Ampere and Ada.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..passes import LogitOptions, Side
from ..stats import RowStats
from .rows import (
    EXCLUDED,
    Flags,
    finish,
    fold_bits,
    in_nats,
    no_sums_bits,
    process_logits,
    store_fields,
    weighted,
)  # fmt: skip

BLOCK_ROWS, NUM_WARPS = 128, 8
GROUP, GROUP_OF_TWO_HEADS = 16, 8
OLDEST_ARCHITECTURE = 80
DESCRIPTOR_ARCHITECTURE = 90  # on earlier GPUs loads through descriptors are not pipelined, and registers spill
MAX_SPLITS = 33  # times 4 blocks of rows, one wave of a GPU with 132 multiprocessors
WIDE_HIDDEN = 3072
"""From here on two heads that differ are multiplied by the BLAS, which needs the logits of a chunk of rows: its
products are faster by more than writing and reading the logits takes."""
SUMS = 8  # m, s, a, mr, sr, g, target's logit, target's reference logit
MERGE_ROWS = 128
ALL = slice(None)


class Vectors(NamedTuple):
    """What a launch reads beside the matrices, and the sums it writes; any tensor stands in for what is not there."""

    bias: Any  # f32 [V]
    ref_bias: Any
    target: Any  # i64 [n]
    temperature: Any  # f32 [n]
    sums: Any  # f32 [SUMS, splits, n]
    sums_stride: Any


class Sizes(NamedTuple):
    """Of the problem, and of its division among programs."""

    num_rows: Any
    vocab: Any
    hidden: Any
    num_row_blocks: Any
    num_splits: Any


class Tile(NamedTuple):
    """How a program goes over its share: rows x vocab logits at a time, hidden features per step."""

    rows: int
    vocab: int
    hidden: int
    group: int  # blocks of rows whose states stay in the L2 cache together
    descriptors: bool
    shared: bool  # whether one head serves policy and reference
    precision: str  # of float32 products


class Shape(NamedTuple):
    """What tile_shape chooses of a Tile, and of its launch."""

    vocab: int
    hidden: int
    stages: int


@triton.jit
def load_tile(x, stride, first, count, k, hidden, ROWS: tl.constexpr, TILE: tl.constexpr):
    """Rows first.. and features k.. of a matrix [count, hidden], zero beyond its ends; x: its descriptor or pointer."""
    if TILE.descriptors:
        return x.load([first, k])
    else:
        HIDDEN: tl.constexpr = TILE.hidden
        rows = first + tl.arange(0, ROWS)
        columns = k + tl.arange(0, HIDDEN)
        inside = (rows < count)[:, None] & (columns < hidden)[None, :]
        return tl.load(x + rows[:, None].to(tl.int64) * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def raw_logits(h, w, hr, wr, strides, vectors, place, FLAGS: tl.constexpr, TILE: tl.constexpr):
    """A tile of both heads' outputs with their biases, f32 [TILE.rows, TILE.vocab] each; without a reference its tile
    is zero."""
    first_row, num_rows, first_id, vocab, hidden = place
    h_stride, w_stride, hr_stride, wr_stride = strides
    ROWS: tl.constexpr = TILE.rows
    VOCAB: tl.constexpr = TILE.vocab
    z = tl.zeros([ROWS, VOCAB], tl.float32)
    r = tl.zeros([ROWS, VOCAB], tl.float32)
    for k in range(0, hidden, TILE.hidden):
        states = load_tile(h, h_stride, first_row, num_rows, k, hidden, ROWS, TILE)
        weights = load_tile(w, w_stride, first_id, vocab, k, hidden, VOCAB, TILE)
        z = tl.dot(states, weights.T, z, input_precision=TILE.precision)
        if FLAGS.has_ref:
            states = load_tile(hr, hr_stride, first_row, num_rows, k, hidden, ROWS, TILE)
            if not TILE.shared:
                weights = load_tile(wr, wr_stride, first_id, vocab, k, hidden, VOCAB, TILE)
            r = tl.dot(states, weights.T, r, input_precision=TILE.precision)
    ids = first_id + tl.arange(0, VOCAB)
    if FLAGS.has_bias:
        z += tl.load(vectors.bias + ids, mask=ids < vocab, other=0.0)[None, :]
    if FLAGS.has_ref and FLAGS.has_ref_bias:
        r += tl.load(vectors.ref_bias + ids, mask=ids < vocab, other=0.0)[None, :]
    return z, r


@triton.jit
def has_target(target, first_id, COUNT: tl.constexpr):
    """Whether any of the targets is among ids first_id.. of a tile. Few tiles have one, so what it needs stands behind
    a branch that all threads take together."""
    return tl.max(((target >= first_id) & (target < first_id + COUNT)).to(tl.int32), 0) > 0


@triton.jit
def place_of_program(num_row_blocks, num_parts, TILE: tl.constexpr):
    """This program's block of rows and its part of the vocabulary. Programs that run at once have `group` blocks of
    rows, whose states stay in the L2 cache, times all parts."""
    pid = tl.program_id(0)
    first_block = pid // (TILE.group * num_parts) * TILE.group
    group_size = tl.minimum(num_row_blocks - first_block, TILE.group)
    pid %= TILE.group * num_parts
    return first_block + pid % group_size, pid // group_size


@triton.jit
def linear_score_kernel(h, w, hr, wr, strides, vectors, sizes, softcap, scale, FLAGS: tl.constexpr, TILE: tl.constexpr):
    """Running sums of one block of rows over one share of the vocabulary: `fold_bits` of hidden @ weight^T, tile by
    tile. A target's own logits are stored when its tile comes: carried along, they would cost registers that spill."""
    num_rows, vocab, hidden, num_row_blocks, num_splits = sizes
    BLOCK_ROWS: tl.constexpr = TILE.rows
    BLOCK_VOCAB: tl.constexpr = TILE.vocab
    row_block, split = place_of_program(num_row_blocks, num_splits, TILE)
    first_row = row_block * BLOCK_ROWS
    rows = first_row + tl.arange(0, BLOCK_ROWS)
    in_rows = rows < num_rows
    target = tl.load(vectors.target + rows, mask=in_rows, other=-1).to(tl.int32)
    scale += tl.zeros([BLOCK_ROWS, 1], tl.float32)
    if FLAGS.row_temperature:
        scale /= tl.load(vectors.temperature + rows, mask=in_rows, other=1.0)[:, None]
    numbers = (vocab, softcap, scale)

    share = vectors.sums + (split.to(tl.int64) * num_rows + rows)
    sums = no_sums_bits(BLOCK_ROWS)
    num_tiles = tl.cdiv(vocab, BLOCK_VOCAB)
    first_tile = split * num_tiles // num_splits
    last_tile = (split + 1) * num_tiles // num_splits
    for tile in range(first_tile, last_tile):
        first_id = tile * BLOCK_VOCAB
        ids = first_id + tl.arange(0, BLOCK_VOCAB)
        place = first_row, num_rows, first_id, vocab, hidden
        z, r = raw_logits(h, w, hr, wr, strides, vectors, place, FLAGS, TILE)
        z = process_logits(z, numbers, FLAGS, False)
        if FLAGS.has_ref:
            r = process_logits(r, numbers, FLAGS, True)
        if has_target(target, first_id, BLOCK_VOCAB) | (first_id + BLOCK_VOCAB > vocab):
            is_target = ids[None, :] == target[:, None]
            inside = (ids < vocab)[None, :]
            here = (target >= first_id) & (target < first_id + BLOCK_VOCAB)
            of_target = share + 6 * vectors.sums_stride
            tl.store(of_target, tl.sum(tl.where(is_target, z, 0.0), 1), mask=here)
            if FLAGS.has_ref:
                tl.store(of_target + vectors.sums_stride, tl.sum(tl.where(is_target, r, 0.0), 1), mask=here)
            z = tl.where(inside & (ids[None, :] != target[:, None]), z, EXCLUDED)
            if FLAGS.has_ref:
                r = tl.where(inside, r, EXCLUDED)
        sums = fold_bits(z, r, sums, FLAGS.has_ref, FLAGS.has_ref_bias, 1)

    m, mr, s, a, sr, g = sums
    store_fields(share, vectors.sums_stride, 0, in_rows, (m, s, a, mr, sr, g))


@triton.jit
def merge_kernel(
    sums_ptr, sums_stride, stats_ptr, stats_stride, num_rows, num_splits, HAS_REF: tl.constexpr,
    MERGE_ROWS: tl.constexpr,
):  # fmt: skip
    """Adds the shares of the vocabulary up, in bits and in their order, and finishes RowStats."""
    rows = tl.program_id(0) * MERGE_ROWS + tl.arange(0, MERGE_ROWS)
    inside = rows < num_rows
    field = sums_stride
    ptr = sums_ptr + rows
    m, mr, s, a, sr, g = no_sums_bits(MERGE_ROWS)
    z_t = tl.zeros([MERGE_ROWS], tl.float32)
    r_t = tl.zeros([MERGE_ROWS], tl.float32)
    for _ in range(0, num_splits):
        m_i = tl.load(ptr, mask=inside, other=0.0)
        s_i = tl.load(ptr + field, mask=inside, other=1.0)
        m_new = tl.maximum(m, m_i)
        old, new = tl.exp2(m - m_new), tl.exp2(m_i - m_new)
        if HAS_REF:
            mr_i = tl.load(ptr + 3 * field, mask=inside, other=0.0)
            mr_new = tl.maximum(mr, mr_i)
            g_i = tl.load(ptr + 5 * field, mask=inside, other=0.0)
            g = weighted(old, g + s * ((m - m_new) - (mr - mr_new)))
            g += weighted(new, g_i + s_i * ((m_i - m_new) - (mr_i - mr_new)))
            sr_i = tl.load(ptr + 4 * field, mask=inside, other=1.0)
            sr = sr * tl.exp2(mr - mr_new) + sr_i * tl.exp2(mr_i - mr_new)
            mr = mr_new
            r_t += tl.load(ptr + 7 * field, mask=inside, other=0.0)
        a_i = tl.load(ptr + 2 * field, mask=inside, other=0.0)
        a = old * (a + s * (m - m_new)) + new * (a_i + s_i * (m_i - m_new))
        s = s * old + s_i * new
        m = m_new
        z_t += tl.load(ptr + 6 * field, mask=inside, other=0.0)
        ptr += num_rows
    store_fields(
        stats_ptr, stats_stride, rows, inside, finish(z_t, r_t, in_nats((m, mr, s, a, sr, g), HAS_REF), HAS_REF)
    )


def tile_shape(architecture: int, num_heads: int, has_extras: bool) -> Shape:
    """The largest tile such that no register spills, as `python -m fastkl.kernels.resources` shows. num_heads: how many
    are multiplied: policy's and reference's, one for both, or one alone.

    Two accumulators of 128 x 128 just fit on sm_90, and no longer with bias or softcap in the epilogue.
    """
    if architecture < DESCRIPTOR_ARCHITECTURE:
        return Shape(128 if num_heads == 1 else 64, 32, 3)
    if num_heads == 1:
        return Shape(256 if architecture < 100 and not has_extras else 128, 64, 3)
    return Shape(64 if has_extras or architecture >= 100 else 128, 64, 4 if has_extras or architecture >= 100 else 3)


def architecture_of(x: Tensor) -> int:
    """90 for a Hopper GPU; the interpreter counts as one."""
    if not x.is_cuda:
        return DESCRIPTOR_ARCHITECTURE
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def fits(policy: Side, reference: Side | None, rows_are_picked: bool) -> bool:
    """Whether the kernels can read these heads: one width and dtype, contiguous features, rows of whole 16-byte units.

    Picking some rows of the hidden states makes them contiguous, so their features must then fill whole units, too.
    """
    if architecture_of(policy.hidden) < OLDEST_ARCHITECTURE or (
        policy.hidden.is_cuda and policy.hidden.dtype == torch.float32
    ):  # float32 products are left to the BLAS
        return False
    if reference is not None and reference.hidden.shape[1] != policy.hidden.shape[1]:
        return False  # the kernels go over the features of both sides together
    tensors = [policy.hidden, policy.weight] + ([] if reference is None else [reference.hidden, reference.weight])
    unit = 16 // policy.hidden.element_size()
    if rows_are_picked and policy.hidden.shape[1] % unit:
        return False
    return all(
        x.dtype == policy.hidden.dtype and x.stride(1) == 1 and x.stride(0) % unit == 0 and x.data_ptr() % 16 == 0
        for x in tensors
    )


def blas_is_faster(policy: Side, reference: Side | None) -> bool:
    """Whether two wide heads are better multiplied by the BLAS, see WIDE_HIDDEN."""
    return reference is not None and policy.hidden.shape[1] >= WIDE_HIDDEN and not policy.shares_weights_with(reference)


class Operands:
    """The two sides of a call as the kernels take them, and the tile by which they go over them.

    reference None: one head alone. row_ids i64 [n] picks rows of the hidden states; None: all of them.
    """

    def __init__(self, policy: Side, reference: Side | None, row_ids: Tensor | None, options: LogitOptions) -> None:
        self.policy, self.reference, self.options = policy, reference, options
        self.bias, self.ref_bias = (
            None if side is None or side.bias is None else side.bias.detach().float() for side in (policy, reference)
        )
        has_extras = options.softcap is not None or self.bias is not None or self.ref_bias is not None
        self.shared = reference is not None and policy.shares_weights_with(reference)
        self.architecture = architecture_of(policy.hidden)
        self.shape = tile_shape(self.architecture, 1 if reference is None else 2, has_extras)
        sides = (policy, policy if reference is None else reference)
        self.states = [readable(picked(side.hidden.detach(), row_ids)) for side in sides]
        self.weights = [readable(side.weight.detach()) for side in sides]
        self.flags = Flags.of(options, self.bias, self.ref_bias)._replace(has_ref=reference is not None)
        self.dtype = self.states[0].dtype
        precision = "ieee" if policy.hidden.dtype == torch.float32 else "tf32"
        self.tile = Tile(
            BLOCK_ROWS, self.shape.vocab, self.shape.hidden, GROUP if reference is None else GROUP_OF_TWO_HEADS,
            self.architecture >= DESCRIPTOR_ARCHITECTURE, self.shared, precision,
        )  # fmt: skip

    def matrices(self, rows: slice = ALL, ids: slice = ALL) -> tuple[list[Any], tuple[int, ...]]:
        """States and weights of policy and reference, as descriptors or as they are, and their strides: the first
        arguments of both kernels."""
        (h, hr), (w, wr) = ((a[part], b[part]) for (a, b), part in ((self.states, rows), (self.weights, ids)))
        strides = tuple(x.stride(0) for x in (h, w, hr, wr))
        if not self.tile.descriptors:
            return [h, w, hr, wr], strides
        blocks = (BLOCK_ROWS, self.shape.vocab) * 2
        return [descriptor(x, n, self.shape.hidden) for x, n in zip((h, w, hr, wr), blocks, strict=True)], strides

    def vectors(self, target_ids: Tensor, sums: Tensor, rows: slice = ALL, ids: slice = ALL) -> Vectors:
        """What is read beside the matrices, of some rows and ids; `sums` stands in for what is not there."""
        bias, ref_bias = (sums if b is None else b[ids] for b in (self.bias, self.ref_bias))
        temperature = self.options.temperature
        temperature = temperature[rows] if isinstance(temperature, Tensor) else sums
        return Vectors(bias, ref_bias, target_ids[rows], temperature, sums, sums.stride(0))


def picked(x: Tensor, row_ids: Tensor | None) -> Tensor:
    """Some rows of x, or x itself."""
    return x if row_ids is None else x.index_select(0, row_ids)


def readable(x: Tensor) -> Tensor:
    """x, but in float32 in the interpreter, whose products misread bfloat16 as integers."""
    return x if x.is_cuda else x.float()


def descriptor(x: Tensor, rows: int, columns: int) -> Any:
    """By which blocks of a matrix are loaded and stored on Hopper and later."""
    return TensorDescriptor.from_tensor(x, [rows, columns])


def linear_score(
    policy: Side,
    reference: Side | None,
    target_ids: Tensor,
    row_ids: Tensor | None,
    options: LogitOptions,
    stats: RowStats,
    kl: bool = True,
) -> None:
    """Fills `stats` (full vocabulary) of the n scored rows without storing logits. Memory: 8 sums per row and split.

    Without the KL, which needs both models' logits side by side, each head is gone over alone in larger tiles.
    """
    num_rows = len(target_ids)
    if num_rows == 0:
        return
    if reference is not None and not kl and not policy.shares_weights_with(reference):
        of_reference = RowStats.empty(num_rows, target_ids, torch.float32)
        linear_score(policy, None, target_ids, row_ids, options, stats)
        linear_score(reference, None, target_ids, row_ids, options, of_reference)
        stats.take_reference(of_reference)
        return
    operands = Operands(policy, reference, row_ids, options)
    vocab, hidden = policy.weight.shape
    num_splits = min(MAX_SPLITS, triton.cdiv(vocab, operands.shape.vocab))
    num_row_blocks = triton.cdiv(num_rows, BLOCK_ROWS)
    sums = torch.zeros(SUMS, num_splits, num_rows, device=target_ids.device)
    matrices, strides = operands.matrices()
    linear_score_kernel[(num_row_blocks * num_splits,)](
        *matrices, strides, operands.vectors(target_ids, sums),
        Sizes(num_rows, vocab, hidden, num_row_blocks, num_splits), float(options.softcap or 1.0), options.scale,
        FLAGS=operands.flags, TILE=operands.tile, num_warps=NUM_WARPS, num_stages=operands.shape.stages,
    )  # fmt: skip
    merge_kernel[(triton.cdiv(num_rows, MERGE_ROWS),)](
        sums, sums.stride(0), stats.max, stats.stride, num_rows, num_splits,
        HAS_REF=reference is not None, MERGE_ROWS=MERGE_ROWS, num_warps=4,
    )  # fmt: skip
