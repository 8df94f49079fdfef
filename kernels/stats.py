"""Statistics of the scored rows, from which scores and gradients are made; and the numbers that stand for no logit."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

EXCLUDED = -1e30
"""Stands for -inf: exp gives 0, and 0 * EXCLUDED is 0 where 0 * -inf would be NaN."""

NO_LOGIT = -1e20
"""A logit below it is EXCLUDED, perhaps scaled, centred or divided by a temperature. No model has such logits."""


def weighted(e: Tensor, gap: Tensor) -> Tensor:
    """e * gap, with the gap to an id that only the reference excludes taken for infinite; zero where e is."""
    return torch.where(e == 0, 0, e * gap.masked_fill(gap > -NO_LOGIT, torch.inf))


@dataclass(frozen=True, slots=True)
class RowStats:
    """Per row, [n]: all that the scores and the backward need, so that the logits need not be kept.

    The maxima are of the logits after temperature. `outside` is 1 where the support would not have kept the target,
    else 0. threshold and edge_id say what a support recomputed on a GPU keeps (gpu/supports.py). These three have no
    meaning in the statistics over the full vocabulary. forward_kl and jsd are the scores, kl_to_mixture is KL(p, m)
    with m = (p + q) / 2; they are filled where a divergence is wanted.
    """

    max: Tensor
    log_sum: Tensor
    mean_logit: Tensor
    logprobs: Tensor
    ref_max: Tensor
    ref_log_sum: Tensor
    ref_logprobs: Tensor
    mean_gap: Tensor
    outside: Tensor
    threshold: Tensor
    edge_id: Tensor
    forward_kl: Tensor
    jsd: Tensor
    kl_to_mixture: Tensor

    @classmethod
    def empty(cls, num_rows: int, like: Tensor, dtype: torch.dtype) -> RowStats:
        """Uninitialised statistics of `num_rows` rows on the device of `like`."""
        return cls(*torch.empty(len(fields(cls)), num_rows, dtype=dtype, device=like.device).unbind(0))

    def __getitem__(self, rows: slice | Tensor) -> RowStats:
        """The statistics of some rows: views for a slice, else a copy. The fields stay equally far apart in memory."""
        picked = [getattr(self, f.name)[rows] for f in fields(self)]
        return RowStats(*(picked if isinstance(rows, slice) else torch.stack(picked).unbind(0)))

    @property
    def stride(self) -> int:
        """How far apart the fields are in memory, in numbers."""
        return int(self.log_sum.storage_offset() - self.max.storage_offset())

    def take_reference(self, of_reference: RowStats) -> None:
        """Takes the reference's log-probs from its own statistics; the gap between the models stays undefined."""
        self.ref_max.copy_(of_reference.max)
        self.ref_log_sum.copy_(of_reference.log_sum)
        self.ref_logprobs.copy_(of_reference.logprobs)

    def entropy(self) -> Tensor:
        """-E_p[log p], [n]."""
        return self.log_sum - self.mean_logit

    def kl(self) -> Tensor:
        """E_p[log p - log q], [n]."""
        return self.mean_gap - (self.log_sum - self.ref_log_sum)
