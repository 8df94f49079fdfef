"""Recomputed supports on a GPU, without a mask over the vocabulary.

What min_p, top_k and top_p leave of a row is a prefix of its logits in descending order, of equal ones the highest id
first (with Support.lowest_ids the lowest). So one logit and one id per row say it all, and every kernel that reads
logits can tell what is kept:

    keep = z > threshold or (z == threshold and id >= edge_id), and the target, but no banned id
    (with lowest_ids: id <= edge_id)

`support_kernel` finds them, one program per row, from the statistics of score_kernel:

    1. a bound below the least logit that is kept. top_k: at least k logits reach the k-th largest of the lanes' maxima;
       min_p: the maximum + log(min_p); top_p: logits below max + log((1 - p) sum / V) weigh less than 1 - p together
    2. top_p alone: passes with three pivots between bound and maximum, until few logits are left where the cut lies
    3. what lies between goes to a list, in no order
    4. the list is sorted by logit and id, and the limits are applied as the definition does

Where rounding may decide, equal logits that torch.sort orders as it likes are cut, or the list is full, the row gets no
threshold (NaN): support.keep_mask decides it, and a mask of bytes is made for such rows alone. `support_sums_kernel`
sums over supports that are longer than the list.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..support import ranks
from ..types import Support
from .rows import (
    EDGE_ID,
    EXCLUDED,
    LOG2E,
    NO_LOGIT,
    OUTSIDE,
    THRESHOLD,
    VECTOR,
    finish,
    fold_bits,
    is_kept,
    load_logits,
    load_pair,
    locate,
    merge_lanes,
    no_sums_bits,
    store_fields,
    weighted,
)  # fmt: skip

MARGIN = tl.constexpr(2e-6)
"""Of cumulative probability. torch's float32 cumsum over a sorted row of 151,936 is up to 1.0e-6 off, the kernel's sums
up to 3e-7 (against float64, logits of standard deviation 0.5 to 8): beyond both together the two agree. Within it,
an id that weighs more than this itself is left to the definition; of lighter ones either choice is as good."""

SLACK = tl.constexpr(1e-4)
"""In nats: how much lower a bound is put, so that its own rounding is harmless."""

LIST, SHORT_LIST = 2048, 256
ROUNDS = tl.constexpr(12)
"""Passes with pivots; each leaves a quarter of the interval."""

SUPPORT_BLOCK, SUPPORT_LANES, SUPPORT_WARPS = 1024, 512, 4
SUMS_BLOCK, SUMS_LANES, SUMS_WARPS = 1024, 256, 2
MAX_BANS = 16
ROWS_AT_A_TIME = 8192
"""Lists of so many rows exist at a time: 128 MiB."""


class Limits(NamedTuple):
    """What is asked for, and the lists; any tensor stands in for a limit that is not there."""

    top_k: Any  # i64 [n], from 1 to V
    top_p: Any  # f32 [n]
    min_p: Any  # f32 [n]
    low: Any  # f32 [n], from score_kernel, for top_k
    bans: Any  # i64 [B]
    num_bans: Any  # i64 [n]: so many of them are banned here
    keys: Any  # i64 [n, LIST]
    counts: Any  # i32 [n]: zero
    unsettled: Any  # i32 [n]: 1 where support_sums_kernel has to sum


class Which(NamedTuple):
    """The limits that there are, and whether the sort of the definition leaves the order of equal logits open."""

    top_k: bool
    top_p: bool
    min_p: bool
    open_ties: bool
    list: int
    short: int


@triton.jit
def banned_mass(row, numbers, top, low, limits, num_bans, FLAGS: tl.constexpr):
    """Sum of exp(z - top) of the banned ids with z >= low."""
    z_ptr, bias_ptr, _, _ = row
    mass = 0.0
    for b in range(0, num_bans):
        z = load_logits(z_ptr, bias_ptr, tl.load(limits.bans + b), numbers, FLAGS.has_bias, FLAGS, False, False)
        mass += tl.where(z >= low, tl.exp2((z - top) * LOG2E), 0.0)
    return mass


@triton.jit
def pivot_block(row, start, block, numbers, top, pivots, sums, FLAGS: tl.constexpr, MASKED: tl.constexpr):
    """Adds a block to the lanes' (mass, count) of the logits that reach each of three pivots."""
    z_ptr, bias_ptr, _, _ = row
    cols = tl.max_contiguous(start + block, [1, VECTOR])
    z = load_logits(z_ptr, bias_ptr, cols, numbers, FLAGS.has_bias, FLAGS, MASKED, False)
    e = tl.exp2((z - top) * LOG2E)
    p1, p2, p3 = pivots
    m1, m2, m3, c1, c2, c3 = sums
    m1 += tl.sum(tl.where(z >= p1, e, 0.0), 0)
    m2 += tl.sum(tl.where(z >= p2, e, 0.0), 0)
    m3 += tl.sum(tl.where(z >= p3, e, 0.0), 0)
    c1 += tl.sum((z >= p1).to(tl.int32), 0)
    c2 += tl.sum((z >= p2).to(tl.int32), 0)
    c3 += tl.sum((z >= p3).to(tl.int32), 0)
    return m1, m2, m3, c1, c2, c3


@triton.jit
def pivot_sums(row, block, numbers, top, pivots, FLAGS: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr):
    """The weights sum exp(z - top) of the logits of a row that reach each of three pivots, and their numbers."""
    vocab = numbers[0]
    zero = tl.zeros([LANES], tl.float32)
    none = tl.zeros([LANES], tl.int32)
    sums = (zero, zero, zero, none, none, none)
    whole = vocab // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        sums = pivot_block(row, start, block, numbers, top, pivots, sums, FLAGS, False)
    if whole < vocab:
        sums = pivot_block(row, whole, block, numbers, top, pivots, sums, FLAGS, True)
    m1, m2, m3, c1, c2, c3 = sums
    return tl.sum(m1, 0), tl.sum(m2, 0), tl.sum(m3, 0), tl.sum(c1, 0), tl.sum(c2, 0), tl.sum(c3, 0)


@triton.jit
def list_block(
    row, start, block, numbers, low, high, n, limits, i, FLAGS: tl.constexpr, WHICH: tl.constexpr, MASKED: tl.constexpr
):
    """Adds the logits of a block with low <= z < high to the row's list, as long as there is room; returns how many
    there have been. The slots come from a counter, in any order."""
    z_ptr, bias_ptr, _, _ = row
    cols = tl.max_contiguous(start + block, [1, VECTOR])
    z = load_logits(z_ptr, bias_ptr, cols, numbers, FLAGS.has_bias, FLAGS, MASKED, False)
    hit = (z >= low) & (z < high)
    hits = tl.sum(tl.sum(hit.to(tl.int32), 0), 0)
    n += hits
    if (hits > 0) & (n <= WHICH.list):
        slot = tl.atomic_add(limits.counts + i + tl.zeros_like(cols), 1, mask=hit, sem="relaxed")
        bits = z.to(tl.int32, bitcast=True)
        bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # in the order of the numbers
        place = 0x7FFFFFFF - cols if FLAGS.lowest_ids else cols
        tl.store(limits.keys + i * WHICH.list + slot, (bits.to(tl.int64) << 32) | place.to(tl.int64), mask=hit)
    return n


@triton.jit
def sums_of_list(row, z, ids, others, r_t, numbers, FLAGS: tl.constexpr):
    """The sums that `finish` takes, over those ids of a list that are kept, the target aside."""
    _, _, r_ptr, ref_bias_ptr = row
    m = tl.maximum(tl.max(tl.where(others, z, EXCLUDED), 0), NO_LOGIT)
    e = tl.where(others, tl.exp2((z - m) * LOG2E), 0.0)
    d = tl.where(others, z - m, 0.0)
    mr, sr, g = m, m * 0.0, m * 0.0
    if FLAGS.has_ref:
        listed = tl.where(others, ids, 0)
        r = load_logits(r_ptr, ref_bias_ptr, listed, numbers, FLAGS.has_ref_bias, FLAGS, False, True)
        r = tl.where(others, r, -float("inf"))
        mr = tl.maximum(tl.maximum(tl.max(r, 0), r_t), NO_LOGIT)
        sr = tl.sum(tl.exp2((r - mr) * LOG2E), 0) + tl.exp2((r_t - mr) * LOG2E)
        g = tl.sum(weighted(e, d - (r - mr)), 0)
    return m, mr, tl.sum(e, 0), tl.sum(e * d, 0), sr, g


@triton.jit
def decide(
    row, i, target, z_t, r_t, n, top, total, above, whole, k, limits, num_bans, stats, numbers,
    FLAGS: tl.constexpr, WHICH: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """The limits on the n listed logits; stores the threshold and, if nothing above the list is kept, the statistics.

    above: what weighs more than the list, in exponentials centred at top; whole: whether nothing does. k: how many of
    the best top_k leaves.
    """
    place = tl.arange(0, SIZE)
    key = tl.load(limits.keys + i * WHICH.list + place, mask=place < n, other=-0x7FFFFFFFFFFFFFFF)
    key = tl.sort(key, 0, True)
    bits = (key >> 32).to(tl.int32)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    z = bits.to(tl.float32, bitcast=True)
    ids = key.to(tl.int32)
    if FLAGS.lowest_ids:
        ids = 0x7FFFFFFF - ids
    keep = place < n
    for b in range(0, num_bans):
        keep = keep & (ids != tl.load(limits.bans + b).to(tl.int32))
    best = tl.max(tl.where(keep, z, EXCLUDED), 0)
    unclear = (best < NO_LOGIT).to(tl.int32)
    if WHICH.min_p:
        min_p = tl.load(limits.min_p + i)
        if min_p > 0.0:
            distance = (z - best) - tl.log(min_p)
            unclear += tl.sum((keep & (tl.abs(distance) < MARGIN)).to(tl.int32), 0)
            unclear += (best < top - SLACK).to(tl.int32)  # the best one is banned: the list need not hold all
            keep = keep & (distance >= 0.0)
    if WHICH.top_k:
        rank = tl.cumsum(keep.to(tl.int32), 0)
        last = tl.minimum(tl.max(rank, 0), k)
        if FLAGS.lowest_ids:
            keep = keep & (rank <= last)
        else:
            keep = keep & (z >= tl.max(tl.where(keep & (rank >= last), z, EXCLUDED), 0))
    if WHICH.top_p:
        p = tl.load(limits.top_p + i)
        if p < 1.0:
            e = tl.where(keep, tl.exp2((z - top) * LOG2E), 0.0)
            if total <= 0.0:
                total = tl.sum(e, 0)
            before = above + (tl.cumsum(e, 0) - e)
            near = tl.abs(before - p * total) < MARGIN * total
            heavy = keep & (e > MARGIN * total)
            unclear += tl.sum((heavy & near & (before > 0.0)).to(tl.int32), 0)
            first = (tl.cumsum(keep.to(tl.int32), 0) == 1) & (whole > 0)
            inside = keep & ((before < p * total) | first)
            if WHICH.open_ties:
                least = tl.min(tl.where(inside, z, float("inf")), 0)
                unclear += tl.sum((heavy & (inside == 0) & (z == least)).to(tl.int32), 0)
            keep = inside
    threshold = tl.min(tl.where(keep, z, float("inf")), 0)
    at_edge = keep & (z == threshold)
    if FLAGS.lowest_ids:
        edge_id = tl.max(tl.where(at_edge, ids, -1), 0)
    else:
        edge_id = tl.min(tl.where(at_edge, ids, 0x7FFFFFFF), 0)
        if WHICH.top_k and not WHICH.top_p:
            edge_id = edge_id * 0
    unclear += (threshold == float("inf")).to(tl.int32)
    tl.store(stats.support + THRESHOLD * stats.stride + i, tl.where(unclear > 0, float("nan"), threshold))
    tl.store(stats.support + EDGE_ID * stats.stride + i, edge_id.to(tl.float32))
    tl.store(limits.unsettled + i, ((unclear == 0) & (whole == 0)).to(tl.int32))
    if (unclear == 0) & (whole > 0):
        sums = sums_of_list(row, z, ids, keep & (ids != target), r_t, numbers, FLAGS)
        store_fields(stats.support, stats.stride, i, True, finish(z_t, r_t, sums, FLAGS.has_ref))


@triton.jit
def bound(limits, i, top, vocab, WHICH: tl.constexpr):
    """What the least logit that top_k and min_p keep is not below; how many top_k leaves; whether neither limits this
    row, so that top_p is alone."""
    low = tl.full([], NO_LOGIT, tl.float32)
    k = vocab + tl.full([], 0, tl.int32)
    alone = k * 0 + 1
    if WHICH.top_k:
        k = tl.load(limits.top_k + i).to(tl.int32)
        if k < vocab:
            low = tl.maximum(low, tl.load(limits.low + i))
            alone = k * 0
    if WHICH.min_p:
        min_p = tl.load(limits.min_p + i)
        if min_p > 0.0:
            low = tl.maximum(low, top + tl.log(min_p) - SLACK - tl.abs(top) * MARGIN)
            alone = k * 0
    return low, k, alone


@triton.jit
def around_the_cut(
    row, block, numbers, top, low, wanted, limits, num_bans,
    FLAGS: tl.constexpr, WHICH: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """An interval low <= z < high of logits, few enough for the list, in which the sum of exp(z - top) from above
    reaches `wanted`; and the sum above it. high is infinite where the list may hold all that is above, too."""
    high = tl.full([], float("inf"), tl.float32)
    above = tl.full([], 0.0, tl.float32)
    from_low = numbers[0] + tl.full([], 0, tl.int32)  # how many logits reach low and high, at most
    from_high = from_low * 0
    for _ in range(0, ROUNDS):
        if from_low - from_high > WHICH.list:
            step = (tl.minimum(high, top) - low) * 0.25
            pivots = (low + step, low + 2.0 * step, low + 3.0 * step)
            m1, m2, m3, n1, n2, n3 = pivot_sums(row, block, numbers, top, pivots, FLAGS, BLOCK, LANES)
            p1, p2, p3 = pivots
            # the cut lies between the highest pivot that enough weight reaches and the next one
            in_3 = m3 - banned_mass(row, numbers, top, p3, limits, num_bans, FLAGS)
            in_2 = m2 - banned_mass(row, numbers, top, p2, limits, num_bans, FLAGS)
            in_1 = m1 - banned_mass(row, numbers, top, p1, limits, num_bans, FLAGS)
            by_3, by_2, by_1 = in_3 >= wanted, in_2 >= wanted, in_1 >= wanted
            low = tl.where(by_3, p3, tl.where(by_2, p2, tl.where(by_1, p1, low)))
            from_low = tl.where(by_3, n3, tl.where(by_2, n2, tl.where(by_1, n1, from_low)))
            high = tl.where(by_3, high, tl.where(by_2, p3, tl.where(by_1, p2, p1)))
            above = tl.where(by_3, above, tl.where(by_2, in_3, tl.where(by_1, in_2, in_1)))
            from_high = tl.where(by_3, from_high, tl.where(by_2, n3, tl.where(by_1, n2, n1)))
    if from_low <= WHICH.list:
        high = tl.full([], float("inf"), tl.float32)
        above = tl.full([], 0.0, tl.float32)
    return low, high, above


@triton.jit
def support_kernel(
    inputs, stats, limits, numbers, FLAGS: tl.constexpr, WHICH: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr
):
    """Threshold of a row's support, and the statistics over it where its list holds all of it.

    (The target's logits are read like all others: with the list's kernel alone, they need not be in it.)
    """
    i, row_id, target, numbers = locate(inputs, numbers, FLAGS)
    vocab = numbers[0]
    row = inputs.z + row_id * inputs.z_stride, inputs.bias, inputs.r + row_id * inputs.r_stride, inputs.ref_bias
    block = tl.arange(0, BLOCK // LANES)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    top = tl.load(stats.full + i)
    num_bans = tl.load(limits.num_bans + i).to(tl.int32)
    z_t, r_t = load_pair(row, target, numbers, FLAGS.has_ref, FLAGS, False, True)

    low, k, alone = bound(limits, i, top, vocab, WHICH)
    p = tl.full([], 1.0, tl.float32)
    if WHICH.top_p:
        p = tl.load(limits.top_p + i)
    total = tl.full([], 0.0, tl.float32)
    above = tl.full([], 0.0, tl.float32)
    high = tl.full([], float("inf"), tl.float32)
    hopeless = k * 0
    if WHICH.top_p and ((p < 1.0) & (alone > 0)):
        everything = tl.exp2(tl.load(stats.full + stats.stride + i) * LOG2E)
        total = everything - banned_mass(row, numbers, top, low, limits, num_bans, FLAGS)
        hopeless = (total < 0.5 * everything).to(tl.int32)  # a difference that small is not exact
        low = tl.maximum(low, top + tl.log((1.0 - p) * total / vocab) - SLACK)
        low, high, above = around_the_cut(
            row, block, numbers, top, low, p * total, limits, num_bans, FLAGS, WHICH, BLOCK, LANES
        )

    if (p >= 1.0) & (alone > 0):  # no limit in this row
        tl.store(stats.support + THRESHOLD * stats.stride + i, NO_LOGIT)
        tl.store(stats.support + EDGE_ID * stats.stride + i, 0.0)
        tl.store(limits.unsettled + i, 1)
    else:
        n = k * 0
        whole_blocks = vocab // BLOCK * BLOCK
        for start in range(0, whole_blocks, BLOCK):
            n = list_block(row, start, block, numbers, low, high, n, limits, i, FLAGS, WHICH, False)
        if whole_blocks < vocab:
            n = list_block(row, whole_blocks, block, numbers, low, high, n, limits, i, FLAGS, WHICH, True)
        tl.debug_barrier()
        whole = (high == float("inf")).to(tl.int32)
        if (n > WHICH.list) | (n == 0) | (hopeless > 0):
            tl.store(stats.support + THRESHOLD * stats.stride + i, float("nan"))
            tl.store(limits.unsettled + i, 0)
        elif n <= WHICH.short:
            decide(row, i, target, z_t, r_t, n, top, total, above, whole, k, limits, num_bans, stats, numbers, FLAGS,
                   WHICH, WHICH.short)  # fmt: skip
        else:
            decide(row, i, target, z_t, r_t, n, top, total, above, whole, k, limits, num_bans, stats, numbers, FLAGS,
                   WHICH, WHICH.list)  # fmt: skip


@triton.jit
def support_sums_kernel(
    inputs, stats, limits, numbers, FLAGS: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """The statistics on the support of the rows that support_kernel left, from their thresholds; and of all rows with a
    threshold, whether the target lies outside."""
    i, row_id, target, numbers = locate(inputs, numbers, FLAGS)
    vocab = numbers[0]
    row = inputs.z + row_id * inputs.z_stride, inputs.bias, inputs.r + row_id * inputs.r_stride, inputs.ref_bias
    z_t, r_t = load_pair(row, target, numbers, FLAGS.has_ref, FLAGS, False, True)
    num_bans = tl.load(limits.num_bans + i).to(tl.int32)
    threshold = tl.load(stats.support + THRESHOLD * stats.stride + i)
    edge_id = tl.load(stats.support + EDGE_ID * stats.stride + i).to(tl.int32)
    inside = is_kept(z_t, target, threshold, edge_id, target, 1, limits.bans, num_bans, FLAGS.lowest_ids)
    tl.store(stats.support + OUTSIDE * stats.stride + i, (inside == 0).to(tl.float32))
    if tl.load(limits.unsettled + i) != 0:
        block = tl.arange(0, BLOCK // LANES)[:, None] * LANES + tl.arange(0, LANES)[None, :]
        sums = no_sums_bits(LANES)
        for start in range(0, vocab, BLOCK):
            cols = tl.max_contiguous(start + block, [1, VECTOR])
            z, r = load_pair(row, cols, numbers, FLAGS.has_ref, FLAGS, True, True)
            keep = is_kept(z, cols, threshold, edge_id, start, BLOCK, limits.bans, num_bans, FLAGS.lowest_ids)
            r = tl.where(keep | (cols == target), r, -float("inf"))
            z = tl.where(keep & (cols != target), z, EXCLUDED)
            sums = fold_bits(z, r, sums, FLAGS.has_ref, True, 0)
        on_support = finish(z_t, r_t, merge_lanes(sums, FLAGS.has_ref), FLAGS.has_ref)
        store_fields(stats.support, stats.stride, i, True, on_support)


class Thresholds:
    """The recomputed support of the n rows of a call, and what the kernels need to find it."""

    def __init__(self, support: Support, num_rows: int, vocab: int, device: torch.device) -> None:
        def numbers(value: Any) -> Tensor:
            return torch.as_tensor(value, device=device).to(torch.float32).expand(num_rows).contiguous()

        self.which = Which(
            support.top_k is not None, support.top_p is not None, support.min_p is not None,
            device.type != "cuda" and not support.lowest_ids, LIST, SHORT_LIST,
        )  # fmt: skip
        self.lowest_ids = support.lowest_ids
        like = torch.empty(num_rows, vocab, device="meta")
        self.top_k = None if support.top_k is None else ranks(support.top_k, like, device)[:, 0].contiguous()
        self.top_p = None if support.top_p is None else numbers(support.top_p)
        self.min_p = None if support.min_p is None else numbers(support.min_p)
        self.bans, self.num_bans = _bans(support, num_rows, device)
        self.low = torch.empty(num_rows, device=device)
        self.rank = None if self.top_k is None else self.top_k + self.num_bans
        """So many logits must reach `low`, banned ones included."""

    def limits(self, rows: slice) -> Limits:
        """What support_kernel takes for some rows, with new lists."""
        num_rows = rows.stop - rows.start
        keys = torch.empty(num_rows, self.which.list, dtype=torch.int64, device=self.low.device)
        counts = torch.zeros(2, num_rows, dtype=torch.int32, device=self.low.device)
        low = self.low[rows]
        top_k, top_p, min_p = (low if x is None else x[rows] for x in (self.top_k, self.top_p, self.min_p))
        return Limits(top_k, top_p, min_p, low, self.bans, self.num_bans[rows], keys, counts[0], counts[1])


def _bans(support: Support, num_rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The banned ids, each once, i64 [B]; and how many of them, from the first on, are banned in each row, i64 [n]."""
    none = torch.empty(0, dtype=torch.int64, device=device)
    excluded = none if support.excluded_ids is None else support.excluded_ids.unique()
    banned = none if support.banned_ids is None else support.banned_ids.unique()
    banned = banned[~torch.isin(banned, excluded)]
    here = torch.ones(num_rows, dtype=torch.bool, device=device)
    if support.banned_rows is not None:
        here = support.banned_rows.to(device)
    bans = torch.cat([excluded, banned])
    return bans if len(bans) else none.new_zeros(1), len(excluded) + len(banned) * here.long()


def has_thresholds(support: Support | None, vocab: int) -> bool:
    """Whether a support is found as thresholds: it depends on the logits, and few ids are banned. (Triton 3.6 does not
    compile the search among one id.)"""
    if support is None or not support.is_recomputed or vocab == 1:
        return False
    lists = (ids for ids in (support.excluded_ids, support.banned_ids) if ids is not None)
    return sum(len(ids) for ids in lists) <= MAX_BANS


def needs_masks(support: Support | None, vocab: int) -> bool:
    """Whether there is a support that is a mask for every row."""
    return support is not None and not has_thresholds(support, vocab)
