"""Attention over one row of packed tokens: what transformers calls in place of a model's own.

In: queries, keys and values of M packed tokens, and where sequences begin. Out: what each token sees of its own
sequence, up to itself, and nothing of the others. Registered with transformers as `fastkl_packed`.

`Rows`: whole sequences end to end. They are laid side by side, right-padded, for one causal
scaled_dot_product_attention: a pad lies to the right of every token that counts, so none is ever attended to.
`Branches`: sequences that begin alike as a tree (prefixes.py). A token sees those before it on its own branch. The row
is cut into blocks, each with the keys that it sees.

On a GPU both go to a kernel that needs no padding where it takes them (segments.py).

On a CPU attention runs in float32 whatever comes in: the bfloat16 backward of PyTorch's CPU kernel takes three times as
long. Elsewhere in the values' dtype: under autocast rotary embeddings leave queries and keys in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional as F

from fastkl.scoring import segments
from fastkl.scoring.segments import Segments
from fastkl.types import PrefixTree

ATTENTION = "fastkl_packed"

LEAST_BLOCK, MOST_COPIES = 64, 4
"""Tokens of a block of `Branches`, and how often the keys of long sequences are copied for their blocks.

Forward and backward of 2,840 tokens in 64 ragged branches (6 heads of 32, two threads) took 27 ms in blocks of 64,
31 ms in blocks of 128 and 30 ms in blocks of 192; of 4 x 500 tokens behind 200 (9 heads of 64), 150, 119 and 127 ms.
Copies are kept for the backward: they are to stay below what the rest of a layer keeps.
"""


class Row(Protocol):
    """Where sequences stand among packed tokens."""

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, how: How) -> torch.Tensor:
        """query [heads, M, d], key and value [kv_heads, M, d] -> [M, heads, d]."""


@dataclass(frozen=True, slots=True)
class How:
    """scale: of the scores (None: 1 / sqrt(d)); window: how many tokens a token sees, itself included (None: all)."""

    scale: float | None = None
    window: int | None = None


@dataclass(frozen=True, slots=True)
class Rows:
    """Where packed tokens stand once s whole sequences are laid side by side in rows of `width` tokens."""

    num_rows: int
    width: int
    cells: torch.Tensor | None  # i64 [M]: row * width + column of every packed token; None: all rows are full

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, how: How) -> torch.Tensor:
        """All sequences in one call. Heads that share keys get copies of them."""
        groups = query.shape[0] // key.shape[0]
        key, value = key.repeat_interleave(groups, dim=0), value.repeat_interleave(groups, dim=0)
        query, key, value = (self.side_by_side(x) for x in (query, key, value))
        seen = None
        if how.window is not None and how.window < self.width:
            seen = seen_by(self.width, how.window, query.device)
        return self.end_to_end(
            F.scaled_dot_product_attention(query, key, value, attn_mask=seen, is_causal=seen is None, scale=how.scale)
        )

    def side_by_side(self, packed: torch.Tensor) -> torch.Tensor:
        """[heads, M, d] -> [num_rows, heads, width, d], zero where no token stands."""
        heads, _, head_dim = packed.shape
        if self.cells is None:
            return packed.reshape(heads, self.num_rows, self.width, head_dim).transpose(0, 1)
        padded = packed.new_zeros(self.num_rows * self.width, heads, head_dim)
        padded = padded.index_copy(0, self.cells, packed.transpose(0, 1))
        return padded.view(self.num_rows, self.width, heads, head_dim).transpose(1, 2)

    def end_to_end(self, padded: torch.Tensor) -> torch.Tensor:
        """[num_rows, heads, width, d] -> [M, heads, d]."""
        flat = padded.transpose(1, 2).reshape(self.num_rows * self.width, padded.shape[1], padded.shape[3])
        return flat if self.cells is None else flat.index_select(0, self.cells)


@dataclass(frozen=True, slots=True)
class Blocks:
    """Equally many queries of a tree's row for each of some blocks, against keys of their own: all in one call."""

    keys: torch.Tensor  # i64 [blocks * longest]; row tokens, any one where a block has fewer
    distance: torch.Tensor  # i32 [blocks, 1, width, longest]; from each query back to each key; -1: it does not see it
    biases: dict[tuple[int | None, int], torch.Tensor] = field(default_factory=dict)  # by window and repeats

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, how: How) -> torch.Tensor:
        """query [blocks, kv_heads, repeats * width, d], key and value [M, kv_heads, d] -> like query."""
        key, value = (
            x.index_select(0, self.keys).view(len(query), -1, *x.shape[1:]).transpose(1, 2) for x in (key, value)
        )
        bias = self.bias(how.window, query.shape[2] // self.distance.shape[2], query.dtype)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=how.scale)

    def bias(self, window: int | None, repeats: int, dtype: torch.dtype) -> torch.Tensor:
        """[blocks, 1, repeats * width, longest]; 0 where a query sees a key, -inf elsewhere. One for all layers."""
        if (window, repeats) not in self.biases:
            seen = self.distance >= 0 if window is None else (self.distance >= 0) & (self.distance < window)
            bias = torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, -math.inf)
            self.biases[window, repeats] = bias.repeat(1, 1, repeats, 1)
        return self.biases[window, repeats]


@dataclass(frozen=True, slots=True)
class Branches:
    """A tree's row in blocks of `width` tokens. A block's keys are its own and what its first token sees, which is all
    that any of its tokens sees before it (the row is in depth-first order)."""

    num_tokens: int
    width: int
    alike: tuple[Blocks, ...]  # blocks of similar numbers of keys
    order: torch.Tensor | None  # i64 [blocks]; which block of the row each of them is; None: in the row's order

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, how: How) -> torch.Tensor:
        """Heads that share keys are as many more queries of a block, so that no key is copied for them."""
        (heads, tokens, head_dim), kv_heads, blocks = query.shape, len(key), -(-self.num_tokens // self.width)
        query = F.pad(query, (0, 0, 0, blocks * self.width - tokens))
        query = query.reshape(kv_heads, heads // kv_heads, blocks, self.width, head_dim).permute(2, 0, 1, 3, 4)
        query = query.reshape(blocks, kv_heads, -1, head_dim)
        key, value = key.transpose(0, 1), value.transpose(0, 1)
        if self.order is None:
            out = self.alike[0].attend(query, key, value, how)
        else:
            parts = query.index_select(0, self.order).split([len(part.distance) for part in self.alike])
            found = [part.attend(q, key, value, how) for part, q in zip(self.alike, parts, strict=True)]
            out = torch.cat(found).index_select(0, self.order.argsort())
        out = out.view(blocks, kv_heads, heads // kv_heads, self.width, -1).permute(0, 3, 1, 2, 4)
        return out.reshape(blocks * self.width, heads, -1)[:tokens].contiguous()  # models take views of it


def seen_by(width: int, window: int, device: torch.device) -> torch.Tensor:
    """bool [width, width]: which keys each of `width` queries sees."""
    places = torch.arange(width, device=device)
    distance = places[:, None] - places
    return (distance >= 0) & (distance < window)


class OnGpu:
    """Sequences as segments where the kernel takes them; else as `otherwise` lays them, which is found out then."""

    def __init__(self, packed: Segments, otherwise: Callable[[], Row]) -> None:
        self.packed = packed
        self._otherwise = otherwise

    @cached_property
    def laid_out(self) -> Row:
        """The sequences without the kernel: side by side, or in blocks."""
        return self._otherwise()

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, how: How) -> torch.Tensor:
        """By the kernel, or without it."""
        if segments.takes(query, value):
            return self.packed.attend(query, key, value, how.scale, how.window)
        return self.laid_out.attend(query, key, value, how)


def has_kernel(device: torch.device) -> bool:
    """Whether segments may be an answer there."""
    return device.type == "cuda"


def sequences_of(lengths: Sequence[int], device: torch.device) -> Row:
    """A row of whole sequences of the given lengths."""
    if not has_kernel(device):
        return rows_of(lengths, device)
    return OnGpu(segments.whole_sequences(lengths, device), lambda: rows_of(lengths, device))


def branches_of(tree: PrefixTree, device: torch.device) -> Row:
    """The row of a tree."""
    if not has_kernel(device):
        return blocks_of(tree, device)
    return OnGpu(segments.behind_prefixes(tree, device), lambda: blocks_of(tree, device))


def blocks_of(tree: PrefixTree, device: torch.device) -> Branches:
    """The tree's row in blocks.

    A block's queries are laid against all of its keys, their own included, so that wide blocks cost products and narrow
    ones copies of the keys before them.
    """
    tokens = len(tree.end)
    width = max(LEAST_BLOCK, int(tree.depth.max()) // MOST_COPIES)
    keys = [
        torch.cat([tree.before(start), torch.arange(start, min(start + width, tokens))])
        for start in range(0, tokens, width)
    ]
    order = sorted(range(len(keys)), key=lambda block: -len(keys[block]))
    runs: list[list[int]] = []
    for block in order:
        if not runs or len(keys[block]) + width < len(keys[runs[-1][0]]):
            runs.append([])
        runs[-1].append(block)
    if len(runs) == 1:
        return Branches(tokens, width, (_together(tree, range(len(keys)), keys, width, device),), None)
    alike = tuple(_together(tree, run, keys, width, device) for run in runs)
    return Branches(tokens, width, alike, torch.tensor(order, device=device))


def _together(
    tree: PrefixTree, blocks: Sequence[int], keys: Sequence[torch.Tensor], width: int, device: torch.device
) -> Blocks:
    """Some of a row's blocks; keys: those of all blocks."""
    tokens = len(tree.end)
    chosen = nn.utils.rnn.pad_sequence([keys[block] for block in blocks], batch_first=True, padding_value=tokens)
    queries = torch.tensor(blocks)[:, None, None] * width + torch.arange(width)[:, None]
    queries = queries.clamp(max=tokens - 1)  # the last block is filled up
    depth, end = (torch.cat([x, x.new_zeros(1)]).int() for x in (tree.depth, tree.end))  # no query sees a filler
    seen = (chosen[:, None] <= queries) & (queries < end[chosen][:, None])
    distance = (depth[queries] - depth[chosen][:, None]).masked_fill(~seen, -1)
    return Blocks(chosen.remainder(tokens).flatten().to(device), distance[:, None].to(device))


def rows_of(lengths: Sequence[int], device: torch.device) -> Rows:
    """Rows for sequences of the given lengths; empty ones get none."""
    filled = torch.tensor([length for length in lengths if length], dtype=torch.int64)
    width = int(filled.max())
    if bool((filled == width).all()):
        return Rows(len(filled), width, None)
    start = torch.repeat_interleave(torch.arange(len(filled)) * width - (filled.cumsum(0) - filled), filled)
    return Rows(len(filled), width, (torch.arange(int(filled.sum())) + start).to(device))


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,  # [1, heads, M, d]
    key: torch.Tensor,  # [1, kv_heads, M, d]
    value: torch.Tensor,  # [1, kv_heads, M, d]
    attention_mask: torch.Tensor | None,
    *,
    packed_rows: Row,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each sequence, in the form transformers expects: ([1, M, heads, d], None)."""
    if attention_mask is not None or softcap is not None or s_aux is not None:
        raise NotImplementedError("packed attention knows neither masks nor soft-capped scores nor attention sinks")
    dtype, device = value.dtype, query.device.type
    inner = torch.promote_types(dtype, torch.float32) if device == "cpu" else dtype
    query, key, value = (x[0].to(inner) for x in (query, key, value))
    with torch.autocast(device, enabled=False):  # which would cast back
        out = packed_rows.attend(query, key, value, How(scaling, sliding_window))
    return out.to(dtype).unsqueeze(0), None


def register_packed_attention() -> None:
    """Makes `fastkl_packed` known to transformers. May be called more than once."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, packed_attention)
