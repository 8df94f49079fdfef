"""A vocabulary that several processes hold in slices (tensor-parallel heads): what they tell one another.

Rank k of the group holds the ids bounds[k] to bounds[k + 1]: these rows of the heads, or these columns of the logits.
Hidden states and targets are the same everywhere. Every process goes over its own ids as if there were no others; a
target that is elsewhere is not among them. Then the statistics of a chunk of rows, 8 numbers a row, are gathered, and
every process adds them up in the order of the ranks. So all have the same bits, and the gradient of the own ids needs
nothing but these statistics. With m the maximum, s = sum exp(z - m) and E[.] the mean over a slice's distribution:

    M = max_k m_k        log S = log sum_k exp(m_k + log s_k - M)        w_k = exp(m_k + log s_k - M - log S)
    E[z - M] = sum_k w_k (E_k[z - m_k] + m_k - M), and likewise E[d - (M - M_ref)] of the gap d = z - r
    log p(y) = log p_k(y) + log w_k at the rank k that holds y, where log w_k = -log(1 + sum of the other w / w_k)

Forward KL and Jensen-Shannon divergence are sums over ids once the normalisers are known: they are gathered and added,
too. The gradient of the hidden states is a sum over ids, and the only large thing that is exchanged, once per call.
Left out: supports, whose ids a sampler chose among all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import check_vocab
from .errors import UserError
from .stats import NO_LOGIT, RowStats, weighted

MERGED = (
    "max", "log_sum", "mean_logit", "logprobs", "ref_max", "ref_log_sum", "ref_logprobs", "mean_gap",
)  # fmt: skip
"""The fields of RowStats that are gathered."""

ADDED = {"forward_kl": ("forward_kl",), "jsd": ("jsd", "kl_to_mixture")}
"""The fields that are sums over ids, by the divergence that needs them."""


class Facts(NamedTuple):
    """What each rank says of its call: the sizes of its slices, and what all must have alike."""

    num_ids: int
    ref_num_ids: int  # 0: no reference
    num_rows: int
    num_scored_rows: int | Tensor
    sum_of_target_ids: int | Tensor
    temperature: float | Tensor  # of rows that have their own: the sum over those that are scored
    softcap: float
    logit_scale: float
    valid_vocab: int
    chunk_tokens: int
    outputs: int
    bytes_per_number: int
    num_biases: int
    hidden_needs_gradient: bool
    slice_needs_gradient: bool


@dataclass(frozen=True, slots=True)
class Share:
    """This process's ids of the vocabulary. n: the scored rows."""

    group: Any  # torch.distributed.ProcessGroup
    rank: int
    bounds: tuple[int, ...]
    owners: Tensor | None = None  # i64 [n]: the rank that holds the target

    @property
    def vocab(self) -> int:
        """How many ids all ranks have together."""
        return self.bounds[-1]

    @property
    def num_ids(self) -> int:
        """How many this one has."""
        return self.bounds[self.rank + 1] - self.bounds[self.rank]

    @property
    def widest(self) -> int:
        """The most that any has: what all cut their rows into chunks by, so that they meet at the same rows."""
        return max(end - first for first, end in pairwise(self.bounds))

    def of_targets(self, target_ids: Tensor) -> tuple[Share, Tensor]:
        """The share of rows with these targets i64 [n], ids of the whole vocabulary; and their places among the own
        ids, 0 where a target is elsewhere."""
        owners = torch.searchsorted(torch.tensor(self.bounds[1:], device=target_ids.device), target_ids, right=True)
        places = target_ids - self.bounds[self.rank]
        return replace(self, owners=owners), torch.where(owners == self.rank, places, 0)

    def select(self, rows: Tensor | slice) -> Share:
        """That of some of the rows, i64 [m] or a slice."""
        return self if self.owners is None else replace(self, owners=self.owners[rows])

    def foreign(self, lo: int, hi: int) -> Tensor:
        """Whether another rank holds the target, bool [hi - lo]."""
        assert self.owners is not None
        return self.owners[lo:hi] != self.rank

    def own(self, target_ids: Tensor) -> Tensor:
        """The places [n], -1 where a target is elsewhere."""
        return torch.where(self.owners == self.rank, target_ids, -1)

    def merge_(self, stats: RowStats, lo: int, hi: int) -> None:
        """Statistics of rows lo..hi over the whole vocabulary in place of those over the own ids."""
        assert self.owners is not None
        mine = torch.stack([getattr(stats, name) for name in MERGED])
        for name, merged in zip(MERGED, merge(self._gather(mine).double(), self.owners[lo:hi]), strict=True):
            getattr(stats, name).copy_(merged)

    def add_(self, stats: RowStats, divergences: tuple[str, ...]) -> None:
        """Divergences of some rows over the whole vocabulary in place of the own ids' part."""
        names = [name for divergence in divergences for name in ADDED[divergence]]
        parts = self._gather(torch.stack([getattr(stats, name) for name in names])).double()
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        for name, summed in zip(names, total, strict=True):
            getattr(stats, name).copy_(summed)

    def with_hidden_summed(self, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """(d hidden, d weight, d bias) with the first summed over the ranks; (d logits,) as it is. Once per call: all
        rows of d hidden are in memory anyway, and one large exchange is faster than many."""
        hidden, *rest = gradients
        if hidden is None or not rest:
            return gradients
        import torch.distributed as dist

        total = hidden.to(torch.promote_types(hidden.dtype, torch.float32), memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self.group)
        return total.to(hidden.dtype), *rest

    def _gather(self, x: Tensor) -> Tensor:
        """x [*] of every rank, [ranks, *]."""
        return gather(self.group, x)


def gather(group: Any, x: Tensor) -> Tensor:
    """x [*] of every rank of the group, [ranks, *]."""
    import torch.distributed as dist

    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x, group=group)
    return torch.stack(parts)


def merge(parts: Tensor, owners: Tensor) -> list[Tensor]:
    """The fields MERGED [n] over all slices, from those over each, f64 [ranks, 8, n]. owners i64 [n]."""
    top, log_sum, mean_logit, logprobs, ref_top, ref_log_sum, ref_logprobs, mean_gap = parts.unbind(1)
    all_top, all_log_sum, log_weights, all_logprobs = _normalise(top, log_sum, logprobs, owners)
    ref_all_top, ref_all_log_sum, _, ref_all_logprobs = _normalise(ref_top, ref_log_sum, ref_logprobs, owners)
    weights, lower = log_weights.exp(), top - all_top
    gap = mean_gap + (lower - (ref_top - ref_all_top))
    return [
        all_top, all_log_sum, (weights * (mean_logit + lower)).sum(0), all_logprobs, ref_all_top, ref_all_log_sum,
        ref_all_logprobs, weighted(weights, gap).sum(0),
    ]  # fmt: skip


def _normalise(top: Tensor, log_sum: Tensor, logprobs: Tensor, owners: Tensor) -> tuple[Tensor, ...]:
    """Of one model: M and log S [n], log w [ranks, n] and log p(y) [n]. A slice without an id that can be drawn has the
    weight zero; where no slice has one, log S and log p(y) are NaN."""
    total = (top + log_sum).masked_fill(top < NO_LOGIT, -torch.inf)
    all_top = top.amax(0)
    all_log_sum = (total - all_top).logsumexp(0).masked_fill(all_top < NO_LOGIT, torch.nan)
    owner = owners[None]
    of_owner = total.gather(0, owner)[0]
    of_others = total.scatter(0, owner, -torch.inf).logsumexp(0)
    log_weight = -torch.logaddexp(torch.zeros_like(of_owner), of_others - of_owner)
    of_target = torch.where(of_owner == -torch.inf, -torch.inf, logprobs.gather(0, owner)[0] + log_weight)
    of_target = of_target.masked_fill(all_log_sum.isnan(), torch.nan)
    return all_top, all_log_sum, total - all_top - all_log_sum, of_target


def open_share(group: Any, device: torch.device, facts: Callable[[], Facts]) -> Share:
    """The share of this process, from the sizes that all ranks have told one another.

    facts: checks the own inputs and describes them. A UserError that it raises on one rank ends the call on all of
    them, where these would otherwise wait for a call that does not come.
    """
    import torch.distributed as dist

    if not isinstance(group, dist.ProcessGroup) or dist.get_rank(group) < 0:
        raise UserError(
            f"vocab_group is {group!r}, expected a torch.distributed.ProcessGroup that this process belongs to; of a "
            "DeviceMesh, pass mesh.get_group()."
        )
    mine, refusal = [-1.0] * len(Facts._fields), None
    try:
        mine = [float(x) for x in facts()]
    except UserError as error:
        refusal = error
    numbers = gather(group, torch.tensor(mine, dtype=torch.float64, device=device)).tolist()
    if refusal is not None:
        raise refusal
    said = [Facts(*of_rank) for of_rank in numbers]
    check_alike(said)
    return Share(group, dist.get_rank(group), bounds_of(said))


def check_alike(said: list[Facts]) -> None:
    """UserError unless all ranks make the same call, but for the sizes of their slices."""
    for rank, facts in enumerate(said):
        if facts.num_ids < 0:
            raise UserError(f"Rank {rank} of vocab_group has refused its inputs: its own message says why.")
    for name in Facts._fields[2:]:
        values = [getattr(facts, name) for facts in said]
        for rank, value in enumerate(values):
            if value != values[0]:
                raise UserError(
                    f"{name} is {values[0]:g} on rank 0 of vocab_group and {value:g} on rank {rank}: all ranks must "
                    "make the same call, each with its own slice of the vocabulary."
                )


def bounds_of(said: list[Facts]) -> tuple[int, ...]:
    """Where each rank's ids begin, and where the last one's end; UserError for slices that do not fit together."""
    sizes, ref_sizes = ([int(getattr(facts, name)) for facts in said] for name in Facts._fields[:2])
    valid = check_vocab(sum(sizes), int(said[0].valid_vocab) or None)
    bounds = _bounds(sizes, valid)
    alike = _bounds(ref_sizes, valid) == bounds if said[0].valid_vocab else ref_sizes == sizes
    if any(ref_sizes) and not alike:
        raise UserError(
            f"The ranks of vocab_group hold {sizes} ids of the policy and {ref_sizes} of the reference: cut both at "
            "the same ids (beyond valid_vocab they may differ)."
        )
    for rank, (first, end) in enumerate(pairwise(bounds)):
        if first == end:
            raise UserError(
                f"Rank {rank} of vocab_group holds none of the {valid} ids: make the group of those ranks that do."
            )
    return bounds


def _bounds(sizes: list[int], valid: int) -> tuple[int, ...]:
    """Where slices of these sizes begin and end, but none of them beyond the ids that exist."""
    return tuple(min(bound, valid) for bound in accumulate(sizes, initial=0))
