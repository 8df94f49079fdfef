"""Supports without a mask over the vocabulary: the ids that support.keep_mask keeps or bans, as pairs (row, id).

The limits are found from the largest logits of a row, or by bisection; rows in which rounding could decide are left to
the definition.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..stats import EXCLUDED, NO_LOGIT
from ..support import column, keep_mask, ranks, rows_of_record
from ..types import Support

FIRST_LARGEST = 32
"""How many of the largest logits of a row are looked at first where top_k does not say how many may be needed."""

STRIDE = 8
"""Logits per group in `largest`."""

BISECTIONS = 22
"""Steps of the bisection; they leave an interval of a millionth of the range of logits, in which one id should lie."""

FIRST_BISECTIONS = 3
"""So many of the steps look at the whole row."""

MARGIN = 1e-5
"""A row whose cumulative probability comes this close to top_p is left to the definition: rounding decides there."""


def banned_pairs(support: Support, target_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(row, id), i64 [M] each, ascending: what excluded_ids and banned_ids ban in rows with these targets [n], which
    are not banned; and the rows, bool [n], whose target would be.
    """
    everywhere = torch.arange(len(target_ids), device=target_ids.device)
    pairs = []
    if support.excluded_ids is not None:
        pairs.append((everywhere, support.excluded_ids))
    if support.banned_ids is not None:
        rows = everywhere if support.banned_rows is None else support.banned_rows.nonzero()[:, 0]
        pairs.append((rows, support.banned_ids))
    rows = torch.cat([everywhere[:0], *(rows.repeat_interleave(len(ids)) for rows, ids in pairs)])
    ids = torch.cat([everywhere[:0], *(ids.repeat(len(rows)) for rows, ids in pairs)])
    is_target = ids == target_ids[rows]
    outside = torch.zeros_like(target_ids, dtype=torch.bool).index_fill_(0, rows[is_target], True)
    return *_sorted_pairs(rows[~is_target], ids[~is_target]), outside


def _sorted_pairs(rows: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """In the order of rows, then ids, each pair once."""
    if not len(rows):
        return rows, ids
    keys = torch.unique((rows << 32) | ids)
    return keys >> 32, keys & 0xFFFFFFFF


def allowed_pairs(
    support: Support, z: Tensor, target_ids: Tensor, excluded: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """(row, id), i64 [M] each, ascending: the recorded or recomputed support, as keep_mask has it, targets included;
    and the rows, bool [n], whose target it would not have held.

    z [n, V]: the policy's logits after temperature. What top_k, top_p and min_p leave lies among the largest few of
    them, as a rule: those are looked at, then more in rows where they do not suffice, and only rows where rounding or
    equal logits may decide are left to keep_mask, which sorts them. z is changed and restored. excluded: whether any
    logit is EXCLUDED, which no limit leaves.
    """
    everywhere = torch.arange(len(z), device=z.device)
    if support.kept_ids is not None:
        rows, ids = rows_of_record(support), support.kept_ids
    else:
        banned_rows, banned_ids, _ = banned_pairs(support, target_ids.new_full(target_ids.shape, -1))
        saved = z[banned_rows, banned_ids]
        z[banned_rows, banned_ids] = -torch.inf
        if excluded:
            z.masked_fill_(z < NO_LOGIT, -torch.inf)
        rows, ids = _largest_pairs(support, z)
        z[banned_rows, banned_ids] = saved
        if excluded:
            z.clamp_(min=EXCLUDED)
    inside = everywhere.new_zeros(len(z), dtype=torch.bool).index_fill_(0, rows[ids == target_ids[rows]], True)
    return *_sorted_pairs(torch.cat([rows, everywhere]), torch.cat([ids, target_ids])), ~inside


def _largest_pairs(support: Support, z: Tensor) -> tuple[Tensor, Tensor]:
    """(row, id) of what min_p, top_k and top_p leave of z [n, V], in no particular order."""
    count = _first_count(support, z.shape[1])
    pending = torch.arange(len(z), device=z.device)
    rows, ids, unclear = [pending[:0]], [pending[:0]], [pending[:0]]
    alone = support.top_p is not None and support.top_k is None and support.min_p is None
    while len(pending) and 4 * count <= z.shape[1]:
        logits = z if len(pending) == len(z) else z[pending]
        if alone and count > FIRST_LARGEST:  # flat rows: a threshold is found faster than the largest hundreds
            kept_rows, kept, is_unclear = _above_threshold(support.select(pending), logits)
            rows.append(pending[kept_rows])
            ids.append(kept)
            pending = pending[is_unclear]
            break
        values, columns = largest(logits, count)
        if support.lowest_ids:
            values, columns = lowest_first(values, columns)
        keep, complete, is_unclear = _decide(support.select(pending), values, logits)
        kept_rows, kept = (keep & (complete & ~is_unclear)[:, None]).nonzero().unbind(1)
        rows.append(pending[kept_rows])
        ids.append(columns[kept_rows, kept])
        unclear.append(pending[is_unclear])
        pending, count = pending[~complete & ~is_unclear], 4 * count
    rest = torch.cat([*unclear, pending])
    if len(rest):
        kept_rows, kept = keep_mask(support.select(rest), z[rest]).nonzero().unbind(1)
        rows.append(rest[kept_rows])
        ids.append(kept)
    return torch.cat(rows), torch.cat(ids)


def _first_count(support: Support, vocab: int) -> int:
    """How many of the largest logits are looked at first: top_k and room for ties, or FIRST_LARGEST."""
    k = 0 if support.top_k is None else int(torch.as_tensor(support.top_k).max())
    return k + 12 if 0 < k < vocab else FIRST_LARGEST


def largest(z: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row of z [n, V], in descending order, and their columns: [n, count] each.

    torch.topk over the whole row is slow. So a plain maximum over each of V / STRIDE interleaved groups comes first:
    the `count` largest numbers lie in the `count` groups with the largest maxima.
    """
    num_rows, vocab = z.shape
    groups = vocab // STRIDE
    if groups < 4 * count:
        return z.topk(count, dim=1)
    whole = z[:, : groups * STRIDE].view(num_rows, STRIDE, groups)
    best = whole.amax(1).topk(count, dim=1).indices
    columns = (best[:, None, :] + groups * torch.arange(STRIDE, device=z.device)[:, None]).flatten(1)
    if groups * STRIDE < vocab:
        tail = torch.arange(groups * STRIDE, vocab, device=z.device).expand(num_rows, -1)
        columns = torch.cat([columns, tail], dim=1)
    values, places = z.gather(1, columns).topk(count, dim=1)
    return values, columns.gather(1, places)


def lowest_first(values: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Values [n, M] in descending order, of equal ones the lowest column first; and their columns."""
    columns, order = columns.sort(1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values, columns.gather(1, order)


def _above_threshold(support: Support, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(row, id) of what top_p alone keeps of logits [n, V], found by bisection for the least logit that is kept; and,
    bool [n], the rows in which rounding decides which logit that is, for which no pairs come back.
    """
    z = logits - logits.amax(1, keepdim=True)
    e = z.exp()
    wanted = column(support.top_p, z.device, torch.float64) * e.sum(1, keepdim=True, dtype=torch.float64)
    lowest = torch.where(z > -torch.inf, z, 0).amin(1, keepdim=True)
    highest = torch.full_like(lowest, 1e-6)
    near_z, near_e, above = z, e, torch.zeros_like(wanted)
    for bisection in range(BISECTIONS):
        if bisection == FIRST_BISECTIONS:  # few logits are left in between: only those are looked at from here on
            above = _mass_from(highest, z, e)
            near_z, near_e = _between(lowest, highest, z, e)
        middle = (lowest + highest) / 2
        enough = above + _mass_from(middle, near_z, near_e) >= wanted
        lowest, highest = torch.where(enough, middle, lowest), torch.where(enough, highest, middle)
    inside = z >= lowest
    last = inside & (z < highest)  # all but one of these would have to be told apart
    with_last, without_it = (_mass_from(threshold, z, e) - wanted for threshold in (lowest, highest))
    far = torch.minimum(with_last, -without_it) >= MARGIN * wanted  # on both sides, each on its own
    clear = (last.sum(1) == 1) & far[:, 0]
    rows, ids = (inside & clear[:, None]).nonzero().unbind(1)
    return rows, ids, ~clear


def _mass_from(threshold: Tensor, z: Tensor, e: Tensor) -> Tensor:
    """The sum of e [n, M] where z [n, M] reaches the row's threshold [n, 1], f64 [n, 1]."""
    return torch.where(z >= threshold, e, 0).sum(1, keepdim=True).double()


def _between(lowest: Tensor, highest: Tensor, z: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
    """The entries of z and e [n, V] with lowest <= z < highest (each [n, 1]), moved to the left; -inf and 0 follow."""
    inside = (z >= lowest) & (z < highest)
    counts = inside.sum(1)
    rows, columns = inside.nonzero().unbind(1)
    places = torch.arange(len(rows), device=z.device) - (counts.cumsum(0) - counts)[rows]
    width = int(counts.max())
    left_z, left_e = z.new_full((len(z), width), -torch.inf), e.new_zeros(len(e), width)
    left_z[rows, places], left_e[rows, places] = z[rows, columns], e[rows, columns]
    return left_z, left_e


def _decide(support: Support, values: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From the largest `values` [n, M] of the logits [n, V]: which of them are kept, bool [n, M]; the rows where no
    others are kept; and the rows where only the definition can tell. With lowest_ids, equal values must come in the
    order of their ids, and a row is complete only if all that equal the least kept one are among the values.
    """
    dtype, device = torch.float64, values.device
    distance = values.to(dtype) - values[:, :1].to(dtype)
    keep = values > -torch.inf
    unclear = ~keep[:, 0]
    if support.min_p is not None:
        least = column(support.min_p, device, dtype).clamp(min=0).log()
        unclear |= ((distance - least).abs() < MARGIN).any(1)
        keep &= distance >= least
    if support.top_k is not None:
        k = ranks(support.top_k, logits).clamp(max=values.shape[1])
        keep &= values >= values.masked_fill(~keep, -torch.inf).gather(1, k - 1)
    complete = ~keep[:, -1]
    if support.top_k is not None and support.lowest_ids:
        keep &= keep.cumsum(1) <= k
    if support.top_p is not None:
        p = column(support.top_p, device, dtype)
        e = distance.exp().masked_fill_(~keep, 0)
        alone = support.min_p is None and support.top_k is None
        total = (logits - values[:, :1]).exp_().sum(1) if alone else e.sum(1)
        before = (e.cumsum(1) - e) / total[:, None]
        inside = (before < p) | (p >= 1)
        inside[:, 0] = True
        last = keep[:, 1:] & inside[:, :-1] & ~inside[:, 1:]
        if not support.lowest_ids:
            unclear |= (last & (values[:, 1:] == values[:, :-1])).any(1)
        unclear |= (keep & (p < 1) & ((before - p).abs() < MARGIN)).any(1)
        keep &= inside
        if alone:
            complete = ~keep[:, -1]
        if alone and support.lowest_ids:
            complete &= values.masked_fill(~keep, torch.inf).amin(1) > values[:, -1]
    return keep, complete, unclear
