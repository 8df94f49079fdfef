"""Forward KL and Jensen-Shannon divergence of rows of logits, the Triton twin of cpu/divergences.py, with its symbols.

`divergence_kernel` reads policy and reference once more, after score_kernel has found their normalisers, and fills
fields of RowStats: of the full vocabulary, or, with a mask or a threshold, of the support. Their gradients are a part
of rows.gradient_kernel. One program per row, no atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rows import (
    EDGE_ID,
    FORWARD_KL,
    JSD,
    KL_TO_MIXTURE,
    NO_LOGIT,
    THRESHOLD,
    VECTOR,
    compare,
    is_kept,
    load_normalisers,
    load_pair,
    locate,
    log_over_mixture,
)  # fmt: skip


@triton.jit
def divergence_block(
    row, keep_ptr, start, block, target, numbers, normalisers, threshold, edge_id, bans, num_bans, sums,
    FLAGS: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds columns start.. of a row to the lanes' sums: of the forward KL, the jsd and KL(p, m)."""
    forward, jsd, to_mixture = sums
    cols = tl.max_contiguous(start + block, [1, VECTOR])
    z, r = load_pair(row, cols, numbers, True, FLAGS, MASKED, False)
    p, q, t, x = compare(z, r, normalisers)
    if FLAGS.has_keep or FLAGS.has_threshold:
        if FLAGS.has_keep:
            keep = tl.load(keep_ptr + cols, mask=cols < numbers[0], other=0) != 0
        else:
            keep = is_kept(z, cols, threshold, edge_id, start, BLOCK, bans, num_bans, FLAGS.lowest_ids) | (
                cols == target
            )
        p = tl.where(keep, p, 0.0)
        q = tl.where(keep, q, 0.0)
    if FLAGS.forward_kl:
        of_gap = q * t
        if FLAGS.has_inf:  # an id that the policy alone excludes
            of_gap = tl.where(t > -NO_LOGIT, tl.where(q > 0.0, float("inf"), 0.0), of_gap)
        forward += tl.sum(tl.where(t > 0.0, q, -p) * x + of_gap, 0)
    if FLAGS.jsd:
        of_p = log_over_mixture(t, x)
        of_q = log_over_mixture(-t, x)
        to_mixture += tl.sum(p * of_p, 0)
        jsd += tl.sum(0.5 * (p * of_p + q * of_q), 0)
    return forward, jsd, to_mixture


@triton.jit
def divergence_row(
    inputs, stats, i, row_id, target, numbers, of_stats, threshold,
    FLAGS: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """divergence_kernel, of one row after locate; of_stats: RowStats of the distribution."""
    vocab = numbers[0]
    row = inputs.z + row_id * inputs.z_stride, inputs.bias, inputs.r + row_id * inputs.r_stride, inputs.ref_bias
    keep_ptr = inputs.keep + i * vocab
    block = tl.arange(0, BLOCK // LANES)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    whole = vocab // BLOCK * BLOCK
    edge_id = 0
    num_bans = 0
    if FLAGS.has_threshold:
        edge_id = tl.load(stats.support + EDGE_ID * stats.stride + i).to(tl.int32)
        num_bans = tl.load(inputs.num_bans + i).to(tl.int32)
    normalisers = load_normalisers(of_stats, stats.stride, i)
    zero = tl.zeros([LANES], tl.float32)
    sums = (zero, zero, zero)
    for start in range(0, whole, BLOCK):
        sums = divergence_block(row, keep_ptr, start, block, target, numbers, normalisers, threshold, edge_id,
                                inputs.bans, num_bans, sums, FLAGS, BLOCK, False)  # fmt: skip
    if whole < vocab:
        sums = divergence_block(row, keep_ptr, whole, block, target, numbers, normalisers, threshold, edge_id,
                                inputs.bans, num_bans, sums, FLAGS, BLOCK, True)  # fmt: skip
    forward, jsd, to_mixture = sums
    tl.store(of_stats + FORWARD_KL * stats.stride + i, tl.sum(forward, 0))
    tl.store(of_stats + JSD * stats.stride + i, tl.sum(jsd, 0))
    tl.store(of_stats + KL_TO_MIXTURE * stats.stride + i, tl.sum(to_mixture, 0))


@triton.jit
def divergence_kernel(inputs, stats, numbers, FLAGS: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr):
    """The divergences of one row from known statistics.

    With has_threshold, rows without a threshold (NaN) are left for a launch with has_keep.
    """
    i, row_id, target, numbers = locate(inputs, numbers, FLAGS)
    if FLAGS.has_threshold:
        threshold = tl.load(stats.support + THRESHOLD * stats.stride + i)
        if threshold == threshold:
            divergence_row(inputs, stats, i, row_id, target, numbers, stats.support, threshold, FLAGS, BLOCK, LANES)
    elif FLAGS.has_keep:
        divergence_row(inputs, stats, i, row_id, target, numbers, stats.support, 0.0, FLAGS, BLOCK, LANES)
    else:
        divergence_row(inputs, stats, i, row_id, target, numbers, stats.full, 0.0, FLAGS, BLOCK, LANES)
