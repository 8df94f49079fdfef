"""Scores and gradients over chunks of rows: memory of one chunk of logits, however many rows there are.

In: a source of logits (heads with hidden states, or logits themselves) and the targets. Out: row statistics, and in
the second form the gradient, handed back to the source chunk by chunk. The logits of a chunk exist once, in a buffer
that every chunk reuses; inside a chunk, blocks of a few rows go through all passes while they are in the CPU's cache.

Rows are independent of one another and of how they fall into chunks, bit for bit (linear.py pads the matrix products
to make that so). Left out: what the caller's loss does with the scores; autograd (autograd.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .epilogue import EXCLUDED, RowStats, centre_, dlogits_, row_stats_
from .support import keep_mask
from .types import Support, TokenCoefficients

BLOCK_NUMBERS = 1 << 20
"""Logits per block: 4 MiB of float32, so that a block's three buffers stay in a shared cache. Smaller blocks would fit the
cores' own caches, which gains little, and would meet more often at thread barriers, which other busy processes make slow.
"""


class LogitsSource(Protocol):
    """Produces the logits of a range of rows, after all transforms, and takes their gradient back."""

    dtype: torch.dtype
    vocab: int
    softcap: float | None

    def load(self, lo: int, hi: int, need_ref: bool = True) -> tuple[Tensor, Tensor | None]:
        """Policy and reference logits [hi - lo, V] in buffers that the caller may overwrite."""

    def store(self, lo: int, hi: int, dlogits: Tensor) -> None:
        """Takes the gradient with respect to the head's output [hi - lo, V]; the rows are among those loaded last."""

    def gradient_scale(self, lo: int, hi: int) -> Tensor | None:
        """d(logit after the transforms) / d(logit after softcap), [hi - lo]; None means one (never with a softcap)."""


@dataclass(frozen=True, slots=True)
class Rows:
    """What belongs to the rows being scored, beside their logits."""

    target_ids: Tensor  # i64 [n]
    support: Support | None
    entropy: bool  # whether the entropy or its gradient is wanted

    def __len__(self) -> int:
        return len(self.target_ids)


def chunk_ranges(num_rows: int, chunk_rows: int) -> Iterator[tuple[int, int]]:
    """Consecutive ranges of at most `chunk_rows` rows."""
    for lo in range(0, num_rows, chunk_rows):
        yield lo, min(lo + chunk_rows, num_rows)


class Chunks:
    """The passes over one source. Owns the block buffers; its lifetime is one operator call."""

    def __init__(self, source: LogitsSource, rows: Rows, stats: RowStats, support_stats: RowStats | None) -> None:
        self.source, self.rows = source, rows
        self.stats, self.support_stats = stats, support_stats
        self.block_rows = max(2, min(512, BLOCK_NUMBERS // max(1, source.vocab)))
        self._buffers: dict[str, Tensor] = {}

    def score(self, lo: int, hi: int) -> tuple[Tensor, Tensor | None]:
        """Fills the statistics of rows lo..hi; returns their centred policy logits and gaps, for `gradient_`."""
        z, r = self.source.load(lo, hi)
        for first, last, z_block, r_block in self._blocks(lo, hi, z, r):
            stats = self.stats[first:last]
            centre_(z_block, r_block, stats)
            target_ids = self.rows.target_ids[first:last]
            scratch = self._buffer("scratch", z_block)
            if self.support_stats is not None:  # before row_stats_ turns r into the gap
                z_s, r_s = self._on_support(first, last, z_block, r_block)
                support_stats = self.support_stats[first:last]
                centre_(z_s, r_s, support_stats)
                row_stats_(z_s, r_s, target_ids, support_stats, scratch, entropy=False)
            row_stats_(z_block, r_block, target_ids, stats, scratch, self.rows.entropy)
        return z, r

    def reload(self, lo: int, hi: int, need_gap: bool) -> tuple[Tensor, Tensor | None]:
        """What `score` returned for these rows, computed again from the known statistics."""
        z, r = self.source.load(lo, hi, need_ref=need_gap)
        for first, last, z_block, r_block in self._blocks(lo, hi, z, r):
            centre_(z_block, r_block, self.stats[first:last], known=True)
            if r_block is not None:
                torch.sub(z_block, r_block, out=r_block)
        return z, r

    def gradient_(self, lo: int, hi: int, z: Tensor, gap: Tensor | None, coefficients: TokenCoefficients) -> None:
        """Turns the result of `score` or `reload` into the gradient and stores it. coefficients: of these rows."""
        coefficients = self._scaled(lo, hi, coefficients)
        for first, last, z_block, gap_block in self._blocks(lo, hi, z, gap):
            a, b, c, a_s, c_s = coefficients.select(slice(first - lo, last - lo)).values()
            target_ids = self.rows.target_ids[first:last]
            scratch = self._buffer("scratch", z_block)
            slope = self._softcap_slope(first, last, z_block)
            on_support = None
            if a_s is not None or c_s is not None:
                on_support, gap_s = self._on_support(first, last, z_block, None if c_s is None else gap_block)
                support_stats = self.support_stats[first:last]
                on_support.sub_(support_stats.max[:, None])
                if gap_s is not None:  # centring the masked logits shifts the gap by the difference of the maxima
                    gap_s.sub_((support_stats.max - support_stats.ref_max)[:, None])
                dlogits_(on_support, gap_s, target_ids, support_stats, a_s, None, c_s, scratch)
            dlogits_(z_block, gap_block, target_ids, self.stats[first:last], a, b, c, scratch)
            if on_support is not None:
                z_block.add_(on_support)
            if slope is not None:
                z_block.mul_(slope)
        self.source.store(lo, hi, z)

    def score_and_gradient(self, lo: int, hi: int, coefficients: TokenCoefficients) -> None:
        """`score`, then `gradient_` of the same rows."""
        z, gap = self.score(lo, hi)
        self.gradient_(lo, hi, z, gap, coefficients)

    def _scaled(self, lo: int, hi: int, coefficients: TokenCoefficients) -> TokenCoefficients:
        """The chain rule through temperature and logit scale, which is one factor per row."""
        scale = self.source.gradient_scale(lo, hi)
        if scale is None:
            return coefficients
        return TokenCoefficients(*(None if c is None else c * scale for c in coefficients.values()))

    def _softcap_slope(self, first: int, last: int, z: Tensor) -> Tensor | None:
        """1 - tanh^2 at the raw logits, worked back from centred z; None without a softcap."""
        if self.source.softcap is None:
            return None
        slope = torch.add(z, self.stats.max[first:last, None], out=self._buffer("slope", z))
        factor = self.source.gradient_scale(first, last) * self.source.softcap
        return slope.div_(factor[:, None]).square_().neg_().add_(1)

    def _on_support(self, first: int, last: int, z: Tensor, r: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Copies of centred z and of r with EXCLUDED outside the support."""
        support = self.rows.support.select(slice(first, last))
        excluded = keep_mask(support, z, self.rows.target_ids[first:last]).logical_not_()
        z_s = self._buffer("z_s", z).copy_(z).masked_fill_(excluded, EXCLUDED)
        return z_s, None if r is None else self._buffer("r_s", r).copy_(r).masked_fill_(excluded, EXCLUDED)

    def _blocks(
        self, lo: int, hi: int, z: Tensor, r: Tensor | None
    ) -> Iterator[tuple[int, int, Tensor, Tensor | None]]:
        for first, last in ((lo + i, lo + j) for i, j in chunk_ranges(hi - lo, self.block_rows)):
            rows = slice(first - lo, last - lo)
            yield first, last, z[rows], None if r is None else r[rows]

    def _buffer(self, name: str, like: Tensor) -> Tensor:
        if name not in self._buffers:
            self._buffers[name] = torch.empty(self.block_rows, like.shape[1], dtype=like.dtype, device=like.device)
        return self._buffers[name][: len(like)]
