"""What the Triton kernels make of a head's output before anything else: bias, rounding, softcap, scale, temperature."""

from __future__ import annotations

import triton
import triton.language as tl

EXCLUDED = tl.constexpr(-1e30)  # as epilogue.EXCLUDED
LOG2E = tl.constexpr(1.4426950408889634)
VECTOR = tl.constexpr(4)
"""How many logits a thread of score_kernel loads at once, of any dtype: else narrower ones would be laid out anew."""


@triton.jit
def process_logits(
    x, softcap, scale, HAS_SOFTCAP: tl.constexpr, HAS_SCALE: tl.constexpr, ROUND_BF16: tl.constexpr
):  # fmt: skip
    """LogitOptions of a block of float32 head outputs, scale = logit_scale / temperature; -inf becomes EXCLUDED."""
    if ROUND_BF16:
        x = x.to(tl.bfloat16).to(tl.float32)
    if HAS_SOFTCAP:
        # tanh(y) = 1 - 2 / (exp(2 y) + 1): right at both ends, where exp is infinite or zero
        x = softcap * (1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E / softcap)) + 1.0))
    if HAS_SCALE:
        x *= scale
    # NaN must stay NaN: it is reported at the border
    return tl.maximum(x, EXCLUDED, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def load_logits(
    ptr, bias_ptr, cols, vocab, softcap, scale,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SCALE: tl.constexpr, ROUND_BF16: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Processed logits of some columns of a row, EXCLUDED beyond its end; MASKED: whether there may be such columns."""
    if MASKED:
        inside = cols < vocab
        x = tl.load(ptr + cols, mask=inside, other=-float("inf")).to(tl.float32)
        if HAS_BIAS:
            x += tl.load(bias_ptr + cols, mask=inside, other=0.0)
    else:
        x = tl.load(ptr + cols).to(tl.float32)
        if HAS_BIAS:
            x += tl.load(bias_ptr + cols)
    x = process_logits(x, softcap, scale, HAS_SOFTCAP, HAS_SCALE, ROUND_BF16)
    if MASKED and HAS_SOFTCAP:  # which maps -inf to -softcap
        x = tl.where(inside, x, EXCLUDED)
    return x
