"""The record of what a sampler could draw, for a loss that is computed after the policy has changed.

top_k, top_p and min_p are functions of the logits of the policy that sampled. An updated policy would give another set,
so the rollout records the set: per row (completion), the kept ids of each of its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastkl.kernels.reference import head_logits
from fastkl.kernels.support import keep_mask
from fastkl.kernels.types import Head, Support

CHUNK_LOGITS = 16 << 20
"""Logits held at a time while recording."""


@dataclass(frozen=True, slots=True)
class KeptIds:
    """The ids that could be drawn at each of a completion's n tokens."""

    ids: Tensor  # i32 [sum of counts], token by token
    counts: Tensor  # i64 [n]


@torch.no_grad()
def record(
    support: Support, hidden: Tensor, head: Head, target_ids: Tensor, temperature: float, row_lengths: Tensor
) -> list[KeptIds]:
    """What `support` allows at N tokens with hidden states [N, H], split into rows of row_lengths i64 [b] tokens."""
    ids, counts = [target_ids[:0].int()], [target_ids[:0]]
    chunk = max(1, CHUNK_LOGITS // len(head.weight))
    for first in range(0, len(hidden), chunk):
        rows = slice(first, first + chunk)
        logits = head_logits(hidden[rows], head) / temperature
        keep = keep_mask(support.select(rows), logits, target_ids[rows])
        ids.append(keep.nonzero()[:, 1].int())
        counts.append(keep.sum(1))
    per_row = torch.cat(counts).split(row_lengths.tolist())
    sizes = [int(row.sum()) for row in per_row]
    # copies: a row must not keep the ids of the whole batch alive
    return [KeptIds(i.clone(), c.clone()) for i, c in zip(torch.cat(ids).split(sizes), per_row, strict=True)]


def kept_support(kept: Sequence[KeptIds], device: torch.device) -> Support:
    """The record of some rows, as the scorer takes it."""
    counts = torch.cat([row.counts for row in kept])
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return Support(kept_ids=torch.cat([row.ids for row in kept]).long().to(device), kept_offsets=offsets.to(device))
