"""The passes over chunks of rows, with one Triton launch per chunk instead of one block after another. Given logits are
one chunk, unless they have a support.

score               reads every logit of policy and reference once, and once more for divergences
gradient_           reads them again, from known statistics, and writes the gradient over the policy's
score_and_gradient  both in one launch, unless there is a support or a divergence
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..active import ActiveRuns
from ..passes import Rows
from ..stats import RowStats
from ..support import keep_mask, keep_sampled_
from ..types import TokenCoefficients
from . import supports
from .divergences import divergence_kernel
from .rows import Flags, Gradient, Inputs, Numbers, Stats, gradient_kernel, scale_kernel, score_kernel
from .sources import HeadSource, LogitsSource
from .supports import Thresholds, has_thresholds


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
DIVERGENCES = Shape(512, 256, 2)
SCALE_BLOCK = 4096
KERNEL_FIELDS = 8
"""So many fields of RowStats come from score_kernel."""


MASK_ROWS = 256
"""Rows whose masks exist at a time, where a support is recomputed and a threshold does not do."""


class GpuPasses:
    """See Passes. Raw logits are what is handed from `score` or `reload` to `gradient_`.

    A support is a threshold per row where that can be (supports.py), and a mask of bytes otherwise: one byte per logit
    for recorded ids and many banned ones, or for the few rows of a recomputed support that have no threshold.
    """

    def __init__(
        self, source: HeadSource | LogitsSource, rows: Rows, stats: RowStats, support_stats: RowStats | None
    ) -> None:
        self.source, self.rows, self.stats, self.support_stats = source, rows, stats, support_stats
        self.own_target_ids = rows.target_ids if rows.share is None else rows.share.own(rows.target_ids)
        self.bias, self.ref_bias = source.biases()
        self.thresholds: Thresholds | None = None
        if rows.support is not None and has_thresholds(rows.support, source.vocab):
            self.thresholds = Thresholds(rows.support, len(rows), source.vocab, rows.target_ids.device)

    def allowed(self) -> None:
        """Nothing: supports are thresholds and masks here."""

    def score(self, lo: int, hi: int) -> tuple[Tensor, Tensor | None]:
        z, r = self.source.load(lo, hi)
        self._launch_score(lo, hi, z, r, None)
        share = self.rows.share
        if share is not None and hi > lo:
            share.merge_(self.stats[lo:hi], lo, hi)
        if self.thresholds is not None and hi > lo:
            for first in range(lo, hi, supports.ROWS_AT_A_TIME):
                self._launch_support(lo, slice(first, min(first + supports.ROWS_AT_A_TIME, hi)), z, r, self.thresholds)
            for part in self._without_threshold(lo, hi):
                self._score_with_mask(lo, part, z, r)
        if self.rows.divergences and r is not None and hi > lo:
            self._launch_divergences(lo, hi, z, r)
            if share is not None:
                share.add_(self.stats[lo:hi], self.rows.divergences)
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
        out = self.source.gradient_buffer(z)
        if hi > lo:
            on_support = coefficients.need_support
            masked: list[tuple[Tensor, Tensor]] = []
            if on_support and self.thresholds is not None:  # the masks first: the gradient may lie over the logits
                masked = [(part, self._keep(lo, part, z)) for part in self._without_threshold(lo, hi)]
            mask = on_support and self.thresholds is None
            keep = self._keep(lo, slice(lo, hi), z) if mask else None
            self._launch_gradient_kernel(lo, slice(lo, hi), z, gap, keep, coefficients, out)
            for part, keep in masked:
                self._launch_gradient_kernel(lo, part, z, gap, keep, coefficients.select(part - lo), out)
        return out

    def score_and_gradient(self, lo: int, hi: int, coefficients: TokenCoefficients) -> None:
        if self.support_stats is not None or self.rows.divergences or self.rows.share is not None:
            self.gradient_(lo, hi, *self.score(lo, hi), coefficients)
            return
        z, r = self.source.load(lo, hi)
        self._launch_score(lo, hi, z, r, coefficients)
        self.source.store(lo, hi, self.source.gradient_buffer(z))

    def _launch_score(
        self, lo: int, hi: int, z: Tensor, r: Tensor | None, coefficients: TokenCoefficients | None
    ) -> None:
        rows = slice(lo, hi)
        mask = self.support_stats is not None and self.thresholds is None
        keep = self._keep(lo, rows, z) if mask else None
        flags = self._flags(keep)._replace(has_ref=r is not None)
        out = z
        if self.thresholds is not None and self.thresholds.rank is not None:
            flags = flags._replace(find_low=True)
        if coefficients is not None:
            out = self.source.gradient_buffer(z)
            has_b, has_c = coefficients.entropy is not None, coefficients.kl is not None
            flags = flags._replace(write_gradient=True, has_b=has_b, has_c=has_c)
        if hi > lo:
            inputs, stats, gradient, numbers = self._arguments(lo, rows, z, r, keep, coefficients, out)
            self._launch(score_kernel, hi - lo, inputs, stats, gradient, numbers, flags)

    @staticmethod
    def _launch(
        kernel: Any, num_rows: int, inputs: Inputs, stats: Stats, gradient: Gradient, numbers: Numbers, flags: Flags
    ) -> None:
        shape = score_shape(flags)
        kernel[(num_rows,)](
            inputs, stats, gradient, numbers, FLAGS=flags, BLOCK=shape.block, LANES=shape.lanes, num_warps=shape.warps,
        )  # fmt: skip

    def _launch_support(self, lo: int, rows: slice, z: Tensor, r: Tensor | None, thresholds: Thresholds) -> None:
        """Thresholds of some rows, and the statistics on their supports; lo: the first row of z."""
        inputs, stats, _, numbers = self._arguments(lo, rows, z, r, None, None, z)
        flags = self._flags(None)._replace(has_ref=r is not None)
        limits = thresholds.limits(rows)
        grid = (rows.stop - rows.start,)
        supports.support_kernel[grid](
            inputs, stats, limits, numbers, FLAGS=flags, WHICH=thresholds.which, BLOCK=supports.SUPPORT_BLOCK,
            LANES=supports.SUPPORT_LANES, num_warps=supports.SUPPORT_WARPS,
        )  # fmt: skip
        supports.support_sums_kernel[grid](
            inputs, stats, limits, numbers, FLAGS=flags, BLOCK=supports.SUMS_BLOCK, LANES=supports.SUMS_LANES,
            num_warps=supports.SUMS_WARPS,
        )  # fmt: skip

    def _launch_divergences(self, lo: int, hi: int, z: Tensor, r: Tensor) -> None:
        """Of the full vocabulary, then on the support by thresholds or a mask, then by masks where none is found."""
        rows = slice(lo, hi)
        self._launch_divergence_kernel(lo, rows, z, r, None, on_support=False)
        if self.support_stats is None:
            return
        keep = self._keep(lo, rows, z) if self.thresholds is None else None
        self._launch_divergence_kernel(lo, rows, z, r, keep, on_support=True)
        for part in self._without_threshold(lo, hi) if self.thresholds is not None else ():
            self._divergences_with_mask(lo, part, z, r)

    def _launch_divergence_kernel(
        self, lo: int, rows: slice, z: Tensor, r: Tensor, keep: Tensor | None, on_support: bool
    ) -> None:
        flags = self._divergence_flags(keep)._replace(has_threshold=on_support and keep is None)
        inputs, stats, _, numbers = self._arguments(lo, rows, z, r, keep, None, z)
        self._launch_divergence(rows.stop - rows.start, inputs, stats, numbers, flags)

    def _divergences_with_mask(self, lo: int, rows: Tensor, z: Tensor, r: Tensor) -> None:
        """Those on the support, by masks, of some rows i64 [m]; lo: the first row of z."""
        assert self.support_stats is not None
        keep = self._keep(lo, rows, z)
        inputs, stats, _, numbers = self._arguments(lo, rows, z, r, keep, None, z)
        part = self.support_stats[rows]
        stats = stats._replace(support=part.max, stride=part.stride)
        self._launch_divergence(
            len(rows), inputs, stats, numbers, self._divergence_flags(keep)._replace(has_row_ids=True)
        )
        for name in ("forward_kl", "jsd", "kl_to_mixture"):
            getattr(self.support_stats, name)[rows] = getattr(part, name)

    def _divergence_flags(self, keep: Tensor | None) -> Flags:
        wanted = self.rows.divergences
        return self._flags(keep)._replace(has_ref=True, forward_kl="forward_kl" in wanted, jsd="jsd" in wanted)

    @staticmethod
    def _launch_divergence(num_rows: int, inputs: Inputs, stats: Stats, numbers: Numbers, flags: Flags) -> None:
        divergence_kernel[(num_rows,)](
            inputs, stats, numbers, FLAGS=flags, BLOCK=DIVERGENCES.block, LANES=DIVERGENCES.lanes,
            num_warps=DIVERGENCES.warps,
        )  # fmt: skip

    def _without_threshold(self, lo: int, hi: int) -> Iterator[Tensor]:
        """Those rows, i64 [m], MASK_ROWS at a time. It waits for the device."""
        assert self.support_stats is not None
        rows = self.support_stats.threshold[lo:hi].isnan().nonzero()[:, 0] + lo
        yield from rows.split(MASK_ROWS) if len(rows) else ()

    def _score_with_mask(self, lo: int, rows: Tensor, z: Tensor, r: Tensor | None) -> None:
        """The statistics on the support, by masks, of some rows i64 [m]; lo: the first row of z."""
        assert self.support_stats is not None
        keep = self._keep(lo, rows, z)
        flags = self._flags(keep)._replace(has_ref=r is not None, has_row_ids=True)
        inputs, _, gradient, numbers = self._arguments(lo, rows, z, r, keep, None, z)
        full, part = (RowStats.empty(len(rows), z, torch.float32) for _ in range(2))
        stats = Stats(full.max, part.max, full.stride, full.max, full.max)
        self._launch(score_kernel, len(rows), inputs, stats, gradient, numbers, flags)
        for field in fields(RowStats)[:KERNEL_FIELDS]:
            getattr(self.support_stats, field.name)[rows] = getattr(part, field.name)

    def _launch_gradient_kernel(
        self,
        lo: int,
        rows: slice | Tensor,
        z: Tensor,
        gap: Tensor | None,
        keep: Tensor | None,
        coefficients: TokenCoefficients,
        out: Tensor,
    ) -> None:
        """The gradient of some rows; lo: the first row of z."""
        flags = gradient_flags(self._flags(keep), coefficients)
        by_threshold = coefficients.need_support and keep is None
        flags = flags._replace(has_threshold=by_threshold, has_row_ids=self._has_row_ids(rows))
        inputs, *others = self._arguments(lo, rows, z, gap, keep, coefficients, out)
        inputs = inputs._replace(target=self.own_target_ids[rows])
        num_rows = len(rows) if isinstance(rows, Tensor) else rows.stop - rows.start
        block = gradient_block_of(flags)
        gradient_kernel[(num_rows, triton.cdiv(self.source.vocab, block))](
            inputs, *others, FLAGS=flags, BLOCK=block, num_warps=GRADIENT_WARPS,
        )  # fmt: skip

    def _has_row_ids(self, rows: slice | Tensor) -> bool:
        return isinstance(rows, Tensor) or self.source.picked is not None

    def _arguments(
        self,
        lo: int,
        rows: slice | Tensor,
        z: Tensor,
        r: Tensor | None,
        keep: Tensor | None,
        coefficients: TokenCoefficients | None,
        out: Tensor,
    ) -> tuple[Inputs, Stats, Gradient, Numbers]:
        """What the kernels begin with, for some rows; z is passed where there is nothing to point at. lo: the row that
        z begins with."""
        options, picked, thresholds = self.source.options, self.source.picked, self.thresholds

        def given(x: Tensor | None) -> Tensor:
            return z if x is None else x

        if picked is not None:
            places = picked[rows]
        elif isinstance(rows, Tensor):
            places = rows - lo
        else:
            places = z
            z, r, out = z[rows.start - lo :], None if r is None else r[rows.start - lo :], out[rows.start - lo :]
        r = given(r)
        inputs = Inputs(
            z, z.stride(0), r, r.stride(0), given(self.bias), given(self.ref_bias), given(keep),
            z if thresholds is None else thresholds.bans, z if thresholds is None else thresholds.num_bans[rows],
            self.rows.target_ids[rows], places,
            options.temperature[rows] if isinstance(options.temperature, Tensor) else z,
        )  # fmt: skip
        stats = self.stats[rows]
        on_support = stats if self.support_stats is None else self.support_stats[rows]
        rank, low = stats.max, stats.max
        if thresholds is not None and thresholds.rank is not None:
            rank, low = thresholds.rank[rows], thresholds.low[rows]
        num_rows = len(stats.max)
        factors = self.stats.max if coefficients is None else _factors(coefficients, num_rows, z.device)
        return (
            inputs,
            Stats(stats.max, on_support.max, stats.stride, rank, low),
            Gradient(factors, factors.stride(0), out, out.stride(0)),
            Numbers(self.source.vocab, float(options.softcap or 1.0), options.scale),
        )

    def _flags(self, keep: Tensor | None) -> Flags:
        flags = Flags.of(self.source.options, self.bias, self.ref_bias)
        return flags._replace(
            has_keep=keep is not None,
            has_row_ids=self.source.picked is not None,
            has_inf=flags.has_inf or self.source.has_inf,
            lowest_ids=self.thresholds is not None and self.thresholds.lowest_ids,
        )

    def _keep(self, lo: int, rows: slice | Tensor, z: Tensor) -> Tensor:
        """The support of some rows, one byte per logit: u8 [m, V], found by support.keep_mask itself. Targets outside
        of it are noted in its statistics.

        Recomputing it takes a processed copy of the policy's raw logits z, which begin with row lo.
        """
        assert self.rows.support is not None and self.support_stats is not None
        support, options, picked = self.rows.support.select(rows), self.source.options, self.source.picked
        target_ids = self.rows.target_ids[rows]
        if support.is_recomputed:
            if picked is not None:
                z = z.index_select(0, picked[rows])
            else:
                z = z[rows - lo] if isinstance(rows, Tensor) else z[rows.start - lo : rows.stop - lo]
            z = z.float().clone() if self.bias is None else z.float() + self.bias
            options.apply_(z)
            if isinstance(options.temperature, Tensor):
                options = replace(options, temperature=options.temperature[rows])
            options.scale_(z, 0, len(z))
        else:
            z = z[:1].expand(len(target_ids), z.shape[1])  # only its shape and device are used
        keep = keep_mask(support, z)
        self.support_stats.outside[rows] = keep_sampled_(keep, target_ids).to(torch.float32)
        return keep.view(torch.uint8)


def score_shape(flags: Flags) -> Shape:
    """The shape for what score_kernel has to do."""
    if flags.write_gradient:
        return SCORE_AND_GRADIENT
    return SCORE_MORE if flags.has_softcap or flags.has_keep else SCORE


def gradient_block_of(flags: Flags) -> int:
    """Ids that a program of gradient_kernel takes: fewer where divergences need more registers for each."""
    divergences = flags.forward_kl or flags.jsd or flags.forward_kl_support or flags.jsd_support
    return GRADIENT_BLOCK // 4 if divergences else GRADIENT_BLOCK


def gradient_flags(flags: Flags, coefficients: TokenCoefficients) -> Flags:
    """With what gradient_kernel does for these factors."""
    forward_kl, jsd, *on_support = (c is not None for c in coefficients.of_divergences)
    return flags._replace(
        has_b=coefficients.entropy is not None, has_c=coefficients.kl is not None,
        has_c_support=coefficients.kl_support is not None, reads_reference=coefficients.need_reference,
        forward_kl=forward_kl, jsd=jsd, forward_kl_support=on_support[0], jsd_support=on_support[1],
    )  # fmt: skip


def _factors(coefficients: TokenCoefficients, num_rows: int, device: torch.device) -> Tensor:
    """The coefficients as float32 [9, n], zero where not given."""
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
