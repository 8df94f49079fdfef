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

from ..passes import LogitOptions, RowStats, Side
from .rows import EXCLUDED, LOG2E, Flags, finish, fold, no_sums, process_logits, store_fields, weighted

BLOCK_ROWS, NUM_WARPS = 128, 8
GROUP = 16
OLDEST_ARCHITECTURE = 80
DESCRIPTOR_ARCHITECTURE = 90  # on earlier GPUs loads through descriptors are not pipelined, and registers spill
MAX_SPLITS = 16
SUMS = 8  # m, s, a, mr, sr, g, target's logit, target's reference logit
MERGE_ROWS = 128


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
    precision: str  # of float32 products


@triton.jit
def load_tile(x, stride, first, count, k, hidden, ROWS: tl.constexpr, TILE: tl.constexpr):
    """Rows first.. and features k.. of a matrix [count, hidden], zero beyond its ends; x: its descriptor or pointer."""
    if TILE.descriptors:
        return x.load([first, k])
    else:
        rows = first + tl.arange(0, ROWS)
        columns = k + tl.arange(0, TILE.hidden)
        inside = (rows < count)[:, None] & (columns < hidden)[None, :]
        return tl.load(x + rows[:, None].to(tl.int64) * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def linear_score_kernel(h, w, hr, wr, strides, vectors, sizes, softcap, scale, FLAGS: tl.constexpr, TILE: tl.constexpr):
    """Running sums of one block of rows over one share of the vocabulary: `fold` of hidden @ weight^T, tile by tile."""
    h_stride, w_stride, hr_stride, wr_stride = strides
    num_rows, vocab, hidden, num_row_blocks, num_splits = sizes
    BLOCK_ROWS: tl.constexpr = TILE.rows
    BLOCK_VOCAB: tl.constexpr = TILE.vocab
    # programs that run at once: GROUP blocks of rows, whose states stay in the L2 cache, times all shares
    pid = tl.program_id(0)
    first_block = pid // (TILE.group * num_splits) * TILE.group
    group_size = tl.minimum(num_row_blocks - first_block, TILE.group)
    pid %= TILE.group * num_splits
    first_row = (first_block + pid % group_size) * BLOCK_ROWS
    split = pid // group_size
    rows = first_row + tl.arange(0, BLOCK_ROWS)
    in_rows = rows < num_rows
    target = tl.load(vectors.target + rows, mask=in_rows, other=-1)
    scale += tl.zeros([BLOCK_ROWS, 1], tl.float32)
    if FLAGS.row_temperature:
        scale /= tl.load(vectors.temperature + rows, mask=in_rows, other=1.0)[:, None]
    numbers = (vocab, softcap, scale)

    sums = no_sums(BLOCK_ROWS)
    z_t = tl.zeros([BLOCK_ROWS], tl.float32)
    r_t = tl.zeros([BLOCK_ROWS], tl.float32)
    num_tiles = tl.cdiv(vocab, BLOCK_VOCAB)
    first_tile = split * num_tiles // num_splits
    last_tile = (split + 1) * num_tiles // num_splits
    for tile in range(first_tile, last_tile):
        first_id = tile * BLOCK_VOCAB
        z = tl.zeros([BLOCK_ROWS, BLOCK_VOCAB], tl.float32)
        r = tl.zeros([BLOCK_ROWS, BLOCK_VOCAB], tl.float32)
        for k in range(0, hidden, TILE.hidden):
            states = load_tile(h, h_stride, first_row, num_rows, k, hidden, BLOCK_ROWS, TILE)
            weights = load_tile(w, w_stride, first_id, vocab, k, hidden, BLOCK_VOCAB, TILE)
            z = tl.dot(states, weights.T, z, input_precision=TILE.precision)
            if FLAGS.has_ref:
                states = load_tile(hr, hr_stride, first_row, num_rows, k, hidden, BLOCK_ROWS, TILE)
                weights = load_tile(wr, wr_stride, first_id, vocab, k, hidden, BLOCK_VOCAB, TILE)
                r = tl.dot(states, weights.T, r, input_precision=TILE.precision)
        ids = first_id + tl.arange(0, BLOCK_VOCAB)
        inside = (ids < vocab)[None, :]
        is_target = ids[None, :] == target[:, None]
        if FLAGS.has_bias:
            z += tl.load(vectors.bias + ids, mask=ids < vocab, other=0.0)[None, :]
        z = process_logits(z, numbers, FLAGS, False)
        z_t += tl.sum(tl.where(is_target, z, 0.0), 1)
        z = tl.where(inside & (ids[None, :] != target[:, None]), z, EXCLUDED)
        if FLAGS.has_ref:
            if FLAGS.has_ref_bias:
                r += tl.load(vectors.ref_bias + ids, mask=ids < vocab, other=0.0)[None, :]
            r = process_logits(r, numbers, FLAGS, True)
            r_t += tl.sum(tl.where(is_target, r, 0.0), 1)
            r = tl.where(inside, r, -float("inf"))
        sums = fold(z, r, sums, FLAGS.has_ref, 1)

    m, mr, s, a, sr, g = sums
    place = vectors.sums + (split.to(tl.int64) * num_rows + rows)
    store_fields(place, vectors.sums_stride, 0, in_rows, (m, s, a, mr, sr, g, z_t, r_t))


@triton.jit
def merge_kernel(
    sums_ptr, sums_stride, stats_ptr, stats_stride, num_rows, num_splits, HAS_REF: tl.constexpr,
    MERGE_ROWS: tl.constexpr,
):  # fmt: skip
    """Adds the shares of the vocabulary up, in their order, and finishes RowStats."""
    rows = tl.program_id(0) * MERGE_ROWS + tl.arange(0, MERGE_ROWS)
    inside = rows < num_rows
    field = sums_stride
    ptr = sums_ptr + rows
    m, mr, s, a, sr, g = no_sums(MERGE_ROWS)
    z_t = tl.zeros([MERGE_ROWS], tl.float32)
    r_t = tl.zeros([MERGE_ROWS], tl.float32)
    for _ in range(0, num_splits):
        m_i = tl.load(ptr, mask=inside, other=0.0)
        s_i = tl.load(ptr + field, mask=inside, other=1.0)
        m_new = tl.maximum(m, m_i)
        old, new = tl.exp2((m - m_new) * LOG2E), tl.exp2((m_i - m_new) * LOG2E)
        if HAS_REF:
            mr_i = tl.load(ptr + 3 * field, mask=inside, other=0.0)
            mr_new = tl.maximum(mr, mr_i)
            g_i = tl.load(ptr + 5 * field, mask=inside, other=0.0)
            g = weighted(old, g + s * ((m - m_new) - (mr - mr_new)))
            g += weighted(new, g_i + s_i * ((m_i - m_new) - (mr_i - mr_new)))
            sr_i = tl.load(ptr + 4 * field, mask=inside, other=1.0)
            sr = sr * tl.exp2((mr - mr_new) * LOG2E) + sr_i * tl.exp2((mr_i - mr_new) * LOG2E)
            mr = mr_new
            r_t += tl.load(ptr + 7 * field, mask=inside, other=0.0)
        a_i = tl.load(ptr + 2 * field, mask=inside, other=0.0)
        a = old * (a + s * (m - m_new)) + new * (a_i + s_i * (m_i - m_new))
        s = s * old + s_i * new
        m = m_new
        z_t += tl.load(ptr + 6 * field, mask=inside, other=0.0)
        ptr += num_rows
    store_fields(stats_ptr, stats_stride, rows, inside, finish(z_t, r_t, (m, mr, s, a, sr, g), HAS_REF))


def tile_shape(architecture: int, has_ref: bool, has_extras: bool) -> tuple[int, int, int]:
    """(ids per tile, features per step, pipeline stages) such that no register spills, as
    `python -m fastkl.kernels.resources` shows.

    Two accumulators of 128 x 128 just fit on sm_90, and no longer with bias or softcap in the epilogue.
    """
    if architecture < DESCRIPTOR_ARCHITECTURE:
        return 64 if has_ref else 128, 32, 3
    if has_ref and (has_extras or architecture >= 100):
        return 64, 64, 4
    return 128, 64, 3 if has_ref else 4


def architecture_of(x: Tensor) -> int:
    """90 for a Hopper GPU; the interpreter counts as one."""
    if not x.is_cuda:
        return DESCRIPTOR_ARCHITECTURE
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def fits(policy: Side, reference: Side | None, rows_are_picked: bool) -> bool:
    """Whether the kernel can read these heads: one dtype, contiguous features, rows of whole 16-byte units.

    Picking some rows of the hidden states makes them contiguous, so their features must then fill whole units, too.
    """
    if architecture_of(policy.hidden) < OLDEST_ARCHITECTURE or (
        policy.hidden.is_cuda and policy.hidden.dtype == torch.float32
    ):  # float32 products are left to the BLAS
        return False
    tensors = [policy.hidden, policy.weight] + ([] if reference is None else [reference.hidden, reference.weight])
    unit = 16 // policy.hidden.element_size()
    if rows_are_picked and policy.hidden.shape[1] % unit:
        return False
    return all(
        x.dtype == policy.hidden.dtype and x.stride(1) == 1 and x.stride(0) % unit == 0 and x.data_ptr() % 16 == 0
        for x in tensors
    )


def linear_score(
    policy: Side,
    reference: Side | None,
    target_ids: Tensor,
    row_ids: Tensor | None,
    options: LogitOptions,
    stats: RowStats,
) -> None:
    """Fills `stats` (full vocabulary) of the n scored rows without storing logits. Memory: 8 sums per row and split."""
    num_rows = len(target_ids)
    if num_rows == 0:
        return
    vocab, hidden = policy.weight.shape
    bias, ref_bias = (None if h is None or h.bias is None else h.bias.detach().float() for h in (policy, reference))
    has_extras = options.softcap is not None or bias is not None or ref_bias is not None
    architecture = architecture_of(policy.hidden)
    block_vocab, block_hidden, num_stages = tile_shape(architecture, reference is not None, has_extras)
    num_splits = min(MAX_SPLITS, triton.cdiv(vocab, block_vocab))
    num_row_blocks = triton.cdiv(num_rows, BLOCK_ROWS)
    sums = torch.empty(SUMS, num_splits, num_rows, device=target_ids.device)
    matrices = []
    for side in (policy, policy if reference is None else reference):
        states = side.hidden.detach() if row_ids is None else side.hidden.detach().index_select(0, row_ids)
        for x in (states, side.weight.detach()):
            if not x.is_cuda and x.dtype == torch.bfloat16:
                x = x.float()  # the interpreter's product misreads bfloat16 as integers
            matrices.append(x)
    with_descriptors = architecture >= DESCRIPTOR_ARCHITECTURE
    tiles = matrices  # descriptors cannot be in a tuple
    if with_descriptors:
        blocks = (BLOCK_ROWS, block_vocab) * 2
        tiles = [TensorDescriptor.from_tensor(x, [n, block_hidden]) for x, n in zip(matrices, blocks, strict=True)]
    temperature = options.temperature
    flags = Flags.of(options, bias, ref_bias)._replace(has_ref=reference is not None)
    precision = "ieee" if policy.hidden.dtype == torch.float32 else "tf32"
    vectors = Vectors(
        sums if bias is None else bias, sums if ref_bias is None else ref_bias, target_ids,
        temperature if isinstance(temperature, Tensor) else sums, sums, sums.stride(0),
    )  # fmt: skip
    linear_score_kernel[(num_row_blocks * num_splits,)](
        *tiles, tuple(x.stride(0) for x in matrices), vectors,
        Sizes(num_rows, vocab, hidden, num_row_blocks, num_splits), float(options.softcap or 1.0), options.scale,
        FLAGS=flags, TILE=Tile(BLOCK_ROWS, block_vocab, block_hidden, GROUP, with_descriptors, precision),
        num_warps=NUM_WARPS, num_stages=num_stages,
    )  # fmt: skip
    merge_kernel[(triton.cdiv(num_rows, MERGE_ROWS),)](
        sums, sums.stride(0), stats.max, stats.stride, num_rows, num_splits,
        HAS_REF=reference is not None, MERGE_ROWS=MERGE_ROWS, num_warps=4,
    )  # fmt: skip
