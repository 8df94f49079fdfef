"""The passes over chunks of rows in PyTorch: memory of one chunk of logits, however many rows there are.

In: a source of logits and the targets. Out: row statistics, and in the second form the gradient, given back to the
source chunk by chunk. The logits of a chunk exist once, in a buffer that every chunk reuses; inside a chunk, blocks of
a few rows go through all passes while they are in the CPU's cache.

Rows are independent of one another and of how they fall into chunks, bit for bit (sources.py pads the matrix products
to make that so). Left out: what the caller's loss does with the scores; autograd (autograd.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor

from ..active import ActiveRuns
from ..passes import Rows, chunk_ranges
from ..stats import RowStats
from ..types import TokenCoefficients
from ..vocab_group import Share
from .divergences import Compared, DivergenceFactors, sum_rows
from .epilogue import Factors, Slopes, Sums, dlogits_, exponentials_again_, gather, row_sums_, set_at_targets_
from .lists import Listed, concatenated, list_ids_, lists_banned_ids, store_stats
from .sources import HeadSource, LogitsSource

T = TypeVar("T")

BLOCK_NUMBERS = 1 << 20
"""Logits per block: 4 MiB of float32, so that a block's three buffers stay in a shared cache. Smaller blocks would fit
the cores' own caches, which gains little, and would need more thread barriers, which are slow on a busy machine.
"""


class CpuPasses:
    """See Passes. Between the calls z holds the exponentials and r the gaps that row_sums_ leaves. Where divergences,
    which need more than these, are wanted, both hold the logits after temperature, the banned ones excluded."""

    def __init__(
        self, source: HeadSource | LogitsSource, rows: Rows, stats: RowStats, support_stats: RowStats | None
    ) -> None:
        self.source, self.rows = source, rows
        self.stats, self.support_stats = stats, support_stats
        self.block_rows = max(2, min(512, BLOCK_NUMBERS // max(1, source.vocab)))
        self.bans = rows.support is not None and lists_banned_ids(rows.support)
        self.base = support_stats if self.bans else stats  # the passes run over these ids
        self.listed: Listed | None = None  # what the support lists in the rows scored or reloaded last
        self._buffers: dict[str, Tensor] = {}

    def allowed(self) -> tuple[Tensor, Tensor] | None:
        found = self.rows.support is not None and self.rows.support.is_recomputed and self.listed is not None
        return (self.listed.rows, self.listed.ids) if found else None

    def score(self, lo: int, hi: int) -> tuple[Tensor, Tensor | None]:
        z, r = self.source.load(lo, hi)
        lists: list[tuple[int, Listed]] = []
        sums, rows, excluded = [], self.rows, self.source.excluded
        for first, last, z_block, r_block in self._scaled_blocks(lo, hi, z, r, lists):
            target_ids, scratch = rows.target_ids[first:last], self._buffer("scratch", z_block)
            if rows.divergences:
                z_block, r_block = self._copy("z", z_block), self._copy("r", r_block)
            foreign = self._foreign(first, last)
            sums.append(row_sums_(z_block, r_block, target_ids, scratch, rows.entropy, rows.kl, excluded, foreign))
        self.listed = concatenated(lists)
        if sums:
            support_stats = None if self.support_stats is None else self.support_stats[lo:hi]
            target_ids = self.rows.target_ids[lo:hi]
            listed = self._listed(lo, hi)
            store_stats(Sums.concatenated(sums), listed, self.bans, target_ids, self.stats[lo:hi], support_stats)
        if rows.share is not None and sums:
            self._merge(rows.share, lo, hi, z, r)
        if self.rows.divergences and r is not None:
            self._add_divergences(lo, hi, z, r)
            if rows.share is not None and sums:
                rows.share.add_(self.stats[lo:hi], rows.divergences)
        return z, r

    def reload(self, lo: int, hi: int, need_gap: bool) -> tuple[Tensor, Tensor | None]:
        z, r = self.source.load(lo, hi, need_ref=need_gap)
        lists: list[tuple[int, Listed]] = []
        for first, last, z_block, r_block in self._scaled_blocks(lo, hi, z, r, lists):
            if not self.rows.divergences:
                exponentials_again_(z_block, r_block, self.base[first:last])
        self.listed = concatenated(lists)
        return z, r

    def gradient_(self, lo: int, hi: int, e: Tensor, gap: Tensor | None, coefficients: TokenCoefficients) -> None:
        factor = self.source.options.factor(lo, hi, e.device)  # the chain rule through temperature and logit scale
        if factor is not None:
            coefficients = TokenCoefficients(*(None if c is None else c * factor for c in coefficients.values()))
        given, of_support = coefficients, None
        full = Factors(self.stats[lo:hi], given.policy_logprobs, given.entropy, given.kl)
        if self.support_stats is not None:
            of_support = Factors(self.support_stats[lo:hi], given.policy_logprobs_support, None, given.kl_support)
        parts, listed_part = self._divided(full, of_support)
        parts = [part for part in parts if part.given]
        target_gap = None if gap is None else self._target_gap(lo, hi, e, gap)
        slopes = Slopes.of(parts, self.base[lo:hi], target_gap, e.dtype)
        for first, last, e_block, gap_block in self._blocks(lo, hi, e, gap):
            target_ids = self.rows.target_ids[first:last]
            listed = self._listed(first, last)
            softcap_slope = self._softcap_slope(first, last, e_block, listed)
            of_divergences = None
            if self.rows.divergences:
                of_divergences = self._divergence_gradient(lo, first, last, e_block, gap_block, coefficients)
                exponentials_again_(e_block, gap_block, self.base[first:last])
            if parts:
                scratch = self._buffer("scratch", e_block)
                foreign = self._foreign(first, last)
                dlogits_(e_block, gap_block, target_ids, slopes[first - lo : last - lo], scratch, foreign)
            else:
                e_block.zero_()
            if listed is not None and listed_part.given:
                listed.add_gradient_(e_block, listed_part[first - lo : last - lo], target_ids)
            if of_divergences is not None:
                e_block.add_(of_divergences)
            if softcap_slope is not None:
                e_block.mul_(softcap_slope)
        self.source.store(lo, hi, e)

    def gradient_of_active_(self, lo: int, z: Tensor, gap: Tensor | None, coefficients: TokenCoefficients) -> None:
        for i, j in ActiveRuns(coefficients, len(z)):
            of_run = None if gap is None else gap[i:j]
            self.gradient_(lo + i, lo + j, z[i:j], of_run, coefficients.select(slice(i, j)))

    def score_and_gradient(self, lo: int, hi: int, coefficients: TokenCoefficients) -> None:
        z, gap = self.score(lo, hi)
        self.gradient_(lo, hi, z, gap, coefficients)

    def _foreign(self, first: int, last: int) -> Tensor | None:
        """Whether another process holds the target, bool [last - first]; None where this one holds all ids."""
        return None if self.rows.share is None else self.rows.share.foreign(first, last)

    def _merge(self, share: Share, lo: int, hi: int, z: Tensor, r: Tensor | None) -> None:
        """The statistics of rows lo..hi over the whole vocabulary, and what z and r hold centred at its maxima."""
        stats = self.stats[lo:hi]
        top, ref_top = stats.max.clone(), stats.ref_max.clone()
        share.merge_(stats, lo, hi)
        if self.rows.divergences:  # they hold the logits
            return
        lower = top - stats.max
        z.mul_(lower.exp().to(z.dtype)[:, None])
        if r is not None and self.rows.kl:
            r.add_((lower - (ref_top - stats.ref_max)).to(r.dtype)[:, None])

    def _divided(self, full: T, on_support: T | None) -> tuple[list[T], T | None]:
        """Whose parts come from the passes, which run over all ids or over those of the support; and whose from what
        the support lists, its own or what is banned."""
        if on_support is None:
            return [full], None
        return ([full, on_support], full) if self.bans else ([full], on_support)

    def _add_divergences(self, lo: int, hi: int, z: Tensor, r: Tensor) -> None:
        """From the logits of rows lo..hi, whose other statistics are known, to the statistics of both distributions."""
        names = self.rows.divergences
        whole, listed_stats = self._divided(self.stats, self.support_stats)
        for stats in (self.stats, self.support_stats):
            for name in ("forward_kl", "jsd", "kl_to_mixture") if stats is not None else ():
                getattr(stats, name)[lo:hi] = 0
        for first, last, z_block, r_block in self._blocks(lo, hi, z, r):
            assert r_block is not None
            for stats in whole:
                Compared.of(z_block, r_block, stats[first:last]).add_to(stats[first:last], names, sum_rows)
            listed = self._listed(first, last)
            if listed is not None and listed_stats is not None:
                of_block = listed_stats[first:last]
                listed.compared(of_block).add_to(of_block, names, listed.summed(last - first))

    def _divergence_gradient(
        self, lo: int, first: int, last: int, z: Tensor, r: Tensor | None, coefficients: TokenCoefficients
    ) -> Tensor | None:
        """By the logits z [n, V] of rows first..last; None where no divergence has a factor. coefficients: of rows lo,
        lo + 1, ..."""
        c, rows = coefficients.select(slice(first - lo, last - lo)), slice(first, last)
        on_support = None
        if self.support_stats is not None:
            on_support = DivergenceFactors(self.support_stats[rows], c.forward_kl_support, c.jsd_support)
        whole, listed_part = self._divided(DivergenceFactors(self.stats[rows], c.forward_kl, c.jsd), on_support)
        listed, gradient = self._listed(first, last), None
        for part in whole:
            if part.given and r is not None:
                of_part = part.gradient(z, r)
                gradient = of_part if gradient is None else gradient.add_(of_part)
        if listed is not None and listed_part is not None and listed_part.given:
            gradient = torch.zeros_like(z) if gradient is None else gradient
            listed.add_divergence_gradient_(gradient, listed_part)
        return gradient

    def _target_gap(self, lo: int, hi: int, e: Tensor, gap: Tensor) -> Tensor:
        """The targets' gaps, f64 [hi - lo]."""
        target_ids, base = self.rows.target_ids[lo:hi], self.base[lo:hi]
        if not self.rows.divergences:
            return gather(gap, target_ids).double()
        return (gather(e, target_ids) - base.max) - (gather(gap, target_ids) - base.ref_max)

    def _listed(self, first: int, last: int) -> Listed | None:
        """What the support lists in rows first..last, which are numbered from zero."""
        return None if self.listed is None else self.listed.between(first, last)

    def _scaled_blocks(
        self, lo: int, hi: int, z: Tensor, r: Tensor | None, lists: list[tuple[int, Listed]]
    ) -> Iterator[tuple[int, int, Tensor, Tensor | None]]:
        """The blocks after scale and temperature; what the support lists goes to `lists`, banned ids leave z and r, and
        targets outside of the support are noted in its statistics."""
        for first, last, z_block, r_block in self._blocks(lo, hi, z, r):
            for x in (z_block, r_block):
                if x is not None:
                    self.source.options.scale_(x, first, last)
            if self.rows.support is not None:
                support, target_ids = self.rows.support.select(slice(first, last)), self.rows.target_ids[first:last]
                listed, outside = list_ids_(support, z_block, r_block, target_ids, self.source.excluded)
                lists.append((first, listed))
                self.support_stats.outside[first:last] = outside
            yield first, last, z_block, r_block

    def _softcap_slope(self, first: int, last: int, e: Tensor, listed: Listed | None) -> Tensor | None:
        """1 - tanh^2 at the head's output, worked back from exp(z - max), or from z; None without a softcap.

        Where exp(z - max) is zero any slope will do, unless the id is the target or listed.
        """
        softcap = self.source.options.softcap
        if softcap is None:
            return None
        base = self.base[first:last]
        z = self._buffer("slope", e)
        if self.rows.divergences:
            z.copy_(e)
        else:
            torch.log(e, out=z).clamp_(min=-1000.0).add_(base.max.to(e.dtype)[:, None])
        target_logit = base.logprobs + base.log_sum + base.max
        target_ids = self.rows.target_ids[first:last]
        set_at_targets_(z, target_ids, target_logit.to(e.dtype), self._foreign(first, last))
        if listed is not None:
            z[listed.rows, listed.ids] = listed.z.to(e.dtype)
        factor = self.source.options.factor(first, last, e.device)
        highest = softcap if factor is None else (factor * softcap).to(e.dtype)[:, None]
        return z.div_(highest).square_().neg_().add_(1)

    def _blocks(
        self, lo: int, hi: int, z: Tensor, r: Tensor | None
    ) -> Iterator[tuple[int, int, Tensor, Tensor | None]]:
        for first, last in ((lo + i, lo + j) for i, j in chunk_ranges(hi - lo, self.block_rows)):
            rows = slice(first - lo, last - lo)
            yield first, last, z[rows], None if r is None else r[rows]

    def _copy(self, name: str, x: Tensor | None) -> Tensor | None:
        """x [n, V] in a buffer."""
        return None if x is None else self._buffer(name, x).copy_(x)

    def _buffer(self, name: str, like: Tensor) -> Tensor:
        if name not in self._buffers:
            self._buffers[name] = torch.empty(self.block_rows, like.shape[1], dtype=like.dtype, device=like.device)
        return self._buffers[name][: len(like)]
