"""The Triton twin of epilogue.py: one pass over a row of policy and reference logits, and the gradient in place.

`score_kernel` reads every logit once, keeps online sums of all that RowStats needs, and can go over the row a second
time to write the gradient when the loss's factors are known (from memory again: the rows in flight are larger than the
L2 cache). One program per row, rows on grid axis x, 64-bit row offsets, no atomics: results are bitwise reproducible
and do not depend on the other rows. triton_gradient.py writes the gradient from known statistics.

The online sums are centred at the running maxima m and m_ref. With e = exp(z - m), a block that raises the maximum to
m' turns sum e (z - m) into exp(m - m') (sum e (z - m) + (m - m') sum e), and the gap sum likewise. The target's own
logit is left out of the sums and added at the end, so that log p(y) near zero keeps its accuracy.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_gradient import before_processing, gradient_block, load_factor
from .triton_logits import EXCLUDED, LOG2E, VECTOR, load_logits


@triton.jit
def log_of_sum(others, exp_target, at_maximum):
    """log(others + exp_target); a target at the maximum has exp_target = 1 and needs log1p(others)."""
    total = others + exp_target
    # log1p(x) = log(1 + x) * x / ((1 + x) - 1) corrects the rounding of 1 + x (Kahan)
    one_plus = 1.0 + others
    rounded = one_plus - 1.0
    log1p = tl.where(rounded == 0.0, others, tl.log(one_plus) * (others / tl.where(rounded == 0.0, 1.0, rounded)))
    return tl.where(at_maximum, log1p, tl.log(total))


@triton.jit
def fold(z, r, m, s, a, mr, sr, g, HAS_REF: tl.constexpr, AXIS: tl.constexpr):
    """Adds a tile of logits along AXIS to the online sums, of which there is one set per index of its other axis."""
    m_new = tl.maximum(m, tl.max(z, AXIS))
    rescale = tl.exp2((m - m_new) * LOG2E)
    z = z - tl.expand_dims(m_new, AXIS)
    e = tl.exp2(z * LOG2E)
    if HAS_REF:
        mr_new = tl.maximum(mr, tl.max(r, AXIS))
        r = r - tl.expand_dims(mr_new, AXIS)
        sr = sr * tl.exp2((mr - mr_new) * LOG2E) + tl.sum(tl.exp2(r * LOG2E), AXIS)
        g = rescale * (g + s * ((m - m_new) - (mr - mr_new))) + tl.sum(e * (z - r), AXIS)
        mr = mr_new
    a = rescale * (a + s * (m - m_new)) + tl.sum(e * z, AXIS)
    s = s * rescale + tl.sum(e, AXIS)
    return m_new, s, a, mr, sr, g


@triton.jit
def merge_lanes(m, s, a, mr, sr, g, HAS_REF: tl.constexpr):
    """The lanes' online sums [LANES] as one set of scalars."""
    top = tl.max(m, 0)
    weight = tl.exp2((m - top) * LOG2E)
    ref_top = tl.max(mr, 0)
    if HAS_REF:
        g = weight * (g + s * ((m - top) - (mr - ref_top)))
        sr = sr * tl.exp2((mr - ref_top) * LOG2E)
    a = weight * (a + s * (m - top))
    return top, tl.sum(s * weight, 0), tl.sum(a, 0), ref_top, tl.sum(sr, 0), tl.sum(g, 0)


@triton.jit
def finish(z_t, r_t, m, s, a, mr, sr, g, HAS_REF: tl.constexpr):
    """Adds the target to the sums over all other ids: the statistics of RowStats, in its order. For one row or many."""
    top = tl.maximum(m, z_t)
    rescale = tl.exp2((m - top) * LOG2E)
    exp_target = tl.exp2((z_t - top) * LOG2E)
    others = s * rescale
    log_sum = log_of_sum(others, exp_target, z_t == top)
    total = others + exp_target
    mean_logit = (rescale * (a + s * (m - top)) + exp_target * (z_t - top)) / total
    logprob = (z_t - top) - log_sum
    ref_log_sum = tl.zeros_like(log_sum)
    ref_logprob = tl.zeros_like(log_sum)
    mean_gap = tl.zeros_like(log_sum)
    if HAS_REF:
        ref_log_sum = tl.log(sr)
        ref_logprob = (r_t - mr) - ref_log_sum
        mean_gap = (rescale * (g + s * (m - top)) + exp_target * ((z_t - top) - (r_t - mr))) / total
    return top, log_sum, mean_logit, logprob, mr, ref_log_sum, ref_logprob, mean_gap


@triton.jit
def store_stats(ptr, stride, row, inside, top, log_sum, mean_logit, logprob, mr, ref_log_sum, ref_logprob, mean_gap):
    """Writes RowStats of one row or of many, where `inside`; its fields lie `stride` apart."""
    tl.store(ptr + row, top, mask=inside)
    tl.store(ptr + stride + row, log_sum, mask=inside)
    tl.store(ptr + 2 * stride + row, mean_logit, mask=inside)
    tl.store(ptr + 3 * stride + row, logprob, mask=inside)
    tl.store(ptr + 4 * stride + row, mr, mask=inside)
    tl.store(ptr + 5 * stride + row, ref_log_sum, mask=inside)
    tl.store(ptr + 6 * stride + row, ref_logprob, mask=inside)
    tl.store(ptr + 7 * stride + row, mean_gap, mask=inside)


@triton.jit
def score_block(
    z_ptr, r_ptr, bias_ptr, ref_bias_ptr, keep_ptr, start, block, target, vocab, softcap, scale,
    m, s, a, mr, sr, g, m_k, s_k, a_k, mr_k, sr_k, g_k,
    HAS_REF: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_REF_BIAS: tl.constexpr, HAS_KEEP: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_SCALE: tl.constexpr, ROUND_BF16: tl.constexpr, BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Folds columns start.. of a row, its target left out, into the lanes' sums: full vocabulary and support."""
    cols = tl.max_contiguous(start + block, [1, VECTOR])
    z = load_logits(z_ptr, bias_ptr, cols, vocab, softcap, scale, HAS_BIAS, HAS_SOFTCAP, HAS_SCALE, ROUND_BF16, MASKED)
    r = z
    if HAS_REF:
        r = load_logits(
            r_ptr, ref_bias_ptr, cols, vocab, softcap, scale, HAS_REF_BIAS, HAS_SOFTCAP, HAS_SCALE, ROUND_BF16, MASKED
        )
    if (target >= start) & (target < start + BLOCK):
        z = tl.where(cols == target, EXCLUDED, z)
    m, s, a, mr, sr, g = fold(z, r, m, s, a, mr, sr, g, HAS_REF, 0)
    if HAS_KEEP:
        keep = tl.load(keep_ptr + cols, mask=cols < vocab, other=0) != 0
        z = tl.where(keep, z, EXCLUDED)
        r = tl.where(keep, r, EXCLUDED)
        m_k, s_k, a_k, mr_k, sr_k, g_k = fold(z, r, m_k, s_k, a_k, mr_k, sr_k, g_k, HAS_REF, 0)
    return m, s, a, mr, sr, g, m_k, s_k, a_k, mr_k, sr_k, g_k


@triton.jit
def score_kernel(
    z_ptr, z_stride, r_ptr, r_stride, bias_ptr, ref_bias_ptr, keep_ptr, target_ptr, row_ids_ptr, temperature_ptr,
    stats_ptr, support_stats_ptr, stats_stride, factors_ptr, factors_stride, grad_ptr, grad_stride,
    vocab, softcap, scale,
    HAS_REF: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_REF_BIAS: tl.constexpr, HAS_KEEP: tl.constexpr,
    HAS_ROW_IDS: tl.constexpr, ROW_TEMPERATURE: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SCALE: tl.constexpr,
    ROUND_BF16: tl.constexpr, WRITE_GRADIENT: tl.constexpr, HAS_B: tl.constexpr, HAS_C: tl.constexpr,
    BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Statistics of one row over the full vocabulary and on the support; with WRITE_GRADIENT its gradient too.

    LANES must be VECTOR times the number of threads: then a lane's sums and all its logits are in one thread.
    """
    i = tl.program_id(0).to(tl.int64)
    row = i
    if HAS_ROW_IDS:
        row = tl.load(row_ids_ptr + i)
    z_ptr += row * z_stride
    r_ptr += row * r_stride
    keep_ptr += i * vocab
    target = tl.load(target_ptr + i)
    if ROW_TEMPERATURE:
        scale /= tl.load(temperature_ptr + i)
    block = tl.arange(0, BLOCK // LANES)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    whole = vocab // BLOCK * BLOCK

    # every lane keeps sums of its own, so that no thread waits for another before the end of the row
    m = tl.zeros([LANES], tl.float32) + EXCLUDED
    mr = tl.zeros([LANES], tl.float32) + EXCLUDED
    s = tl.zeros([LANES], tl.float32)
    a = tl.zeros([LANES], tl.float32)
    sr = tl.zeros([LANES], tl.float32)
    g = tl.zeros([LANES], tl.float32)
    m_k = tl.zeros([LANES], tl.float32) + EXCLUDED
    mr_k = tl.zeros([LANES], tl.float32) + EXCLUDED
    s_k = tl.zeros([LANES], tl.float32)
    a_k = tl.zeros([LANES], tl.float32)
    sr_k = tl.zeros([LANES], tl.float32)
    g_k = tl.zeros([LANES], tl.float32)
    for start in range(0, whole, BLOCK):
        m, s, a, mr, sr, g, m_k, s_k, a_k, mr_k, sr_k, g_k = score_block(
            z_ptr, r_ptr, bias_ptr, ref_bias_ptr, keep_ptr, start, block, target, vocab, softcap, scale,
            m, s, a, mr, sr, g, m_k, s_k, a_k, mr_k, sr_k, g_k,
            HAS_REF, HAS_BIAS, HAS_REF_BIAS, HAS_KEEP, HAS_SOFTCAP, HAS_SCALE, ROUND_BF16, BLOCK, False,
        )  # fmt: skip
    if whole < vocab:
        m, s, a, mr, sr, g, m_k, s_k, a_k, mr_k, sr_k, g_k = score_block(
            z_ptr, r_ptr, bias_ptr, ref_bias_ptr, keep_ptr, whole, block, target, vocab, softcap, scale,
            m, s, a, mr, sr, g, m_k, s_k, a_k, mr_k, sr_k, g_k,
            HAS_REF, HAS_BIAS, HAS_REF_BIAS, HAS_KEEP, HAS_SOFTCAP, HAS_SCALE, ROUND_BF16, BLOCK, True,
        )  # fmt: skip

    z_t = load_logits(
        z_ptr, bias_ptr, target, vocab, softcap, scale, HAS_BIAS, HAS_SOFTCAP, HAS_SCALE, ROUND_BF16, False
    )
    r_t = z_t
    if HAS_REF:
        r_t = load_logits(
            r_ptr, ref_bias_ptr, target, vocab, softcap, scale, HAS_REF_BIAS, HAS_SOFTCAP, HAS_SCALE, ROUND_BF16, False
        )
    m, s, a, mr, sr, g = merge_lanes(m, s, a, mr, sr, g, HAS_REF)
    top, log_sum, mean_logit, logprob, mr, ref_log_sum, ref_logprob, mean_gap = finish(
        z_t, r_t, m, s, a, mr, sr, g, HAS_REF
    )
    store_stats(
        stats_ptr, stats_stride, i, True, top, log_sum, mean_logit, logprob, mr, ref_log_sum, ref_logprob, mean_gap
    )
    if HAS_KEEP:
        m_k, s_k, a_k, mr_k, sr_k, g_k = merge_lanes(m_k, s_k, a_k, mr_k, sr_k, g_k, HAS_REF)
        top_k, log_sum_k, mean_logit_k, logprob_k, mr_k, ref_log_sum_k, ref_logprob_k, mean_gap_k = finish(
            z_t, r_t, m_k, s_k, a_k, mr_k, sr_k, g_k, HAS_REF
        )
        store_stats(
            support_stats_ptr, stats_stride, i, True, top_k, log_sum_k, mean_logit_k, logprob_k, mr_k, ref_log_sum_k,
            ref_logprob_k, mean_gap_k,
        )  # fmt: skip
    if WRITE_GRADIENT:
        # every column is read and written by the same thread, so grad_ptr may be z_ptr's row
        grad_ptr += row * grad_stride
        fa = tl.load(factors_ptr + i)
        fb = load_factor(factors_ptr, factors_stride, 1, i, HAS_B)
        fc = load_factor(factors_ptr, factors_stride, 2, i, HAS_C)
        for start in range(0, vocab, BLOCK):
            cols = tl.max_contiguous(start + block, [1, VECTOR])
            z = load_logits(
                z_ptr, bias_ptr, cols, vocab, softcap, scale, HAS_BIAS, HAS_SOFTCAP, HAS_SCALE, ROUND_BF16, True
            )
            r = z
            if HAS_C:
                r = load_logits(
                    r_ptr, ref_bias_ptr, cols, vocab, softcap, scale,
                    HAS_REF_BIAS, HAS_SOFTCAP, HAS_SCALE, ROUND_BF16, True,
                )  # fmt: skip
            gradient = gradient_block(
                z, r, cols == target, top, log_sum, mean_logit, logprob, mr, mean_gap, fa, fb, fc, HAS_B, HAS_C
            )
            gradient = before_processing(gradient, z, softcap, scale, HAS_SOFTCAP, HAS_SCALE)
            tl.store(grad_ptr + cols, gradient.to(grad_ptr.dtype.element_ty), mask=cols < vocab)
