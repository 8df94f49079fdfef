"""Attention over one row of packed tokens: what transformers calls in place of a model's own.

In: queries, keys and values of M packed tokens, and where sequences begin. Out: what each token sees of its own
sequence, up to itself, and nothing of the others. Registered with transformers as `fastkl_packed`.

`Rows`: whole sequences end to end. They are laid side by side, right-padded, for one causal
scaled_dot_product_attention: a pad lies to the right of every token that counts, so none is ever attended to.
`PromptsOnce`: a group's prompt once, then its completions without it. The prompt's tokens attend as ever; those of a
completion see the prompt's keys, computed once, and their own.

On a GPU both go to a kernel that needs no padding where it takes them (segments.py).

On a CPU attention runs in float32 whatever comes in: the bfloat16 backward of PyTorch's CPU kernel takes three times as
long. Elsewhere in the values' dtype: under autocast rotary embeddings leave queries and keys in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional as F

from fastkl.scoring import segments
from fastkl.scoring.segments import Segments

ATTENTION = "fastkl_packed"


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
            seen = seen_by(0, self.width, how.window, query.device)
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
class Group:
    """A prompt and its completions, end to end in the row: `prompt` tokens, then those of `completions`."""

    prompt: int
    completions: Rows | None  # None: no completion has a token that is needed
    num_tokens: int  # of prompt and completions together

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, how: How) -> torch.Tensor:
        """The prompt by itself; the completions side by side, each behind the prompt's keys."""
        first = slice(None), slice(0, self.prompt)
        prompt = Rows(1, self.prompt, None).attend(query[first], key[first], value[first], how)
        if self.completions is None:
            return prompt
        rest, rows = (slice(None), slice(self.prompt, None)), self.completions
        keys, values = (
            torch.cat([x[first].expand(rows.num_rows, -1, -1, -1), rows.side_by_side(x[rest])], dim=2)
            for x in (key, value)
        )
        folded = _fold(rows.side_by_side(query[rest]), len(key))
        seen = seen_by(self.prompt, rows.width, how.window, query.device).repeat(len(query) // len(key), 1)
        out = F.scaled_dot_product_attention(folded, keys, values, attn_mask=seen, scale=how.scale)
        return torch.cat([prompt, rows.end_to_end(_unfold(out, len(query)))])


@dataclass(frozen=True, slots=True)
class PromptsOnce:
    """Groups end to end."""

    groups: tuple[Group, ...]

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, how: How) -> torch.Tensor:
        """Group by group."""
        sizes = [group.num_tokens for group in self.groups]
        parts = zip(self.groups, *(x.split(sizes, dim=1) for x in (query, key, value)), strict=True)
        return torch.cat([group.attend(q, k, v, how) for group, q, k, v in parts])


def _fold(query: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """[rows, heads, width, d] -> [rows, kv_heads, heads / kv_heads * width, d]: heads that share keys as more queries,
    so that no key is copied."""
    rows, heads, width, head_dim = query.shape
    return query.reshape(rows, kv_heads, heads // kv_heads * width, head_dim)


def _unfold(out: torch.Tensor, heads: int) -> torch.Tensor:
    """The inverse of `_fold`."""
    rows, kv_heads, queries, head_dim = out.shape
    return out.reshape(rows, heads, queries * kv_heads // heads, head_dim)


def seen_by(before: int, width: int, window: int | None, device: torch.device) -> torch.Tensor:
    """bool [width, before + width]: which keys each of `width` queries sees that stand behind `before` others."""
    distance = torch.arange(before, before + width, device=device)[:, None]
    distance = distance - torch.arange(before + width, device=device)[None, :]
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


class OnGpu:
    """Sequences as segments where the kernel takes them; else as `side_by_side` lays them, which is found out then."""

    def __init__(self, packed: Segments, side_by_side: Callable[[], Row]) -> None:
        self.packed = packed
        self._side_by_side = side_by_side

    @cached_property
    def padded(self) -> Row:
        """The sequences side by side."""
        return self._side_by_side()

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, how: How) -> torch.Tensor:
        """By the kernel, or side by side."""
        if segments.takes(query, value):
            return self.packed.attend(query, key, value, how.scale, how.window)
        return self.padded.attend(query, key, value, how)


def has_kernel(device: torch.device) -> bool:
    """Whether segments may be an answer there."""
    return device.type == "cuda"


def sequences_of(lengths: Sequence[int], device: torch.device) -> Row:
    """A row of whole sequences of the given lengths."""
    if not has_kernel(device):
        return rows_of(lengths, device)
    return OnGpu(segments.whole_sequences(lengths, device), lambda: rows_of(lengths, device))


def prompts_once(groups: Sequence[tuple[int, Sequence[int]]], device: torch.device) -> Row:
    """A row of groups: the tokens of a prompt, and of each of its completions."""

    def side_by_side() -> Row:
        return PromptsOnce(tuple(group_of(prompt, completions, device) for prompt, completions in groups))

    if not has_kernel(device):
        return side_by_side()
    return OnGpu(segments.behind_prompts(groups, device), side_by_side)


def rows_of(lengths: Sequence[int], device: torch.device) -> Rows:
    """Rows for sequences of the given lengths; empty ones get none."""
    filled = torch.tensor([length for length in lengths if length], dtype=torch.int64)
    width = int(filled.max())
    if bool((filled == width).all()):
        return Rows(len(filled), width, None)
    start = torch.repeat_interleave(torch.arange(len(filled)) * width - (filled.cumsum(0) - filled), filled)
    return Rows(len(filled), width, (torch.arange(int(filled.sum())) + start).to(device))


def group_of(prompt: int, completions: Sequence[int], device: torch.device) -> Group:
    """A prompt of so many tokens with completions of so many; empty ones get no row."""
    rows = rows_of(completions, device) if any(completions) else None
    return Group(prompt, rows, prompt + sum(completions))


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
