"""Which token ids the sampler could have drawn: the recorded or recomputed support of a block of rows.

`keep_mask` is the definition, a mask over the vocabulary; cpu/supports.py finds the same ids as lists, gpu/supports.py
as one threshold per row. Limits are applied in the order of vLLM's sampler (vllm/v1/sample: banned ids, temperature,
min_p, top_k, top_p). Equal logits at a cut are treated as its PyTorch sampler treats them, which runs on CPUs, or, with
ties="lowest_ids", as its Triton sampler does, which runs on GPUs (see Support).
Left out: settings that change the distribution in other ways (penalties, guided decoding); they cannot be replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .types import Support


def column(value: float | int | Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A number or a tensor [n] as a tensor [n or 1, 1]."""
    return torch.as_tensor(value, device=device).to(dtype).reshape(-1, 1)


def keep_mask(support: Support, logits: Tensor, target_ids: Tensor | None = None) -> Tensor:
    """The support of each row as bool [n, V].

    support: for these n rows. logits [n, V]: the policy's, float, after temperature (a shift per row is harmless).
    target_ids i64 [n]: the sampled tokens, always kept; None before anything is sampled.
    """
    if support.kept_ids is not None:
        keep = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
        keep[rows_of_record(support), support.kept_ids] = True
    else:
        keep = torch.ones(logits.shape, dtype=torch.bool, device=logits.device)
        if support.excluded_ids is not None:
            keep[:, support.excluded_ids] = False
        if support.banned_ids is not None:
            banned_rows = True if support.banned_rows is None else support.banned_rows[:, None]
            keep[:, support.banned_ids] &= ~torch.as_tensor(banned_rows, device=logits.device)
        if support.is_recomputed:
            keep = _recompute(support, logits.masked_fill(~keep, -torch.inf))
    return keep if target_ids is None else keep.scatter_(1, target_ids[:, None], True)


def keep_sampled_(keep: Tensor, target_ids: Tensor) -> Tensor:
    """Adds the sampled tokens i64 [n] to a mask [n, V]; returns the rows, bool [n], in which it did not hold them."""
    outside = ~keep.gather(1, target_ids[:, None])[:, 0]
    keep.scatter_(1, target_ids[:, None], True)
    return outside


def rows_of_record(support: Support) -> Tensor:
    """The row of each of kept_ids."""
    counts = support.kept_offsets.diff()
    rows = torch.arange(len(counts), device=counts.device)
    return torch.repeat_interleave(rows, counts, output_size=len(support.kept_ids))


def as_record(pairs: Sequence[tuple[Tensor, Tensor]], target_ids: Tensor) -> Support:
    """The (row, id) of consecutive ranges, with rows numbered as in the call, as the recorded support of n rows."""
    rows = torch.cat([target_ids[:0], *(rows for rows, _ in pairs)])
    counts = torch.bincount(rows, minlength=len(target_ids))
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return Support(kept_ids=torch.cat([target_ids[:0], *(ids for _, ids in pairs)]), kept_offsets=offsets)


def _recompute(support: Support, logits: Tensor) -> Tensor:
    """min_p, then top_k, then top_p; `logits` has -inf at banned ids and is overwritten. Returns what is left."""
    if support.min_p is not None:
        probs = logits.softmax(1)
        threshold = probs.amax(1, keepdim=True) * column(support.min_p, logits.device, logits.dtype)
        logits.masked_fill_(probs < threshold, -torch.inf)
    if support.top_p is not None or (support.top_k is not None and support.lowest_ids):
        top_p = column(1.0 if support.top_p is None else support.top_p, logits.device, logits.dtype)
        _apply_top_k_top_p(logits, support.top_k, top_p, support.lowest_ids)
    elif support.top_k is not None:
        k = ranks(support.top_k, logits)
        largest = logits.topk(int(k.max()) if len(k) else 1, dim=1).values
        logits.masked_fill_(logits < largest.gather(1, k - 1), -torch.inf)
    return logits > -torch.inf


def ranks(top_k: int | Tensor, logits: Tensor, device: torch.device | None = None) -> Tensor:
    """top_k as i64 [n, 1] from 1 to V, on the logits' device unless another is named; V where it is off."""
    k = column(top_k, device or logits.device, torch.int64).expand(len(logits), 1)
    return torch.where((k <= 0) | (k > logits.shape[1]), logits.shape[1], k)


def _apply_top_k_top_p(logits: Tensor, top_k: int | Tensor | None, top_p: Tensor, lowest_ids: bool) -> None:
    """Keeps every logit >= the k-th largest of its row (lowest_ids: the k largest), then the fewest best ones whose
    probability reaches top_p.

    The sort is the very call that vLLM makes, so that equal logits fall on the same side of the top_p threshold;
    lowest_ids: it sorts from the last id to the first, and leaves equal logits in this order.
    """
    vocab = logits.shape[1]
    if lowest_ids:
        ordered, places = logits.flip(1).sort(dim=1, stable=True)
        ids = vocab - 1 - places
    else:
        ordered, ids = logits.sort(dim=1, descending=False)
    below = torch.zeros_like(ordered, dtype=torch.bool)
    if top_k is not None:
        first = vocab - ranks(top_k, logits)
        below = torch.arange(vocab, device=ids.device) < first if lowest_ids else ordered < ordered.gather(1, first)
        ordered.masked_fill_(below, -torch.inf)
    outside = ordered.softmax(1).cumsum_(1) <= 1 - top_p
    outside[:, -1] = False
    below |= outside & (top_p < 1)
    logits.masked_fill_(torch.zeros_like(below).scatter_(1, ids, below), -torch.inf)


def switched_on(support: Support, vocab: int) -> Support:
    """Without the limits that are off for every row, as far as that can be told without waiting for a GPU."""

    def on(value: Any, is_on: Callable[[Tensor], Tensor]) -> Any:
        if value is None or (isinstance(value, Tensor) and value.is_cuda):
            return value
        return value if bool(is_on(torch.as_tensor(value)).any()) else None

    return replace(
        support,
        top_k=on(support.top_k, lambda k: (k > 0) & (k < vocab)),
        top_p=on(support.top_p, lambda p: p < 1),
        min_p=on(support.min_p, lambda p: p > 0),
    )
