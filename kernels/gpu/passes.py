"""The passes over chunks of rows, with one Triton launch per chunk instead of one block after another. Given logits are
one chunk, unless they have a support.

score               reads every logit of policy and reference once
gradient_           reads them again, from known statistics, and writes the gradient over the policy's
score_and_gradient  both in one launch, unless there is a support
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..active import ActiveRuns
from ..passes import Rows, RowStats
from ..support import keep_mask, keep_sampled_
from ..types import TokenCoefficients
from .rows import Flags, Gradient, Inputs, Numbers, Stats, gradient_kernel, scale_kernel, score_kernel
from .sources import HeadSource, LogitsSource


class Shape(NamedTuple):
    """How score_kernel goes over a row: logits at a time, lanes (rows.VECTOR for each thread), warps."""

    block: int
    lanes: int
    warps: int


SCORE = Shape(2048, 256, 2)
"""On an H200 this reads bfloat16 logits at the speed of a copy; one warp, or fewer logits per thread, does not."""

SCORE_AND_GRADIENT = Shape(512, 128, 1)
"""Four reads and a write of a pair of logits at 4.23 of a copy's 4.29 TB/s; eleven larger shapes reach 3.7 to 4.18."""

SCORE_MORE = Shape(1024, 256, 2)
"""Where the kernel does more per logit (softcap, support): blocks of 2048 would halve the warps that fit."""

GRADIENT_BLOCK, GRADIENT_WARPS = 2048, 4
SCALE_BLOCK = 4096


class GpuPasses:
    """See Passes. Raw logits are what is handed from `score` or `reload` to `gradient_`."""

    def __init__(
        self, source: HeadSource | LogitsSource, rows: Rows, stats: RowStats, support_stats: RowStats | None
    ) -> None:
        self.source, self.rows, self.stats, self.support_stats = source, rows, stats, support_stats
        self.bias, self.ref_bias = source.biases()

    def allowed(self) -> None:
        """Nothing: supports are masks here."""

    def score(self, lo: int, hi: int) -> tuple[Tensor, Tensor | None]:
        z, r = self.source.load(lo, hi)
        self._launch_score(lo, hi, z, r, None)
        return z, r

    def reload(self, lo: int, hi: int, need_gap: bool) -> tuple[Tensor, Tensor | None]:
        return self.source.load(lo, hi, need_ref=need_gap)

    def gradient_(self, lo: int, hi: int, z: Tensor, gap: Tensor | None, coefficients: TokenCoefficients) -> None:
        self.source.store(lo, hi, self._launch_gradient(lo, hi, z, gap, coefficients))

    def gradient_of_active_(self, lo: int, z: Tensor, gap: Tensor | None, coefficients: TokenCoefficients) -> None:
        """The kernel goes over all rows, while which of them need the products after it is still on its way here."""
        runs = ActiveRuns(coefficients, len(z))
        dlogits = self._launch_gradient(lo, lo + len(z), z, gap, coefficients)
        for i, j in runs:
            self.source.store(lo + i, lo + j, dlogits[i:j])

    def _launch_gradient(
        self, lo: int, hi: int, z: Tensor, gap: Tensor | None, coefficients: TokenCoefficients
    ) -> Tensor:
        """The gradient of the logits of rows lo..hi, [hi - lo, V]; gap is the reference's logits here."""
        _, b, c, a_s, c_s = coefficients.values()
        keep = self._keep(lo, hi, z) if a_s is not None or c_s is not None else None
        out = self.source.gradient_buffer(z)
        if hi > lo:
            flags = self._flags(keep)._replace(has_b=b is not None, has_c=c is not None, has_c_support=c_s is not None)
            gradient_kernel[(hi - lo, triton.cdiv(self.source.vocab, GRADIENT_BLOCK))](
                *self._arguments(lo, hi, z, gap, keep, coefficients, out), FLAGS=flags, BLOCK=GRADIENT_BLOCK,
                num_warps=GRADIENT_WARPS,
            )  # fmt: skip
        return out

    def score_and_gradient(self, lo: int, hi: int, coefficients: TokenCoefficients) -> None:
        if self.support_stats is not None:
            self.gradient_(lo, hi, *self.score(lo, hi), coefficients)
            return
        z, r = self.source.load(lo, hi)
        self._launch_score(lo, hi, z, r, coefficients)
        self.source.store(lo, hi, self.source.gradient_buffer(z))

    def _launch_score(
        self, lo: int, hi: int, z: Tensor, r: Tensor | None, coefficients: TokenCoefficients | None
    ) -> None:
        keep = None if self.support_stats is None else self._keep(lo, hi, z)
        flags = self._flags(keep)._replace(has_ref=r is not None)
        out = z
        if coefficients is not None:
            out = self.source.gradient_buffer(z)
            has_b, has_c = coefficients.entropy is not None, coefficients.kl is not None
            flags = flags._replace(write_gradient=True, has_b=has_b, has_c=has_c)
        if hi > lo:
            shape = score_shape(flags)
            score_kernel[(hi - lo,)](
                *self._arguments(lo, hi, z, r, keep, coefficients, out), FLAGS=flags, BLOCK=shape.block,
                LANES=shape.lanes, num_warps=shape.warps,
            )  # fmt: skip

    def _arguments(
        self,
        lo: int,
        hi: int,
        z: Tensor,
        r: Tensor | None,
        keep: Tensor | None,
        coefficients: TokenCoefficients | None,
        out: Tensor,
    ) -> tuple[Inputs, Stats, Gradient, Numbers]:
        """What both kernels begin with; z is passed where there is nothing to point at."""
        rows, options, picked = slice(lo, hi), self.source.options, self.source.picked

        def given(x: Tensor | None) -> Tensor:
            return z if x is None else x

        r = given(r)
        inputs = Inputs(
            z, z.stride(0), r, r.stride(0), given(self.bias), given(self.ref_bias), given(keep),
            self.rows.target_ids[rows], z if picked is None else picked[rows],
            options.temperature[rows] if isinstance(options.temperature, Tensor) else z,
        )  # fmt: skip
        stats = self.stats[rows]
        on_support = stats if self.support_stats is None else self.support_stats[rows]
        factors = self.stats.max if coefficients is None else _factors(coefficients, hi - lo, z.device)
        return (
            inputs,
            Stats(stats.max, on_support.max, self.stats.stride),
            Gradient(factors, factors.stride(0), out, out.stride(0)),
            Numbers(self.source.vocab, float(options.softcap or 1.0), options.scale),
        )

    def _flags(self, keep: Tensor | None) -> Flags:
        flags = Flags.of(self.source.options, self.bias, self.ref_bias)
        return flags._replace(
            has_keep=keep is not None,
            has_row_ids=self.source.picked is not None,
            has_inf=flags.has_inf or self.source.has_inf,
        )

    def _keep(self, lo: int, hi: int, z: Tensor) -> Tensor:
        """The support of the rows, one byte per logit: u8 [hi - lo, V], found by support.keep_mask itself. Targets
        outside of it are noted in its statistics.

        Recomputing it takes a processed copy of the policy's raw logits z.
        """
        assert self.rows.support is not None and self.support_stats is not None
        support, options, picked = self.rows.support.select(slice(lo, hi)), self.source.options, self.source.picked
        if support.is_recomputed:
            z = z if picked is None else z.index_select(0, picked[lo:hi])
            z = z.float().clone() if self.bias is None else z.float() + self.bias
            options.apply_(z)
            options.scale_(z, lo, hi)
        else:
            z = z[:1].expand(hi - lo, z.shape[1])  # only its shape and device are used
        keep = keep_mask(support, z)
        self.support_stats.outside[lo:hi] = keep_sampled_(keep, self.rows.target_ids[lo:hi])
        return keep.view(torch.uint8)


def score_shape(flags: Flags) -> Shape:
    """The shape for what score_kernel has to do."""
    if flags.write_gradient:
        return SCORE_AND_GRADIENT
    return SCORE_MORE if flags.has_softcap or flags.has_keep else SCORE


def _factors(coefficients: TokenCoefficients, num_rows: int, device: torch.device) -> Tensor:
    """The five coefficients as float32 [5, n], zero where not given."""
    values = coefficients.values()
    factors = torch.zeros(len(values), num_rows, device=device)
    for out, value in zip(factors, values, strict=True):
        if value is not None:
            out.copy_(value)
    return factors


def scale_(x: Tensor, factor: Tensor) -> None:
    """x *= factor (one float32), without waiting for the device to say whether it is 1, and without a pass over x if it
    is."""
    if not (x.is_contiguous() and factor.dtype == torch.float32):
        x.mul_(factor)
    elif x.numel():
        scale_kernel[(triton.cdiv(x.numel(), SCALE_BLOCK),)](x, factor, x.numel(), BLOCK=SCALE_BLOCK, num_warps=4)
