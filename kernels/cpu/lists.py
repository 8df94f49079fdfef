"""The support without a mask over the vocabulary: for each row a list of ids, either the allowed or the banned ones.

Where few ids are allowed (a record, top_k, top_p, min_p), the scores on the support are sums over their list. Where few
are banned (min_tokens, excluded ids), the passes over the vocabulary run without them, and the full-vocabulary scores
are these sums with the banned ids added. Nothing is ever subtracted, so a policy that puts all its mass on a banned id
is scored as accurately as any other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..stats import EXCLUDED, RowStats
from ..types import Support
from .divergences import Compared, DivergenceFactors
from .epilogue import Factors, Sums
from .supports import allowed_pairs, banned_pairs


@dataclass(frozen=True, slots=True)
class Listed:
    """M ids of a range of rows with their logits after temperature, in the order of the rows."""

    rows: Tensor  # i64 [M], ascending; numbered as the rows of the call, or of a block
    ids: Tensor  # i64 [M]
    z: Tensor  # f64 [M]
    r: Tensor | None  # f64 [M]

    def between(self, first: int, last: int) -> Listed:
        """Those of rows first..last, which are counted from zero in the result."""
        i, j = torch.searchsorted(self.rows, torch.tensor([first, last], device=self.rows.device)).tolist()
        return Listed(self.rows[i:j] - first, self.ids[i:j], self.z[i:j], None if self.r is None else self.r[i:j])

    def without(self, target_ids: Tensor) -> Listed:
        """All but the targets i64 [n] of the rows."""
        other = self.ids != target_ids[self.rows]
        return Listed(self.rows[other], self.ids[other], self.z[other], None if self.r is None else self.r[other])

    def compared(self, stats: RowStats) -> Compared:
        """Policy and reference at the listed ids, with the statistics [n] of the rows."""
        assert self.r is not None
        return Compared.of(self.z, self.r, stats[self.rows])

    def summed(self, num_rows: int) -> Callable[[Tensor], Tensor]:
        """Adds numbers [M] up to those of each row, [n]."""
        return lambda x: x.new_zeros(num_rows).index_add_(0, self.rows, x)

    def add_divergence_gradient_(self, dlogits: Tensor, factors: DivergenceFactors) -> None:
        """Adds dL/dz for these factors [n] at the listed ids to dlogits [n, V]."""
        assert self.r is not None
        gradient = factors[self.rows].gradient(self.z, self.r)
        dlogits.index_put_((self.rows, self.ids), gradient.to(dlogits.dtype), accumulate=True)

    def add_gradient_(self, dlogits: Tensor, factors: Factors, target_ids: Tensor) -> None:
        """Adds dL/dz for these factors [n] at the listed ids to dlogits [n, V]; targets i64 [n]."""
        own = factors[self.rows]
        z = self.z - own.stats.max
        gap = None if self.r is None else z - (self.r - own.stats.ref_max)
        gradient = (z - own.stats.log_sum).exp() * own.slope(z, gap)
        is_target = self.ids == target_ids[self.rows]
        at_target = own.at_target(gap)
        gradient = torch.where(is_target, at_target, gradient)
        dlogits.index_put_((self.rows, self.ids), gradient.to(dlogits.dtype), accumulate=True)


def concatenated(lists: Sequence[tuple[int, Listed]]) -> Listed | None:
    """Lists of consecutive blocks as one; each comes with the number of the first row of its block."""
    if not lists:
        return None
    r = None if lists[0][1].r is None else torch.cat([x.r for _, x in lists])
    rows = torch.cat([x.rows + first for first, x in lists])
    return Listed(rows, torch.cat([x.ids for _, x in lists]), torch.cat([x.z for _, x in lists]), r)


def lists_banned_ids(support: Support) -> bool:
    """Whether the list of this support holds what is banned (else what is allowed)."""
    return support.kept_ids is None and not support.is_recomputed


def list_ids_(
    support: Support, z: Tensor, r: Tensor | None, target_ids: Tensor, excluded: bool
) -> tuple[Listed, Tensor]:
    """The ids that the support of these rows lists, with their logits z and r [n, V]; banned ones are excluded there.

    An allowed list holds the target; a list of banned ids does not. Also the rows, bool [n], whose target the support
    would not have kept. excluded: whether any of the logits is EXCLUDED.
    """
    banned = lists_banned_ids(support)
    if banned:
        rows, ids, outside = banned_pairs(support, target_ids)
    else:
        rows, ids, outside = allowed_pairs(support, z, target_ids, excluded)
    listed = Listed(rows, ids, z[rows, ids].double(), None if r is None else r[rows, ids].double())
    if banned:
        for x in (z, r):
            if x is not None:
                x[rows, ids] = EXCLUDED
    return listed, outside


def store_stats(
    sums: Sums, listed: Listed | None, banned: bool, target_ids: Tensor, stats: RowStats, support_stats: RowStats | None
) -> None:
    """The statistics over the full vocabulary and on the support, from the sums over all ids but the banned ones."""
    if listed is None:
        sums.store(stats)
    elif banned:
        sums.store(support_stats)
        sums.with_ids(listed.rows, listed.z, listed.r).store(stats)
    else:
        sums.store(stats)
        others = listed.without(target_ids)
        sums.only_target().with_ids(others.rows, others.z, others.r).store(support_stats)
