"""Forward KL and Jensen-Shannon divergence of a block of logits, and their gradients by the policy's logits.

Both need the normalisers of policy and reference first, so they are a second pass over a chunk of logits that is still
at hand. With p and q the two distributions, m = (p + q) / 2, t = log(q / p) and x = exp(-|t|) - 1:

    p - q = x (q if t > 0 else -p)        log(p / m) = c - max(t, 0), log(q / m) = c - max(-t, 0), c = -log1p(x / 2)
    forward_kl = sum_v [(p - q) + q t]                         d/dz_v = p_v - q_v
    jsd        = 1/2 sum_v [p log(p / m) + q log(q / m)]       d/dz_v = 1/2 p_v (log(p_v / m_v) - KL(p, m))

The summand of the forward KL has p - q beside q log(q / p): over a whole vocabulary it adds nothing, and each summand
is then the smaller the closer p and q are, with no first-order part that a rounded normaliser would leave in the sum
(the same holds for the two logarithms of the jsd together). Nothing is a difference of numbers that are close to one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..stats import NO_LOGIT, RowStats


def beside(x: Tensor, numbers: Tensor) -> Tensor:
    """A number per row [n], as a column beside x [n, V]; or per id [M] of a list; in the dtype of x."""
    return numbers.to(x.dtype)[:, None] if x.dim() == 2 else numbers.to(x.dtype)


@dataclass(frozen=True, slots=True)
class Compared:
    """Policy and reference at the same ids, all of one shape: [n, V], or [M] for a list."""

    p: Tensor
    q: Tensor
    log_ratio: Tensor  # t
    shrink: Tensor  # x

    @classmethod
    def of(cls, z: Tensor, r: Tensor, stats: RowStats) -> Compared:
        """From logits [n, V] after temperature and the statistics of these n rows; or [M] and those of M."""
        z, r = z - beside(z, stats.max), r - beside(r, stats.ref_max)
        log_ratio = (r - z).sub_(beside(z, stats.ref_log_sum - stats.log_sum))
        shrink = log_ratio.abs().neg_().expm1_()
        p, q = z.sub_(beside(z, stats.log_sum)).exp_(), r.sub_(beside(r, stats.ref_log_sum)).exp_()
        return cls(p, q, log_ratio, shrink)

    def difference(self) -> Tensor:
        """p - q."""
        return torch.where(self.log_ratio > 0, self.q, -self.p).mul_(self.shrink)

    def logs_over_mixture(self) -> tuple[Tensor, Tensor]:
        """log(p / m) and log(q / m)."""
        common = (self.shrink / 2).log1p_().neg_()
        return common - self.log_ratio.clamp(min=0), common + self.log_ratio.clamp(max=0)

    def forward_kl(self) -> Tensor:
        """The summands; infinite at an id that the policy alone excludes."""
        gap = self.log_ratio.masked_fill(self.log_ratio > -NO_LOGIT, torch.inf)
        return self.difference().add_(torch.where(self.q == 0, 0, self.q * gap))

    def add_to(self, stats: RowStats, names: tuple[str, ...], total: Callable[[Tensor], Tensor]) -> None:
        """Adds to the fields of RowStats [n]; total: adds summands up to [n]."""
        if "forward_kl" in names:
            stats.forward_kl.add_(total(self.forward_kl()))
        if "jsd" in names:
            of_p, of_q = self.logs_over_mixture()
            of_p *= self.p
            stats.kl_to_mixture.add_(total(of_p))
            stats.jsd.add_(total(of_p.add_(of_q.mul_(self.q)).div_(2)))


@dataclass(frozen=True, slots=True)
class DivergenceFactors:
    """The factors [n] of one distribution's forward KL and jsd (None: zero), with its statistics."""

    stats: RowStats
    forward_kl: Tensor | None
    jsd: Tensor | None

    @property
    def given(self) -> bool:
        """Whether any factor is."""
        return self.forward_kl is not None or self.jsd is not None

    def __getitem__(self, rows: Tensor | slice) -> DivergenceFactors:
        """Those of some rows."""
        factors = (None if x is None else x[rows] for x in (self.forward_kl, self.jsd))
        return DivergenceFactors(self.stats[rows], *factors)

    def gradient(self, z: Tensor, r: Tensor) -> Tensor:
        """By the logits z [n, V] of the n rows; or [M], of M rows."""
        compared = Compared.of(z, r, self.stats)
        gradient = torch.zeros_like(z)
        if self.forward_kl is not None:
            gradient += compared.difference().mul_(beside(z, self.forward_kl))
        if self.jsd is not None:
            slope = compared.logs_over_mixture()[0].sub_(beside(z, self.stats.kl_to_mixture))
            gradient += slope.mul_(compared.p).mul_(beside(z, self.jsd / 2))
        return gradient


def sum_rows(x: Tensor) -> Tensor:
    """[n, V] -> [n]."""
    return x.sum(1)
