"""One program per row of logits, the Triton twin of cpu/epilogue.py: the statistics, and the gradient in place.

`score_kernel` reads every logit once, keeps online sums of all that RowStats needs, and can go over the row a second
time to write the gradient when the loss's factors are known (from memory again: the rows in flight are larger than the
L2 cache). `gradient_kernel` writes it from known statistics. Rows on grid axis x, 64-bit row offsets, no atomics:
results are bitwise reproducible and do not depend on the other rows.

The online sums `sums` = (m, mr, s, a, sr, g) are centred at the running maxima m and mr; with e = exp(z - m):

    s = sum e        a = sum e (z - m)        sr = sum exp(r - mr)        g = sum e ((z - m) - (r - mr))

A block that raises the maximum to m' turns a into exp(m - m') (a + (m - m') s), and g likewise. The target's own logit
is left out of the sums and added at the end, so that log p(y) near zero keeps its accuracy.

`fold_bits` keeps them in bits: logits times log2(e), centred by one multiply-add that rounds once, so that logits of
1e4 lose nothing, and e = exp2(z - m). `in_nats` turns the sums of the whole row into the above.

Arguments come in tuples of pointers, numbers and compile-time flags, which Triton passes on as if they were single.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..passes import LogitOptions

EXCLUDED = tl.constexpr(-1e30)  # as stats.EXCLUDED
NO_LOGIT = tl.constexpr(-1e20)  # as stats.NO_LOGIT
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST_BITS = tl.constexpr(-1e25)
"""A maximum over nothing, in bits: far above what is EXCLUDED, which therefore adds exactly nothing to any sum."""
OUTSIDE, THRESHOLD, EDGE_ID = tl.constexpr(8), tl.constexpr(9), tl.constexpr(10)  # places in RowStats
FORWARD_KL, JSD, KL_TO_MIXTURE = tl.constexpr(11), tl.constexpr(12), tl.constexpr(13)
VECTOR = tl.constexpr(4)
"""How many logits a thread of score_kernel loads at once, the same for every dtype: otherwise narrower ones would have
to be rearranged between threads."""


class Inputs(NamedTuple):
    """Where a launch reads, a tensor or a stride each; any tensor stands in for what the flags say is not there."""

    z: Any  # [*, V], rows z_stride apart
    z_stride: Any
    r: Any
    r_stride: Any
    bias: Any  # f32 [V]
    ref_bias: Any
    keep: Any  # u8 [n, V]
    bans: Any  # i64 [B]: ids that a threshold does not let in
    num_bans: Any  # i64 [n]: so many of them in each row
    target: Any  # i64 [n]
    row_ids: Any  # i64 [n]
    temperature: Any  # f32 [n]


class Stats(NamedTuple):
    """The fields of RowStats over the full vocabulary and on the support, f32 [n] each, `stride` apart."""

    full: Any
    support: Any
    stride: Any
    rank: Any  # i64 [n]: the number of logits that must reach `low`
    low: Any  # f32 [n]


class Gradient(NamedTuple):
    """The factors of TokenCoefficients, f32 [9, n], and where the gradient goes, [*, V]."""

    factors: Any
    factors_stride: Any
    out: Any
    out_stride: Any


class Numbers(NamedTuple):
    """scale = logit_scale / temperature, but for temperatures of each row."""

    vocab: Any
    softcap: Any
    scale: Any


class Flags(NamedTuple):
    """What a compiled kernel does; what is false costs nothing."""

    has_ref: bool = False
    has_bias: bool = False
    has_ref_bias: bool = False
    has_keep: bool = False  # a support as a mask
    has_threshold: bool = False  # a support as a threshold in its RowStats
    find_low: bool = False  # a bound for top_k is wanted
    has_row_ids: bool = False
    row_temperature: bool = False
    has_softcap: bool = False
    has_scale: bool = False
    has_inf: bool = False  # logits may be -inf: given ones, and those with a bias
    round_bf16: bool = False
    write_gradient: bool = False
    has_b: bool = False  # a factor of the entropy
    has_c: bool = False  # a factor of the KL
    has_c_support: bool = False  # a factor of the KL on the support
    reads_reference: bool = False  # in gradient_kernel
    forward_kl: bool = False  # the forward KL, or a factor of it
    jsd: bool = False  # the Jensen-Shannon divergence, or a factor of it
    forward_kl_support: bool = False  # factors on the support
    jsd_support: bool = False
    lowest_ids: bool = False  # of equal logits at a threshold the lowest ids are kept, not the highest

    @classmethod
    def of(cls, options: LogitOptions, bias: Tensor | None, ref_bias: Tensor | None) -> Flags:
        """What the options and the biases of policy and reference ask for."""
        return cls(
            has_bias=bias is not None, has_ref_bias=ref_bias is not None, has_softcap=options.softcap is not None,
            row_temperature=isinstance(options.temperature, Tensor), has_scale=options.has_scale,
            has_inf=bias is not None or ref_bias is not None, round_bf16=options.logits_dtype == "bfloat16",
        )  # fmt: skip


@triton.jit
def process_logits(x, numbers, FLAGS: tl.constexpr, KEEP_INF: tl.constexpr):
    """softcap * tanh(x / softcap) * scale of float32 head outputs, as LogitOptions says; -inf becomes EXCLUDED unless
    KEEP_INF."""
    _, softcap, scale = numbers
    if FLAGS.round_bf16:
        x = x.to(tl.bfloat16).to(tl.float32)
    if FLAGS.has_softcap:
        # tanh(y) = 1 - 2 / (exp(2 y) + 1): right at both ends, where exp is infinite or zero
        x = softcap * (1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E / softcap)) + 1.0))
    if FLAGS.has_scale:
        x *= scale
    if FLAGS.has_inf and not KEEP_INF:  # NaN must stay NaN: it is reported at the border
        x = tl.maximum(x, EXCLUDED, propagate_nan=tl.PropagateNan.ALL)
    return x


@triton.jit
def load_logits(
    ptr, bias_ptr, cols, numbers, HAS_BIAS: tl.constexpr, FLAGS: tl.constexpr, MASKED: tl.constexpr,
    KEEP_INF: tl.constexpr,
):  # fmt: skip
    """Processed logits of some columns of a row; beyond its end EXCLUDED, or -inf if KEEP_INF. MASKED: whether there
    may be such columns."""
    if MASKED:
        inside = cols < numbers[0]
        x = tl.load(ptr + cols, mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            x += tl.load(bias_ptr + cols, mask=inside, other=0.0)
    else:
        x = tl.load(ptr + cols).to(tl.float32)
        if HAS_BIAS:
            x += tl.load(bias_ptr + cols)
    x = process_logits(x, numbers, FLAGS, KEEP_INF)
    if MASKED:
        x = tl.where(inside, x, -float("inf") if KEEP_INF else EXCLUDED)
    return x


@triton.jit
def load_pair(
    row, cols, numbers, WITH_REF: tl.constexpr, FLAGS: tl.constexpr, MASKED: tl.constexpr, KEEP_INF: tl.constexpr
):  # fmt: skip
    """load_logits of policy and reference, whose pointers and biases' pointers are in `row`; KEEP_INF: in the
    reference."""
    z_ptr, bias_ptr, r_ptr, ref_bias_ptr = row
    z = load_logits(z_ptr, bias_ptr, cols, numbers, FLAGS.has_bias, FLAGS, MASKED, False)
    r = z
    if WITH_REF:
        r = load_logits(r_ptr, ref_bias_ptr, cols, numbers, FLAGS.has_ref_bias, FLAGS, MASKED, KEEP_INF)
    return z, r


@triton.jit
def locate(inputs, numbers, FLAGS: tl.constexpr):
    """This program's number, its row in the inputs, its target, and the numbers with its own scale."""
    i = tl.program_id(0).to(tl.int64)
    row = i
    if FLAGS.has_row_ids:
        row = tl.load(inputs.row_ids + i)
    target = tl.load(inputs.target + i).to(tl.int32)  # 64-bit comparisons cost twice
    vocab, softcap, scale = numbers
    if FLAGS.row_temperature:
        scale /= tl.load(inputs.temperature + i)
    return i, row, target, (vocab, softcap, scale)


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
def weighted(e, gap):
    """e * gap, zero where e is: the gap is infinite at an id that the reference excludes."""
    return tl.where(e == 0.0, 0.0, e * gap)


@triton.jit
def no_sums_bits(N: tl.constexpr):
    """The sums over nothing in bits, [N] each."""
    m = tl.zeros([N], tl.float32) + LOWEST_BITS
    zero = tl.zeros([N], tl.float32)
    return m, m, zero, zero, zero, zero


@triton.jit
def centred_bits(x, m):
    """x * log2(e) - m, rounded once."""
    return tl.fma(x, LOG2E, -m)


@triton.jit
def fold_bits(z, r, sums, HAS_REF: tl.constexpr, HAS_INF: tl.constexpr, AXIS: tl.constexpr):
    """Adds a tile of logits along AXIS to the online sums in bits, of which there is one set per index of its other
    axis. What is excluded is EXCLUDED in z, and -inf in r (EXCLUDED will do where it is excluded in both); without
    HAS_INF nothing is -inf in r."""
    m, mr, s, a, sr, g = sums
    m_new = tl.maximum(m, tl.max(z, AXIS) * LOG2E)
    rescale = tl.exp2(m - m_new)
    z = centred_bits(z, tl.expand_dims(m_new, AXIS))
    e = tl.exp2(z)
    if HAS_REF:
        mr_new = tl.maximum(mr, tl.max(r, AXIS) * LOG2E)
        r = centred_bits(r, tl.expand_dims(mr_new, AXIS))
        sr = sr * tl.exp2(mr - mr_new) + tl.sum(tl.exp2(r), AXIS)
        gap = z - r
        g += s * ((m - m_new) - (mr - mr_new))
        # the gap is infinite where the reference excludes an id
        g = weighted(rescale, g) + tl.sum(weighted(e, gap) if HAS_INF else e * gap, AXIS)
        mr = mr_new
    a = rescale * (a + s * (m - m_new)) + tl.sum(e * z, AXIS)
    s = s * rescale + tl.sum(e, AXIS)
    return m_new, mr, s, a, sr, g


@triton.jit
def merge_lanes(sums, HAS_REF: tl.constexpr):
    """The lanes' online sums [LANES] in bits as one set of scalars in nats."""
    m, mr, s, a, sr, g = sums
    top = tl.max(m, 0)
    weight = tl.exp2(m - top)
    ref_top = tl.max(mr, 0)
    if HAS_REF:
        g = weighted(weight, g + s * ((m - top) - (mr - ref_top)))
        sr = sr * tl.exp2(mr - ref_top)
    a = weight * (a + s * (m - top))
    return in_nats((top, ref_top, tl.sum(s * weight, 0), tl.sum(a, 0), tl.sum(sr, 0), tl.sum(g, 0)), HAS_REF)


@triton.jit
def in_nats(sums, HAS_REF: tl.constexpr):
    """The sums of a row centred at its maxima in nats. `off` is what rounding the maximum to float32 moves the centre
    by, exactly: every exponential carries it."""
    m, mr, s, a, sr, g = sums
    top, off = nats_and_rest(m)
    back = tl.exp2(-off)
    ref_top = mr
    if HAS_REF:
        ref_top, ref_off = nats_and_rest(mr)
        sr *= tl.exp2(-ref_off)
        g = LN2 * back * (g - s * (off - ref_off))
    return top, ref_top, s * back, LN2 * back * (a - s * off), sr, g


@triton.jit
def nats_and_rest(bits):
    """A maximum in nats, and by how many bits that exceeds it."""
    nats = bits * LN2
    rest = centred_bits(nats, bits)
    return nats, tl.where(bits <= LOWEST_BITS, 0.0, rest)


@triton.jit
def finish(z_t, r_t, sums, HAS_REF: tl.constexpr):
    """Adds the target to the sums over all other ids: the statistics of RowStats, in its order. For one row or many."""
    m, mr, s, a, sr, g = sums
    top = tl.maximum(m, z_t)
    rescale = tl.exp2((m - top) * LOG2E)
    exp_target = tl.exp2((z_t - top) * LOG2E)
    others = s * rescale
    log_sum = log_of_sum(others, exp_target, z_t == top)
    log_sum = tl.where(top < NO_LOGIT, float("nan"), log_sum)  # no id can be drawn
    total = others + exp_target
    mean_logit = (rescale * (a + s * (m - top)) + exp_target * (z_t - top)) / total
    logprob = tl.where(z_t < NO_LOGIT, -float("inf"), z_t - top) - log_sum
    ref_log_sum = tl.zeros_like(log_sum)
    ref_logprob = tl.zeros_like(log_sum)
    mean_gap = tl.zeros_like(log_sum)
    if HAS_REF:
        ref_log_sum = tl.log(sr)
        ref_logprob = (r_t - mr) - ref_log_sum
        at_target = weighted(exp_target, (z_t - top) - (r_t - mr))
        mean_gap = (weighted(rescale, g + s * (m - top)) + at_target) / total
    return top, log_sum, mean_logit, logprob, mr, ref_log_sum, ref_logprob, mean_gap


@triton.jit
def store_fields(ptr, stride, row, inside, values):
    """Writes the fields of one row or of many, where `inside`; they lie `stride` apart."""
    for field in tl.static_range(len(values)):
        tl.store(ptr + field * stride + row, values[field], mask=inside)


@triton.jit
def load_stats(ptr, stride, row):
    """What the gradient needs of a row's RowStats: max, log_sum, mean_logit, logprob, ref_max, mean_gap."""
    return (
        tl.load(ptr + row), tl.load(ptr + stride + row), tl.load(ptr + 2 * stride + row),
        tl.load(ptr + 3 * stride + row), tl.load(ptr + 4 * stride + row), tl.load(ptr + 7 * stride + row),
    )  # fmt: skip


@triton.jit
def load_factor(gradient, index: tl.constexpr, row, GIVEN: tl.constexpr):
    """A row's factor, or zero if that score has none."""
    if GIVEN:
        return tl.load(gradient.factors + index * gradient.factors_stride + row)
    else:
        return 0.0


@triton.jit
def one_minus_exp(logprob):
    """1 - exp(logprob) without cancellation: by the series where the log-probability is small."""
    x = -logprob
    return tl.where(x < 1e-2, x * (1.0 - x * (0.5 - x * (1.0 / 6.0))), 1.0 - tl.exp2(logprob * LOG2E))


@triton.jit
def gradient_block(
    z, r, cols, target, holds_target, stats, factors, HAS_B: tl.constexpr, HAS_C: tl.constexpr
):  # fmt: skip
    """dL/dz = a (1[v = y] - p) - b p (z - E_p[z]) + c p (d - E_p[d]) of a block of processed logits, with the row's
    factors (a, b, c) and load_stats, as cpu/epilogue.py. holds_target: whether the target is among the columns."""
    top, log_sum, mean_logit, logprob, mr, mean_gap = stats
    fa, fb, fc = factors
    z = z - top
    p = tl.exp2(centred_bits(z, log_sum * LOG2E))
    slope = tl.zeros_like(z)
    if HAS_B:
        slope -= fb * (z - mean_logit)
    if HAS_C:  # an infinite KL without a factor has no gradient; the logits of r are finite
        slope += fc * ((z - (r - mr)) - tl.where(fc == 0.0, 0.0, mean_gap))
    dz = p * (slope - fa)
    if holds_target:
        dz = tl.where(cols == target, p * slope + fa * one_minus_exp(logprob), dz)
    return dz


@triton.jit
def load_normalisers(ptr, stride, row):
    """max, log_sum, ref_max and ref_log_sum of a row's RowStats."""
    return (
        tl.load(ptr + row), tl.load(ptr + stride + row), tl.load(ptr + 4 * stride + row),
        tl.load(ptr + 5 * stride + row),
    )  # fmt: skip


@triton.jit
def compare(z, r, normalisers):
    """p, q, t = log(q / p) and x = exp(-|t|) - 1 of processed logits, see cpu/divergences.py."""
    top, log_sum, ref_top, ref_log_sum = normalisers
    z = z - top
    r = r - ref_top
    t = (r - z) - (ref_log_sum - log_sum)
    u = tl.abs(t)
    series = -u * (1.0 - u * (0.5 - u * (1.0 / 6.0 - u * (1.0 / 24.0 - u * (1.0 / 120.0)))))
    x = tl.where(u < 0.15, series, tl.exp2(-u * LOG2E) - 1.0)
    return tl.exp2((z - log_sum) * LOG2E), tl.exp2((r - ref_log_sum) * LOG2E), t, x


@triton.jit
def log_over_mixture(t, x):
    """log(p / m) with m = (p + q) / 2; with -t for t, log(q / m). x is from -1 to 0."""
    half = 0.5 * x
    one_plus = 1.0 + half
    rounded = one_plus - 1.0  # as in log_of_sum
    log1p = tl.where(rounded == 0.0, half, tl.log(one_plus) * (half / tl.where(rounded == 0.0, 1.0, rounded)))
    return -log1p - tl.maximum(t, 0.0)


@triton.jit
def divergence_gradient(
    z, r, ptr, stats, gradient, row, HAS_FORWARD: tl.constexpr, HAS_JSD: tl.constexpr, FACTOR: tl.constexpr
):  # fmt: skip
    """c (p - q) + d / 2 p (log(p / m) - KL(p, m)) of a block of processed logits, with the factors c and d of the
    forward KL and the jsd, FACTOR and FACTOR + 1 of `gradient`; ptr: the distribution's RowStats."""
    p, q, t, x = compare(z, r, load_normalisers(ptr, stats.stride, row))
    result = tl.zeros_like(z)
    if HAS_FORWARD:
        result += load_factor(gradient, FACTOR, row, True) * (tl.where(t > 0.0, q, -p) * x)
    if HAS_JSD:
        to_mixture = tl.load(ptr + KL_TO_MIXTURE * stats.stride + row)
        result += 0.5 * load_factor(gradient, FACTOR + 1, row, True) * (p * (log_over_mixture(t, x) - to_mixture))
    return result


@triton.jit
def before_processing(gradient, z, numbers, FLAGS: tl.constexpr):
    """The gradient by the head's output, from the one by the processed logits z."""
    _, softcap, scale = numbers
    if FLAGS.has_softcap:
        tanh = z / (scale * softcap)
        gradient *= 1.0 - tanh * tanh
    if FLAGS.has_scale:
        gradient *= scale
    return gradient


@triton.jit
def score_block(
    row, keep_ptr, start, block, target, numbers, sums, sums_k,
    FLAGS: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Folds columns start.. of a row, its target left out, into the lanes' sums: full vocabulary and support."""
    cols = tl.max_contiguous(start + block, [1, VECTOR])
    z, r = load_pair(row, cols, numbers, FLAGS.has_ref, FLAGS, MASKED, True)
    if (target >= start) & (target < start + BLOCK):
        z = tl.where(cols == target, EXCLUDED, z)
    sums = fold_bits(z, r, sums, FLAGS.has_ref, FLAGS.has_inf or MASKED, 0)
    if FLAGS.has_keep:
        keep = tl.load(keep_ptr + cols, mask=cols < numbers[0], other=0) != 0
        z = tl.where(keep, z, EXCLUDED)
        r = tl.where(keep, r, -float("inf"))
        sums_k = fold_bits(z, r, sums_k, FLAGS.has_ref, True, 0)
    return sums, sums_k


@triton.jit
def reached_by(maxima, rank, LANES: tl.constexpr):
    """A number that at least `rank` logits reach: that many of the lanes' maxima (in bits) do. -inf: no such number."""
    ordered = tl.sort(maxima, 0, True)
    bits = tl.sum(tl.where(tl.arange(0, LANES) == rank - 1, ordered, 0.0), 0)
    low = (bits - tl.abs(bits) * 4e-7) * LN2  # below all that the maximum may have been rounded from
    return tl.where(rank > LANES, -float("inf"), low)


@triton.jit
def is_kept(z, cols, threshold, edge_id, start, block, bans, num_bans, LOWEST_IDS: tl.constexpr):
    """Which logits of columns start..start + block a threshold keeps (gpu/supports.py), the target aside."""
    if LOWEST_IDS:
        keep = (z > threshold) | ((z == threshold) & (cols <= edge_id))
    else:
        keep = (z > threshold) | ((z == threshold) & (cols >= edge_id))
    for b in range(0, num_bans):
        banned = tl.load(bans + b).to(tl.int32)
        if (banned >= start) & (banned < start + block):
            keep = keep & (cols != banned)
    return keep


@triton.jit
def write_gradient_block(
    row, out, start, block, target, numbers, known, factors,
    FLAGS: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The gradient of columns start.. of a row by its raw logits, from load_stats and load_factor of the row."""
    cols = tl.max_contiguous(start + block, [1, VECTOR])
    z, r = load_pair(row, cols, numbers, FLAGS.has_c, FLAGS, MASKED, False)
    holds_target = (target >= start) & (target < start + BLOCK)
    dz = gradient_block(z, r, cols, target, holds_target, known, factors, FLAGS.has_b, FLAGS.has_c)
    dz = before_processing(dz, z, numbers, FLAGS).to(out.dtype.element_ty)
    if MASKED:
        tl.store(out + cols, dz, mask=cols < numbers[0])
    else:
        tl.store(out + cols, dz)


@triton.jit
def score_kernel(
    inputs, stats, gradient, numbers, FLAGS: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """Statistics of one row over the full vocabulary and on the support; with write_gradient its gradient too.

    LANES must be VECTOR times the number of threads: then a lane's sums and all its logits are in one thread.
    """
    i, row_id, target, numbers = locate(inputs, numbers, FLAGS)
    vocab = numbers[0]
    row = inputs.z + row_id * inputs.z_stride, inputs.bias, inputs.r + row_id * inputs.r_stride, inputs.ref_bias
    keep_ptr = inputs.keep + i * vocab
    block = tl.arange(0, BLOCK // LANES)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    whole = vocab // BLOCK * BLOCK

    # every lane keeps its own sums, so that no thread waits for another before the end of the row
    sums = no_sums_bits(LANES)
    sums_k = no_sums_bits(LANES)
    for start in range(0, whole, BLOCK):
        sums, sums_k = score_block(row, keep_ptr, start, block, target, numbers, sums, sums_k, FLAGS, BLOCK, False)
    if whole < vocab:
        sums, sums_k = score_block(row, keep_ptr, whole, block, target, numbers, sums, sums_k, FLAGS, BLOCK, True)

    if FLAGS.find_low:
        tl.store(stats.low + i, reached_by(sums[0], tl.load(stats.rank + i), LANES))
    z_t, r_t = load_pair(row, target, numbers, FLAGS.has_ref, FLAGS, False, True)
    full = finish(z_t, r_t, merge_lanes(sums, FLAGS.has_ref), FLAGS.has_ref)
    store_fields(stats.full, stats.stride, i, True, full)
    if FLAGS.has_keep:
        on_support = finish(z_t, r_t, merge_lanes(sums_k, FLAGS.has_ref), FLAGS.has_ref)
        store_fields(stats.support, stats.stride, i, True, on_support)
    if FLAGS.write_gradient:
        # every column is read and written by the same thread, so gradient.out may be z's row
        out = gradient.out + row_id * gradient.out_stride
        top, log_sum, mean_logit, logprob, mr, _, _, mean_gap = full
        known = (top, log_sum, mean_logit, logprob, mr, mean_gap)
        fa = load_factor(gradient, 0, i, True)
        factors = (fa, load_factor(gradient, 1, i, FLAGS.has_b), load_factor(gradient, 2, i, FLAGS.has_c))
        for start in range(0, whole, BLOCK):
            write_gradient_block(row, out, start, block, target, numbers, known, factors, FLAGS, BLOCK, False)
        if whole < vocab:
            write_gradient_block(row, out, whole, block, target, numbers, known, factors, FLAGS, BLOCK, True)


@triton.jit
def gradient_kernel(inputs, stats, gradient, numbers, FLAGS: tl.constexpr, BLOCK: tl.constexpr):
    """The gradient of one block of one row from known statistics; gradient.out may be z.

    With has_threshold, rows without a threshold (NaN) are left for a launch with has_keep.
    """
    i, row_id, target, numbers = locate(inputs, numbers, FLAGS)
    if FLAGS.has_threshold:
        threshold = tl.load(stats.support + THRESHOLD * stats.stride + i)
        if threshold == threshold:
            gradient_of_block(inputs, stats, gradient, i, row_id, target, numbers, threshold, FLAGS, BLOCK)
    else:
        gradient_of_block(inputs, stats, gradient, i, row_id, target, numbers, 0.0, FLAGS, BLOCK)


@triton.jit
def gradient_of_block(
    inputs, stats, gradient, i, row_id, target, numbers, threshold, FLAGS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """gradient_kernel, of one row after locate."""
    vocab = numbers[0]
    row = inputs.z + row_id * inputs.z_stride, inputs.bias, inputs.r + row_id * inputs.r_stride, inputs.ref_bias
    start = tl.program_id(1) * BLOCK
    cols = start + tl.arange(0, BLOCK)
    z, r = load_pair(row, cols, numbers, FLAGS.reads_reference, FLAGS, True, False)
    holds_target = (target >= start) & (target < start + BLOCK)
    known = load_stats(stats.full, stats.stride, i)
    fa = load_factor(gradient, 0, i, True)
    factors = (fa, load_factor(gradient, 1, i, FLAGS.has_b), load_factor(gradient, 2, i, FLAGS.has_c))
    dz = gradient_block(z, r, cols, target, holds_target, known, factors, FLAGS.has_b, FLAGS.has_c)
    if FLAGS.forward_kl or FLAGS.jsd:
        dz += divergence_gradient(z, r, stats.full, stats, gradient, i, FLAGS.forward_kl, FLAGS.jsd, 5)
    if FLAGS.has_keep or FLAGS.has_threshold:
        if FLAGS.has_keep:
            keep = tl.load(inputs.keep + i * vocab + cols, mask=cols < vocab, other=0) != 0
        else:
            edge_id = tl.load(stats.support + EDGE_ID * stats.stride + i).to(tl.int32)
            num_bans = tl.load(inputs.num_bans + i).to(tl.int32)
            keep = is_kept(z, cols, threshold, edge_id, start, BLOCK, inputs.bans, num_bans, FLAGS.lowest_ids) | (
                cols == target
            )
        known = load_stats(stats.support, stats.stride, i)
        factors = (load_factor(gradient, 3, i, True), 0.0, load_factor(gradient, 4, i, FLAGS.has_c_support))
        on_support = gradient_block(z, r, cols, target, holds_target, known, factors, False, FLAGS.has_c_support)
        if FLAGS.forward_kl_support or FLAGS.jsd_support:
            on_support += divergence_gradient(
                z, r, stats.support, stats, gradient, i, FLAGS.forward_kl_support, FLAGS.jsd_support, 7
            )
        dz += tl.where(keep, on_support, 0.0)
    dz = before_processing(dz, z, numbers, FLAGS)
    tl.store(
        gradient.out + row_id * gradient.out_stride + cols, dz.to(gradient.out.dtype.element_ty), mask=cols < vocab
    )


@triton.jit
def scale_kernel(x_ptr, factor_ptr, count, BLOCK: tl.constexpr):
    """x *= factor, which only the device knows; if it is 1, x is not touched."""
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + offsets, mask=offsets < count, other=0.0)
        tl.store(x_ptr + offsets, (x.to(tl.float32) * factor).to(x.dtype), mask=offsets < count)
