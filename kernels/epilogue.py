"""What happens to a block of logits: the row statistics of policy and reference, and the policy's gradient in place.

Plain PyTorch, written for few passes over memory that is still in cache. Notation of one row, all in float32 (float64
for float64 inputs): z and r are policy and reference logits after temperature, each centred at its own maximum;
s = sum_v exp(z_v), p = exp(z) / s; gap d = z - r. Then

    log p(y) = z_y - log s        entropy = log s - E_p[z]        KL = E_p[d] - log s + log s_ref

Centring first keeps shifted and extreme logits exact; summing e^z * d, not differences of probabilities, keeps a small
KL accurate. For a loss that is linear in the scores with factors a (log p(y)), b (entropy) and c (KL), its gradient is

    dL/dz_v = a (1[v = y] - p_v) - b p_v (z_v - E_p[z]) + c p_v (d_v - E_p[d])

The target's own entry needs 1 - p_y, which is taken from expm1(log p(y)): no cancellation where p_y is close to one.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

EXCLUDED = -1e30
"""Stands for -inf at ids outside the support: exp gives 0, and 0 * EXCLUDED is 0 where 0 * -inf would be NaN."""


@dataclass(frozen=True, slots=True)
class RowStats:
    """Per row, [n]: all that the scores and the backward need, so that the logits need not be kept.

    The maxima are of the logits after temperature (on a support: of the already centred logits).
    """

    max: Tensor
    log_sum: Tensor
    mean_logit: Tensor
    logprobs: Tensor
    ref_max: Tensor
    ref_log_sum: Tensor
    ref_logprobs: Tensor
    mean_gap: Tensor

    @classmethod
    def empty(cls, num_rows: int, like: Tensor, dtype: torch.dtype) -> RowStats:
        """Uninitialised statistics of `num_rows` rows on the device of `like`."""
        return cls(*torch.empty(len(fields(cls)), num_rows, dtype=dtype, device=like.device).unbind(0))

    def __getitem__(self, rows: slice | Tensor) -> RowStats:
        """The statistics of some rows: views for a slice, else a copy. The fields stay equally far apart in memory."""
        picked = [getattr(self, f.name)[rows] for f in fields(self)]
        return RowStats(*(picked if isinstance(rows, slice) else torch.stack(picked).unbind(0)))

    def entropy(self) -> Tensor:
        """-E_p[log p], [n]."""
        return self.log_sum - self.mean_logit

    def kl(self) -> Tensor:
        """E_p[log p - log q], [n]."""
        return self.mean_gap - (self.log_sum - self.ref_log_sum)


def centre_(z: Tensor, r: Tensor | None, stats: RowStats, *, known: bool = False) -> None:
    """Subtracts each row's maximum from z and r [n, V] in place; the maxima are read from `stats` if `known`."""
    for x, maximum in ((z, stats.max), (r, stats.ref_max)):
        if x is not None:
            x.sub_((maximum if known else torch.amax(x, 1, out=maximum))[:, None])


def row_stats_(
    z: Tensor, r: Tensor | None, target_ids: Tensor, stats: RowStats, scratch: Tensor, entropy: bool
) -> None:
    """Fills `stats` from centred z and r [n, V]; afterwards r holds the gap z - r. scratch [n, V] is overwritten."""
    if r is not None:
        _normalise(r, target_ids, scratch, stats.ref_log_sum, stats.ref_logprobs)
        torch.sub(z, r, out=r)
    exp_target = _normalise(z, target_ids, scratch, stats.log_sum, stats.logprobs)
    inverse_sum = stats.log_sum.neg().exp_()

    def mean(x: Tensor, out: Tensor) -> None:  # E_p[x]; scratch has a hole at the target
        out.copy_((torch.linalg.vecdot(scratch, x) + exp_target * _gather(x, target_ids)) * inverse_sum)

    if entropy:
        mean(z, stats.mean_logit)
    if r is not None:
        mean(r, stats.mean_gap)


def _normalise(x: Tensor, target_ids: Tensor, scratch: Tensor, log_sum: Tensor, logprobs: Tensor) -> Tensor:
    """log sum_v exp(x_v) and log p(y) of centred x; leaves exp(x) in scratch, zero at the target. Returns exp(x_y)."""
    torch.exp(x, out=scratch)
    exp_target = _gather(scratch, target_ids)
    scratch.scatter_(1, target_ids[:, None], 0)
    others = scratch.sum(1)
    logit = _gather(x, target_ids)
    # a target at the maximum has exp(x_y) = 1 exactly: log1p(others) resolves log p(y) down to the smallest numbers
    at_maximum = logit == 0
    torch.where(at_maximum, others.log1p(), (others + exp_target).log(), out=log_sum)
    torch.sub(logit, log_sum, out=logprobs)
    return exp_target


def _gather(x: Tensor, ids: Tensor) -> Tensor:
    return x.gather(1, ids[:, None])[:, 0]


def dlogits_(
    z: Tensor,
    gap: Tensor | None,
    target_ids: Tensor,
    stats: RowStats,
    a: Tensor | None,
    b: Tensor | None,
    c: Tensor | None,
    scratch: Tensor,
) -> None:
    """Overwrites centred z [n, V] with dL/dz for row factors a, b, c [n] (None: zero). Uses gap up if c is given."""
    inverse_sum = stats.log_sum.neg().exp_()
    prob = stats.logprobs.exp()
    at_target = torch.zeros_like(prob)
    offset = torch.zeros_like(prob)
    if a is not None:
        at_target -= a * torch.expm1(stats.logprobs)
        offset -= a
    if b is not None:
        at_target -= b * prob * (_gather(z, target_ids) - stats.mean_logit)
        offset += b * stats.mean_logit
    if c is not None:
        at_target += c * prob * (_gather(gap, target_ids) - stats.mean_gap)
        offset -= c * stats.mean_gap
    offset = (offset * inverse_sum)[:, None]

    if c is not None:
        slope = gap.mul_((c * inverse_sum)[:, None]).add_(offset)
        if b is not None:
            slope.sub_(torch.mul(z, (b * inverse_sum)[:, None], out=scratch))
    elif b is not None:
        slope = torch.mul(z, (b * inverse_sum).neg_()[:, None], out=scratch).add_(offset)
    else:
        slope = offset
    z.exp_().mul_(slope)
    z.scatter_(1, target_ids[:, None], at_target[:, None])
