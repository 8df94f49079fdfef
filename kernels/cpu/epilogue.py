"""What happens to a block of logits: the row sums of policy and reference, and the policy's gradient in place.

Plain PyTorch, written for few passes over memory that is still in cache. Notation of one row: z and r are policy and
reference logits after temperature, each centred at its own maximum; s = sum_v exp(z_v), p = exp(z) / s; gap d = z - r.

    log p(y) = z_y - log s        entropy = log s - E_p[z]        KL = E_p[d] - log s + log s_ref

Centring before anything is multiplied keeps shifted and extreme logits exact; summing e^z * d, not differences of
probabilities, keeps a small KL accurate. The passes over [n, V] run in float32 (float64 for float64 inputs), what is
left per row is float64. For a loss that is linear in the scores with factors a (log p(y)), b (entropy) and c (KL), its
gradient is

    dL/dz_v = a (1[v = y] - p_v) - b p_v (z_v - E_p[z]) + c p_v (d_v - E_p[d])

The target's own entry needs 1 - p_y, which is taken from expm1(log p(y)): no cancellation where p_y is close to one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from ..stats import EXCLUDED, NO_LOGIT, RowStats, weighted


@dataclass(frozen=True, slots=True)
class Sums:
    """Sums over some ids of each row, f64 [n]; the target's own term is left out of them.

    With e = exp(z - max): others sum e, weighted_logit sum e (z - max), weighted_gap sum e ((z - max) - (r - ref_max)).
    logit and ref_logit are the target's, less the maxima. Without a reference its fields are zero.
    """

    max: Tensor
    others: Tensor
    weighted_logit: Tensor
    logit: Tensor
    ref_max: Tensor
    ref_others: Tensor
    ref_logit: Tensor
    weighted_gap: Tensor

    @classmethod
    def concatenated(cls, parts: Sequence[Sums]) -> Sums:
        """The sums of consecutive blocks of rows."""
        return cls(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(cls)))

    def store(self, stats: RowStats) -> None:
        """The statistics of the distribution over these ids and the target; NaN where no id can be drawn."""
        at_target = self.logit.exp()
        total = self.others + at_target
        stats.max.copy_(self.max)
        stats.log_sum.copy_(_log_sum(self.others, self.logit).masked_fill(self.max < NO_LOGIT, torch.nan))
        stats.mean_logit.copy_((self.weighted_logit + at_target * self.logit) / total)
        stats.logprobs.copy_(_excluded_at_infinity(self.logit) - stats.log_sum)
        stats.ref_max.copy_(self.ref_max)
        ref_log_sum = _log_sum(self.ref_others, self.ref_logit)
        stats.ref_log_sum.copy_(ref_log_sum.masked_fill(self.ref_max < NO_LOGIT, torch.nan))
        stats.ref_logprobs.copy_(_excluded_at_infinity(self.ref_logit) - stats.ref_log_sum)
        stats.mean_gap.copy_((self.weighted_gap + weighted(at_target, self.logit - self.ref_logit)) / total)

    def only_target(self) -> Sums:
        """The sums over no id but the target."""
        zero = torch.zeros_like(self.max)
        return Sums(self.max + self.logit, zero, zero, zero, self.ref_max + self.ref_logit, zero, zero, zero)

    def with_ids(self, rows: Tensor, z: Tensor, r: Tensor | None) -> Sums:
        """The sums with more ids: the m-th belongs to row rows[m] and has the logits z[m], r[m], f64, not centred.

        One after another in their order, so a row's result does not depend on what other rows have.
        """
        top = self.max.scatter_reduce(0, rows, z, "amax")
        ref_top = self.ref_max if r is None else self.ref_max.scatter_reduce(0, rows, r, "amax")
        lower, ref_lower = self.max - top, self.ref_max - ref_top
        rescale = lower.exp()
        more = z - top[rows]
        e = more.exp()

        def add(old: Tensor, terms: Tensor) -> Tensor:
            return old.index_add(0, rows, terms)

        moved = replace(
            self,
            max=top,
            others=add(self.others * rescale, e),
            weighted_logit=add(rescale * (self.weighted_logit + self.others * lower), e * more),
            logit=self.logit + lower,
            ref_max=ref_top,
            ref_logit=self.ref_logit + ref_lower,
        )
        if r is None:
            return moved
        more_ref = r - ref_top[rows]
        old_gap = weighted(rescale, self.weighted_gap + weighted(self.others, lower - ref_lower))
        return replace(
            moved,
            ref_others=add(self.ref_others * ref_lower.exp(), more_ref.exp()),
            weighted_gap=add(old_gap, weighted(e, more - more_ref)),
        )


def _excluded_at_infinity(logit: Tensor) -> Tensor:
    """The logits [n], -inf where they stand for it."""
    return logit.masked_fill(logit < NO_LOGIT, -torch.inf)


def _log_sum(others: Tensor, logit: Tensor) -> Tensor:
    """log(others + exp(logit)); a target at the maximum has logit 0, and log1p resolves the smallest sums of others."""
    return torch.where(logit == 0, others.log1p(), (others + logit.exp()).log())


def row_sums_(
    z: Tensor,
    r: Tensor | None,
    target_ids: Tensor,
    scratch: Tensor,
    entropy: bool,
    kl: bool,
    excluded: bool,
    foreign: Tensor | None = None,
) -> Sums:
    """Sums over all ids of the logits z and r [n, V].

    Afterwards z holds e = exp(z - max), 0 at the target, and r the gap (if kl); scratch [n, V] is overwritten. Without
    entropy (kl) the weighted logit (gap) is zero. excluded: whether any of the logits is EXCLUDED. foreign bool [n]:
    rows whose target is not among these ids; its logit is then EXCLUDED.
    """
    zero = torch.zeros(len(z), dtype=torch.float64, device=z.device)
    ref_top, ref_others, ref_logit = zero, zero, zero
    if r is not None:
        ref_top = _centre_(r)
        ref_others, ref_logit = _exponentials(r, target_ids, scratch, foreign)
    top = _centre_(z)
    with_gap = kl and r is not None
    if with_gap:
        torch.sub(z, r, out=r)
    others, logit = _exponentials(z, target_ids, scratch, foreign)
    weighted_logit = torch.mul(scratch, z, out=z).sum(1).double() if entropy else zero
    weighted_gap = torch.mul(scratch, r, out=z).sum(1).double() if with_gap else zero
    if with_gap and excluded:
        weighted_gap.masked_fill_(((r > -NO_LOGIT) & (scratch > 0)).any(1), torch.inf)
    z.copy_(scratch)
    return Sums(top, others, weighted_logit, logit, ref_top, ref_others, ref_logit, weighted_gap)


def _centre_(x: Tensor) -> Tensor:
    """Subtracts each row's maximum from x [n, V]; returns the maxima, f64 [n]."""
    top = x.amax(1)
    x.sub_(top[:, None])
    return top.double()


def _exponentials(x: Tensor, target_ids: Tensor, out: Tensor, foreign: Tensor | None) -> tuple[Tensor, Tensor]:
    """Leaves exp(x) of x [n, V] in `out`, 0 at the target. Returns its sums and the target's x, f64 [n]."""
    torch.exp(x, out=out)
    logit = gather(x, target_ids).double()
    if foreign is None:
        out.scatter_(1, target_ids[:, None], 0)
    else:
        set_at_targets_(out, target_ids, torch.zeros_like(out[:, 0]), foreign)
        logit.masked_fill_(foreign, EXCLUDED)
    return out.sum(1).double(), logit


def gather(x: Tensor, ids: Tensor) -> Tensor:
    """x[i, ids[i]] of x [n, V]."""
    return x.gather(1, ids[:, None])[:, 0]


def set_at_targets_(x: Tensor, target_ids: Tensor, values: Tensor, foreign: Tensor | None) -> None:
    """x[i, target_ids[i]] = values[i] of x [n, V], but in rows that are foreign, bool [n]."""
    if foreign is not None:
        values = torch.where(foreign, gather(x, target_ids), values)
    x.scatter_(1, target_ids[:, None], values[:, None])


def exponentials_again_(z: Tensor, r: Tensor | None, stats: RowStats) -> None:
    """What row_sums_ left in z and r, from the known maxima; but for the target's entry, which the gradient sets."""
    z.sub_(stats.max.to(z.dtype)[:, None])
    if r is not None:
        torch.sub(z, r.sub_(stats.ref_max.to(r.dtype)[:, None]), out=r)
    z.exp_()


@dataclass(frozen=True, slots=True)
class Factors:
    """The factors a, b, c [n] of one distribution's log-prob, entropy and KL (None: zero), with its statistics."""

    stats: RowStats
    a: Tensor | None
    b: Tensor | None
    c: Tensor | None

    @property
    def given(self) -> bool:
        """Whether any factor is."""
        return any(x is not None for x in (self.a, self.b, self.c))

    def __getitem__(self, rows: Tensor | slice) -> Factors:
        """Those of some rows."""
        return Factors(self.stats[rows], *(None if x is None else x[rows] for x in (self.a, self.b, self.c)))

    def slope(self, z: Tensor, gap: Tensor | None) -> Tensor:
        """(dL/dz_v) / p_v, [n] or [m], f64, of an id that is not the target; z and gap centred."""
        stats = self.stats
        slope = torch.zeros_like(stats.max)
        if self.a is not None:
            slope = slope - self.a
        if self.b is not None:
            slope = slope - self.b * (z - stats.mean_logit)
        if self.c is not None:  # an infinite KL without a factor has no gradient
            slope = slope + torch.where(self.c == 0, 0, self.c * (gap - stats.mean_gap))
        return slope

    def at_target(self, gap: Tensor | None) -> Tensor:
        """dL/dz of the target, f64 [n]; gap: the target's, centred."""
        stats = self.stats
        p, one_minus_p = stats.logprobs.exp(), -torch.expm1(stats.logprobs)
        logit = (stats.logprobs + stats.log_sum).clamp(min=EXCLUDED)
        without_a = Factors(stats, None, self.b, self.c).slope(logit, gap)
        return p * without_a + (0.0 if self.a is None else self.a * one_minus_p)


@dataclass(frozen=True, slots=True)
class Slopes:
    """The gradient of a range of rows: dL/dz = e (offset + gap_factor * gap + logit_factor * z).

    All [n] in the dtype of the logits; a factor that is None is zero. at_target replaces the target's entry.
    """

    offset: Tensor
    gap_factor: Tensor | None
    logit_factor: Tensor | None
    at_target: Tensor

    @classmethod
    def of(cls, parts: Sequence[Factors], base: RowStats, target_gap: Tensor | None, dtype: torch.dtype) -> Slopes:
        """The sum of the parts' gradients. Logits and gaps are centred at the maxima in `base`, each part's at its own.

        target_gap f64 [n]: the target's, or None where no part has c.
        """
        zero = torch.zeros_like(base.max)
        offset, gap_factor, logit_factor, at_target = zero, None, None, zero
        for part in parts:
            stats = part.stats
            lower = base.max - stats.max
            shift = lower - (base.ref_max - stats.ref_max)
            weight = (lower - stats.log_sum).exp()  # p_v = e_v * weight
            offset = offset + weight * part.slope(lower, shift)
            at_target = at_target + part.at_target(None if target_gap is None else target_gap + shift)
            if part.b is not None:
                logit_factor = (zero if logit_factor is None else logit_factor) - weight * part.b
            if part.c is not None:
                gap_factor = (zero if gap_factor is None else gap_factor) + weight * part.c
        columns = offset, gap_factor, logit_factor, at_target
        return cls(*(None if x is None else x.to(dtype) for x in columns))

    def __getitem__(self, rows: slice) -> Slopes:
        """Those of some rows."""
        values = self.offset, self.gap_factor, self.logit_factor, self.at_target
        return Slopes(*(None if x is None else x[rows] for x in values))


def dlogits_(
    e: Tensor,
    gap: Tensor | None,
    target_ids: Tensor,
    slopes: Slopes,
    scratch: Tensor,
    foreign: Tensor | None = None,
) -> None:
    """Overwrites e [n, V], which row_sums_ left, with dL/dz; uses gap up if the slopes need it."""
    slope = slopes.offset[:, None]
    if slopes.gap_factor is not None:
        slope = gap.mul_(slopes.gap_factor[:, None]).add_(slope)
    if slopes.logit_factor is not None:  # z = log e; where e is zero any finite z will do
        logits = torch.log(e, out=scratch).clamp_(min=-1000.0)
        slope = logits.mul_(slopes.logit_factor[:, None]).add_(slope)
    set_at_targets_(e.mul_(slope), target_ids, slopes.at_target, foreign)
