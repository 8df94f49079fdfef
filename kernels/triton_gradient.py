"""The gradient over the logits from known statistics, the Triton twin of epilogue.dlogits_. No atomics."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_logits import LOG2E, load_logits


@triton.jit
def load_factor(ptr, stride, index: tl.constexpr, row, GIVEN: tl.constexpr):
    """A row's factor, or zero if that score has none."""
    if GIVEN:
        return tl.load(ptr + index * stride + row)
    else:
        return 0.0


@triton.jit
def gradient_block(
    z, r, is_target, top, log_sum, mean_logit, logprob, mr, mean_gap, fa, fb, fc,
    HAS_B: tl.constexpr, HAS_C: tl.constexpr,
):  # fmt: skip
    """dL/dz of a block of processed logits for the row factors fa, fb, fc; see epilogue.dlogits_."""
    z = z - top
    p = tl.exp2((z - log_sum) * LOG2E)
    slope = tl.zeros_like(z)
    if HAS_B:
        slope -= fb * (z - mean_logit)
    if HAS_C:
        slope += fc * ((z - (r - mr)) - mean_gap)
    # 1 - p at the target without cancellation: from the log-probability, by the series where it is small
    x = -logprob
    one_minus_p = tl.where(x < 1e-2, x * (1.0 - x * (0.5 - x * (1.0 / 6.0))), 1.0 - tl.exp2(logprob * LOG2E))
    return p * slope + fa * tl.where(is_target, one_minus_p, -p)


@triton.jit
def before_processing(gradient, z, softcap, scale, HAS_SOFTCAP: tl.constexpr, HAS_SCALE: tl.constexpr):
    """The gradient by the head's output, from the one by the processed logits z."""
    if HAS_SOFTCAP:
        tanh = z / (scale * softcap)
        gradient *= 1.0 - tanh * tanh
    if HAS_SCALE:
        gradient *= scale
    return gradient


@triton.jit
def gradient_kernel(
    z_ptr, z_stride, r_ptr, r_stride, bias_ptr, ref_bias_ptr, keep_ptr, target_ptr, row_ids_ptr, temperature_ptr,
    stats_ptr, support_stats_ptr, stats_stride, factors_ptr, factors_stride, grad_ptr, grad_stride,
    vocab, softcap, scale,
    HAS_BIAS: tl.constexpr, HAS_REF_BIAS: tl.constexpr, HAS_KEEP: tl.constexpr, HAS_ROW_IDS: tl.constexpr,
    ROW_TEMPERATURE: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SCALE: tl.constexpr, ROUND_BF16: tl.constexpr,
    HAS_B: tl.constexpr, HAS_C: tl.constexpr, HAS_C_SUPPORT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of one block of one row from known statistics; grad_ptr may be z_ptr."""
    i = tl.program_id(0).to(tl.int64)
    row = i
    if HAS_ROW_IDS:
        row = tl.load(row_ids_ptr + i)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    target = tl.load(target_ptr + i)
    if ROW_TEMPERATURE:
        scale /= tl.load(temperature_ptr + i)

    z = load_logits(
        z_ptr + row * z_stride, bias_ptr, cols, vocab, softcap, scale,
        HAS_BIAS, HAS_SOFTCAP, HAS_SCALE, ROUND_BF16, True,
    )  # fmt: skip
    r = z
    if HAS_C or HAS_C_SUPPORT:
        r = load_logits(
            r_ptr + row * r_stride, ref_bias_ptr, cols, vocab, softcap, scale,
            HAS_REF_BIAS, HAS_SOFTCAP, HAS_SCALE, ROUND_BF16, True,
        )  # fmt: skip
    gradient = gradient_block(
        z, r, cols == target,
        tl.load(stats_ptr + i), tl.load(stats_ptr + stats_stride + i), tl.load(stats_ptr + 2 * stats_stride + i),
        tl.load(stats_ptr + 3 * stats_stride + i), tl.load(stats_ptr + 4 * stats_stride + i),
        tl.load(stats_ptr + 7 * stats_stride + i),
        tl.load(factors_ptr + i), load_factor(factors_ptr, factors_stride, 1, i, HAS_B),
        load_factor(factors_ptr, factors_stride, 2, i, HAS_C), HAS_B, HAS_C,
    )  # fmt: skip
    if HAS_KEEP:
        keep = tl.load(keep_ptr + i * vocab + cols, mask=cols < vocab, other=0) != 0
        on_support = gradient_block(
            z, r, cols == target,
            tl.load(support_stats_ptr + i), tl.load(support_stats_ptr + stats_stride + i),
            tl.load(support_stats_ptr + 2 * stats_stride + i), tl.load(support_stats_ptr + 3 * stats_stride + i),
            tl.load(support_stats_ptr + 4 * stats_stride + i), tl.load(support_stats_ptr + 7 * stats_stride + i),
            tl.load(factors_ptr + 3 * factors_stride + i), 0.0,
            load_factor(factors_ptr, factors_stride, 4, i, HAS_C_SUPPORT), False, HAS_C_SUPPORT,
        )  # fmt: skip
        gradient += tl.where(keep, on_support, 0.0)
    gradient = before_processing(gradient, z, softcap, scale, HAS_SOFTCAP, HAS_SCALE)
    tl.store(grad_ptr + row * grad_stride + cols, gradient.to(grad_ptr.dtype.element_ty), mask=cols < vocab)


@triton.jit
def scale_kernel(x_ptr, factor_ptr, count, BLOCK: tl.constexpr):
    """x *= factor, which only the device knows; if it is 1, x is not touched."""
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + offsets, mask=offsets < count, other=0.0)
        tl.store(x_ptr + offsets, (x.to(tl.float32) * factor).to(x.dtype), mask=offsets < count)
