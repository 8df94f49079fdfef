"""Attention over packed tokens on a GPU, by a kernel that takes sequences of any length (Dao 2023, FlashAttention-2).

In: queries, keys and values of M packed tokens, and which keys each run of queries sees. Out: what each token sees. No
token is laid next to a pad, no mask is read, and one call serves all sequences of a micro-batch: laid side by side
(attention.py) or in blocks, masked scores are computed to be thrown away, and keys are copied for blocks.

A segment is a run of queries that stand end to end, and its keys, of which the queries' own are the last: a sequence
sees itself; one that begins as another does sees what they share, computed once, and itself. Query i of n sees all but
the last n - 1 - i keys.

Left out: float32 and head sizes that the kernel does not take, which `takes` tells.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from inspect import signature
from typing import Any

import torch

from fastkl.types import PrefixTree

OLDEST_CAPABILITY = (8, 0)
LARGEST_HEAD, HEAD_UNIT = 256, 8


@dataclass(frozen=True, slots=True)
class Segments:
    """Where s runs of queries and their keys stand among M packed tokens."""

    keys: torch.Tensor | None  # i64 [L]: the packed tokens that are keys, segment by segment; None: the queries' own
    cu_queries: torch.Tensor  # i32 [s + 1]; segment i owns the queries between its two entries
    cu_keys: torch.Tensor  # i32 [s + 1]
    max_queries: int
    max_keys: int

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None, window: int | None
    ) -> torch.Tensor:
        """query [heads, M, d], key and value [kv_heads, M, d] -> [M, heads, d]. window: tokens that a token sees."""
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        if self.keys is not None:
            key, value = key.index_select(0, self.keys), value.index_select(0, self.keys)
        places = self.cu_queries, self.cu_keys, self.max_queries, self.max_keys
        return kernel(query, key, value, *places, scale=scale, window_size=(-1 if window is None else window - 1, 0))


def kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *places: Any, **options: Any) -> torch.Tensor:
    """PyTorch's: query [M, heads, d], key and value [L, kv_heads, d] -> [M, heads, d]."""
    out: torch.Tensor = _varlen_attn()(query, key, value, *places, **options)
    return out


@cache
def _varlen_attn() -> Callable[..., Any]:
    """It takes keys with fewer heads than the queries; later versions than 2.11 want to be told so."""
    from torch.nn.attention import varlen

    function: Callable[..., Any] = varlen.varlen_attn
    return partial(function, enable_gqa=True) if "enable_gqa" in signature(function).parameters else function


def takes(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether the kernel takes queries and values of this kind, [*, d]."""
    head_dim = query.shape[-1]
    return (
        query.dtype in (torch.float16, torch.bfloat16)
        and value.shape[-1] == head_dim <= LARGEST_HEAD
        and head_dim % HEAD_UNIT == 0
        and torch.cuda.get_device_capability(query.device) >= OLDEST_CAPABILITY
    )


def whole_sequences(lengths: Sequence[int], device: torch.device) -> Segments:
    """Sequences of these lengths, end to end; empty ones make no segment."""
    filled = [length for length in lengths if length]
    ends, longest = _cumulative(filled, device), max(filled)
    return Segments(None, ends, ends, longest, longest)


def behind_prefixes(tree: PrefixTree, device: torch.device) -> Segments:
    """A tree's row: what a sequence has for itself sees what it shares with others before it, and itself."""
    bounds, row = [*tree.starts, len(tree.end)], torch.arange(len(tree.end))
    queries = torch.tensor(bounds).diff().tolist()
    seen = [part for runs in zip(tree.paths, row.split(queries), strict=True) for part in runs]
    keys = [len(path) + count for path, count in zip(tree.paths, queries, strict=True)]
    return Segments(
        torch.cat(seen).to(device), _cumulative(queries, device), _cumulative(keys, device), max(queries), max(keys)
    )


def _cumulative(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    """i32 [len + 1], starting at 0."""
    return torch.tensor([0, *lengths]).cumsum(0).to(device=device, dtype=torch.int32)
