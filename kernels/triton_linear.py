"""Scores straight from hidden states: a matrix product whose epilogue is the online softmax. No logits are stored.

One program multiplies one block of rows with one share ("split") of the vocabulary, policy and reference side by side,
and folds every tile of logits into running sums while they are still in registers, in float32. `merge_kernel` adds the
shares up in order. The number of shares depends on the vocabulary alone and there are no atomics, so a row's scores are
the same bits whatever other rows are scored with it. Tiles come through tensor descriptors (TMA) on Hopper and later,
through pointers (cp.async) on Ampere and Ada.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .epilogue import RowStats
from .linear import LogitOptions, Side
from .triton_epilogue import finish, fold, store_stats
from .triton_logits import EXCLUDED, LOG2E, process_logits

BLOCK_ROWS, NUM_WARPS = 128, 8
GROUP = 16
OLDEST_ARCHITECTURE = 80
DESCRIPTOR_ARCHITECTURE = 90  # before it, loads through descriptors are not pipelined, and registers spill
MAX_SPLITS = 16
SUMS = 8  # m, s, a, mr, sr, g, target's logit, target's reference logit
MERGE_ROWS = 128


@triton.jit
def load_tile(
    x, stride, first, count, k, hidden, DESCRIPTORS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Rows first.. and features k.. of a matrix [count, hidden], zero beyond its ends; x: its descriptor or pointer."""
    if DESCRIPTORS:
        return x.load([first, k])
    else:
        rows = first + tl.arange(0, ROWS)
        columns = k + tl.arange(0, COLUMNS)
        inside = (rows < count)[:, None] & (columns < hidden)[None, :]
        return tl.load(x + rows[:, None].to(tl.int64) * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def linear_score_kernel(
    h, w, hr, wr, h_stride, w_stride, hr_stride, wr_stride, bias_ptr, ref_bias_ptr, target_ptr, temperature_ptr,
    sums_ptr, sums_stride, num_rows, vocab, hidden, num_row_blocks, num_splits, softcap, scale,
    HAS_REF: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_REF_BIAS: tl.constexpr, ROW_TEMPERATURE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_SCALE: tl.constexpr, ROUND_BF16: tl.constexpr, IEEE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_VOCAB: tl.constexpr, BLOCK_HIDDEN: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Running sums of one block of rows over one share of the vocabulary, into sums [SUMS, splits, rows]."""
    # programs that run at once: GROUP blocks of rows, whose states stay in the L2 cache, times all shares
    pid = tl.program_id(0)
    first_block = pid // (GROUP * num_splits) * GROUP
    group_size = tl.minimum(num_row_blocks - first_block, GROUP)
    pid %= GROUP * num_splits
    first_row = (first_block + pid % group_size) * BLOCK_ROWS
    split = pid // group_size
    precision: tl.constexpr = "ieee" if IEEE else "tf32"  # only float32 inputs look at it
    rows = first_row + tl.arange(0, BLOCK_ROWS)
    in_rows = rows < num_rows
    target = tl.load(target_ptr + rows, mask=in_rows, other=-1)
    scale += tl.zeros([BLOCK_ROWS, 1], tl.float32)
    if ROW_TEMPERATURE:
        scale /= tl.load(temperature_ptr + rows, mask=in_rows, other=1.0)[:, None]

    m = tl.zeros([BLOCK_ROWS], tl.float32) + EXCLUDED
    mr = tl.zeros([BLOCK_ROWS], tl.float32) + EXCLUDED
    s = tl.zeros([BLOCK_ROWS], tl.float32)
    a = tl.zeros([BLOCK_ROWS], tl.float32)
    sr = tl.zeros([BLOCK_ROWS], tl.float32)
    g = tl.zeros([BLOCK_ROWS], tl.float32)
    z_t = tl.zeros([BLOCK_ROWS], tl.float32)
    r_t = tl.zeros([BLOCK_ROWS], tl.float32)
    num_tiles = tl.cdiv(vocab, BLOCK_VOCAB)
    first_tile = split * num_tiles // num_splits
    last_tile = (split + 1) * num_tiles // num_splits
    for tile in range(first_tile, last_tile):
        first_id = tile * BLOCK_VOCAB
        z = tl.zeros([BLOCK_ROWS, BLOCK_VOCAB], tl.float32)
        r = tl.zeros([BLOCK_ROWS, BLOCK_VOCAB], tl.float32)
        for k in range(0, hidden, BLOCK_HIDDEN):
            states = load_tile(h, h_stride, first_row, num_rows, k, hidden, DESCRIPTORS, BLOCK_ROWS, BLOCK_HIDDEN)
            weights = load_tile(w, w_stride, first_id, vocab, k, hidden, DESCRIPTORS, BLOCK_VOCAB, BLOCK_HIDDEN)
            z = tl.dot(states, weights.T, z, input_precision=precision)
            if HAS_REF:
                states = load_tile(hr, hr_stride, first_row, num_rows, k, hidden, DESCRIPTORS, BLOCK_ROWS, BLOCK_HIDDEN)
                weights = load_tile(wr, wr_stride, first_id, vocab, k, hidden, DESCRIPTORS, BLOCK_VOCAB, BLOCK_HIDDEN)
                r = tl.dot(states, weights.T, r, input_precision=precision)
        ids = first_id + tl.arange(0, BLOCK_VOCAB)
        inside = (ids < vocab)[None, :]
        is_target = ids[None, :] == target[:, None]
        if HAS_BIAS:
            z += tl.load(bias_ptr + ids, mask=ids < vocab, other=0.0)[None, :]
        z = process_logits(z, softcap, scale, HAS_SOFTCAP, HAS_SCALE, ROUND_BF16)
        z_t += tl.sum(tl.where(is_target, z, 0.0), 1)
        z = tl.where(inside & (ids[None, :] != target[:, None]), z, EXCLUDED)
        if HAS_REF:
            if HAS_REF_BIAS:
                r += tl.load(ref_bias_ptr + ids, mask=ids < vocab, other=0.0)[None, :]
            r = process_logits(r, softcap, scale, HAS_SOFTCAP, HAS_SCALE, ROUND_BF16)
            r_t += tl.sum(tl.where(is_target, r, 0.0), 1)
            r = tl.where(inside, r, EXCLUDED)
        m, s, a, mr, sr, g = fold(z, r, m, s, a, mr, sr, g, HAS_REF, 1)

    field = sums_stride
    sums_ptr += split.to(tl.int64) * num_rows + rows
    tl.store(sums_ptr, m, mask=in_rows)
    tl.store(sums_ptr + field, s, mask=in_rows)
    tl.store(sums_ptr + 2 * field, a, mask=in_rows)
    tl.store(sums_ptr + 3 * field, mr, mask=in_rows)
    tl.store(sums_ptr + 4 * field, sr, mask=in_rows)
    tl.store(sums_ptr + 5 * field, g, mask=in_rows)
    tl.store(sums_ptr + 6 * field, z_t, mask=in_rows)
    tl.store(sums_ptr + 7 * field, r_t, mask=in_rows)


@triton.jit
def merge_kernel(
    sums_ptr,
    sums_stride,
    stats_ptr,
    stats_stride,
    num_rows,
    num_splits,
    HAS_REF: tl.constexpr,
    MERGE_ROWS: tl.constexpr,
):  # fmt: skip
    """Adds the shares of the vocabulary up, in their order, and finishes RowStats."""
    rows = tl.program_id(0) * MERGE_ROWS + tl.arange(0, MERGE_ROWS)
    inside = rows < num_rows
    field = sums_stride
    ptr = sums_ptr + rows
    m = tl.zeros([MERGE_ROWS], tl.float32) + EXCLUDED
    mr = tl.zeros([MERGE_ROWS], tl.float32) + EXCLUDED
    s = tl.zeros([MERGE_ROWS], tl.float32)
    a = tl.zeros([MERGE_ROWS], tl.float32)
    sr = tl.zeros([MERGE_ROWS], tl.float32)
    g = tl.zeros([MERGE_ROWS], tl.float32)
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
            g = old * (g + s * ((m - m_new) - (mr - mr_new))) + new * (g_i + s_i * ((m_i - m_new) - (mr_i - mr_new)))
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
    top, log_sum, mean_logit, logprob, mr, ref_log_sum, ref_logprob, mean_gap = finish(
        z_t, r_t, m, s, a, mr, sr, g, HAS_REF
    )
    store_stats(
        stats_ptr, stats_stride, rows, inside, top, log_sum, mean_logit, logprob, mr, ref_log_sum, ref_logprob, mean_gap
    )


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
    """90 for a Hopper GPU; the interpreter passes as one."""
    if not x.is_cuda:
        return DESCRIPTOR_ARCHITECTURE
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def fits(policy: Side, reference: Side | None) -> bool:
    """Whether the kernel can read these heads: one dtype, contiguous features, rows of whole 16-byte units."""
    if architecture_of(policy.hidden) < OLDEST_ARCHITECTURE or (
        policy.hidden.is_cuda and policy.hidden.dtype == torch.float32
    ):  # float32 products belong to the BLAS
        return False
    tensors = [policy.hidden, policy.weight] + ([] if reference is None else [reference.hidden, reference.weight])
    unit = 16 // policy.hidden.element_size()
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
    biases = [None if h is None or h.bias is None else h.bias.detach().float() for h in (policy, reference)]
    has_extras = options.softcap is not None or any(b is not None for b in biases)
    architecture = architecture_of(policy.hidden)
    block_vocab, block_hidden, num_stages = tile_shape(architecture, reference is not None, has_extras)
    num_splits = min(MAX_SPLITS, triton.cdiv(vocab, block_vocab))
    num_row_blocks = triton.cdiv(num_rows, BLOCK_ROWS)
    sums = torch.empty(SUMS, num_splits, num_rows, device=target_ids.device)
    sides = [policy, policy if reference is None else reference]
    matrices = []
    for side in sides:
        states = side.hidden.detach() if row_ids is None else side.hidden.detach().index_select(0, row_ids)
        for x in (states, side.weight.detach()):
            if not x.is_cuda and x.dtype == torch.bfloat16:
                x = x.float()  # the interpreter's product takes bfloat16's bit patterns for integers
            matrices.append(x)
    with_descriptors = architecture >= DESCRIPTOR_ARCHITECTURE
    strides, tiles = [x.stride(0) for x in matrices], matrices
    if with_descriptors:
        blocks = (BLOCK_ROWS, block_vocab) * 2
        tiles = [TensorDescriptor.from_tensor(x, [n, block_hidden]) for x, n in zip(matrices, blocks, strict=True)]
    row_temperature = isinstance(options.temperature, Tensor)
    linear_score_kernel[(num_row_blocks * num_splits,)](
        *tiles, *strides, *(sums if b is None else b for b in biases), target_ids,
        options.temperature if row_temperature else sums, sums, sums.stride(0),
        num_rows, vocab, hidden, num_row_blocks, num_splits,
        float(options.softcap or 1.0), options.scale,
        HAS_REF=reference is not None, HAS_BIAS=biases[0] is not None, HAS_REF_BIAS=biases[1] is not None,
        ROW_TEMPERATURE=row_temperature, HAS_SOFTCAP=options.softcap is not None, HAS_SCALE=options.has_scale,
        ROUND_BF16=options.logits_dtype == "bfloat16", IEEE=policy.hidden.dtype == torch.float32,
        DESCRIPTORS=with_descriptors, BLOCK_ROWS=BLOCK_ROWS, BLOCK_VOCAB=block_vocab, BLOCK_HIDDEN=block_hidden,
        GROUP=GROUP, num_warps=NUM_WARPS, num_stages=num_stages,
    )  # fmt: skip
    merge_kernel[(triton.cdiv(num_rows, MERGE_ROWS),)](
        sums, sums.stride(0), stats.max, stats.log_sum.storage_offset() - stats.max.storage_offset(),
        num_rows, num_splits,
        HAS_REF=reference is not None, MERGE_ROWS=MERGE_ROWS, num_warps=4,
    )  # fmt: skip
