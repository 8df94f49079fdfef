"""Backbone: packed tokens through a transformer, without its head and without cross-talk between sequences.

In: a Hugging Face causal language model and a PackedBatch. Out: hidden states [N, H] that predict the scored tokens.

"packed": the M tokens are one row, so that no matrix product is spent on padding; only attention knows where sequences
begin. It is registered with transformers as the attention implementation `fastkl_packed` and lays the sequences side by
side, right-padded, for one causal scaled_dot_product_attention: a pad lies to the right of every token that counts, so
none is ever attended to.
"padded": right-padded rows through the model's own attention, for architectures that do not take an attention
implementation from outside. `choose_layout` compares with one-at-a-time forwards before the first step and decides;
where the configuration names a window, on sequences that are longer than it, too.

Left out: variable-length kernels for long ragged batches on a GPU; they would take the place of `_padded_attention`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from fastkl.scoring.models import backbone_of, context_length, text_config
from fastkl.scoring.pack import cumulative
from fastkl.types import PackedBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION = "fastkl_packed"


HALF_TOLERANCE = 0.05
"""How far half-precision layouts may differ, relative to the largest hidden value, since they round in a different
order."""

LONGEST_PROBE = 12_288
"""Tokens that the packed layout is tried on at most; beyond, a model with windows is scored in padded rows."""

WINDOW = "window|chunk|block|local|span|index_topk"
NO_WINDOW = "num|multiple|pattern|layer|expert|freq|theta|ind(ices|exes)|head|repeat|per_|group|kernel|dilation|_ids?$"
"""Parts of the names of a configuration's numbers: what makes one a window, and what makes it something else."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Where packed tokens stand once the s sequences are laid side by side in rows of `width` tokens."""

    num_rows: int
    width: int
    cells: torch.Tensor | None  # i64 [M]: row * width + column of every packed token; None: all rows are full


def rows_of(lengths: tuple[int, ...], device: torch.device) -> Rows:
    """Rows for sequences of the given lengths; empty ones get none."""
    filled = torch.tensor([length for length in lengths if length], dtype=torch.int64)
    width = int(filled.max())
    if bool((filled == width).all()):
        return Rows(len(filled), width, None)
    start = torch.repeat_interleave(torch.arange(len(filled)) * width - (filled.cumsum(0) - filled), filled)
    return Rows(len(filled), width, (torch.arange(int(filled.sum())) + start).to(device))


def _to_rows(packed: torch.Tensor, rows: Rows) -> torch.Tensor:
    """[heads, M, d] -> [num_rows, heads, width, d], zero where no token stands."""
    heads, _, head_dim = packed.shape
    if rows.cells is None:
        return packed.view(heads, rows.num_rows, rows.width, head_dim).transpose(0, 1)
    padded = packed.new_zeros(rows.num_rows * rows.width, heads, head_dim)
    padded = padded.index_copy(0, rows.cells, packed.transpose(0, 1))
    return padded.view(rows.num_rows, rows.width, heads, head_dim).transpose(1, 2)


def _from_rows(padded: torch.Tensor, rows: Rows) -> torch.Tensor:
    """[num_rows, heads, width, d] -> [M, heads, d]."""
    flat = padded.transpose(1, 2).reshape(rows.num_rows * rows.width, padded.shape[1], padded.shape[3])
    return flat if rows.cells is None else flat.index_select(0, rows.cells)


def _packed_attention(
    module: nn.Module,
    query: torch.Tensor,  # [1, heads, M, d]
    key: torch.Tensor,  # [1, kv_heads, M, d]
    value: torch.Tensor,  # [1, kv_heads, M, d]
    attention_mask: torch.Tensor | None,
    *,
    packed_rows: Rows,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each sequence, in the form transformers expects: ([1, M, heads, d], None)."""
    if attention_mask is not None or softcap is not None or s_aux is not None:
        raise NotImplementedError("packed attention knows neither masks nor soft-capped scores nor attention sinks")
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    return _padded_attention(query[0], key[0], value[0], packed_rows, scaling, sliding_window).unsqueeze(0), None


def _padded_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: Rows, scale: float | None, window: int | None
) -> torch.Tensor:
    """[heads, M, d] three times -> [M, heads, d]; window: how many tokens a token sees, itself included (None: all).

    In float32 on a CPU whatever comes in: the bfloat16 backward of PyTorch's CPU kernel takes three times as long.
    Elsewhere in the values' dtype: under autocast rotary embeddings leave queries and keys in float32.
    """
    dtype = value.dtype
    inner = torch.promote_types(dtype, torch.float32) if query.device.type == "cpu" else dtype
    query, key, value = (_to_rows(x.to(inner), rows) for x in (query, key, value))
    mask = None
    if window is not None and window < rows.width:
        distance = torch.arange(rows.width, device=query.device)
        distance = distance[:, None] - distance[None, :]
        mask = (distance >= 0) & (distance < window)
    with torch.autocast(query.device.type, enabled=False):  # which would cast back
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale)
    return _from_rows(out, rows).to(dtype)


def register_packed_attention() -> None:
    """Makes `fastkl_packed` known to transformers. May be called more than once."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _packed_attention)


@contextmanager
def scoring(model: PreTrainedModel, layout: str) -> Iterator[None]:
    """Prepares a model for `hidden_states` and for the backward through it, and gives it back as it was.

    Under gradient checkpointing the backward runs layers again: they must find the same attention as in the forward,
    and transformers recomputes in training mode only (dropout is off, so nothing else changes).
    """
    own_attention, was_training = model.config._attn_implementation, model.training
    if layout == "packed":
        model.config._attn_implementation = ATTENTION  # layers that take an attention from outside look here each call
    model.train(getattr(model, "is_gradient_checkpointing", False))
    try:
        yield
    finally:
        model.config._attn_implementation = own_attention
        model.train(was_training)


def packed_hidden_states(model: PreTrainedModel, batch: PackedBatch) -> torch.Tensor:
    """The backbone over one packed row; returns the hidden states [N, H] that predict the scored tokens."""
    hidden = backbone_of(model)(
        input_ids=batch.input_ids[None],
        position_ids=batch.position_ids[None],
        use_cache=False,
        packed_rows=rows_of(batch.lengths, batch.input_ids.device),
    ).last_hidden_state[0]
    return hidden.index_select(0, batch.score_positions)


def padded_hidden_states(model: PreTrainedModel, batch: PackedBatch, rows_at_once: int = 32) -> torch.Tensor:
    """The backbone over right-padded rows, sorted by length, `rows_at_once` at a time; returns [N, H] as above.

    No attention mask is needed: attention is causal, and every pad lies to the right of the tokens that count.
    """
    backbone, starts = backbone_of(model), batch.cu_seqlens.tolist()
    order = sorted((i for i, length in enumerate(batch.lengths) if length), key=lambda i: batch.lengths[i])
    hidden: list[torch.Tensor] = []
    packed_position: list[torch.Tensor] = []
    for first in range(0, len(order), rows_at_once):
        chosen = order[first : first + rows_at_once]
        spans = [torch.arange(starts[i], starts[i + 1], device=batch.input_ids.device) for i in chosen]
        ids = nn.utils.rnn.pad_sequence([batch.input_ids[span] for span in spans], batch_first=True)
        states = backbone(input_ids=ids, use_cache=False).last_hidden_state
        hidden += [states[row, : len(span)] for row, span in enumerate(spans)]
        packed_position += spans
    place = torch.cat(packed_position).argsort()  # undoes the sorting: place[m] is where packed token m now stands
    return torch.cat(hidden).index_select(0, place[batch.score_positions])


def hidden_states(model: PreTrainedModel, batch: PackedBatch, layout: str) -> torch.Tensor:
    """Hidden states [N, H] of the scored positions, in the layout that `scoring` was entered with. Differentiable."""
    return packed_hidden_states(model, batch) if layout == "packed" else padded_hidden_states(model, batch)


def windows_of(config: Any) -> list[int]:
    """Every whole number above 1 that a configuration calls a window, chunk, block or local span: those of nested
    parts and lists included, numbers of layers, blocks and experts not."""
    found: set[int] = set()

    def collect(name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for inner, held in value.items():
                collect(str(inner), held)
        elif isinstance(value, list | tuple):
            for held in value:
                collect(name, held)
        elif type(value) is int and value > 1 and re.search(WINDOW, name) and not re.search(NO_WINDOW, name):
            found.add(value)

    collect("", text_config(config).to_dict())
    return sorted(found)


def _windows_within(config: Any, max_tokens: int | None) -> list[int]:
    """The windows that are shorter than the longest sequence."""
    longest = min((n for n in (max_tokens, context_length(config)) if n is not None), default=None)
    return [window for window in windows_of(config) if longest is None or window < longest]


def long_probe(model: PreTrainedModel, window: int) -> PackedBatch:
    """A sequence that is a quarter longer than the window, behind a short one; all its tokens are scored."""
    lengths = 5, min(window + window // 4 + 16, context_length(model.config) or LONGEST_PROBE, LONGEST_PROBE)
    device, total = model.device, sum(lengths)
    ids = torch.arange(total, device=device) * 7919 % model.get_input_embeddings().weight.shape[0]  # spread out
    places = torch.arange(total, device=device)
    return PackedBatch(
        input_ids=ids,
        position_ids=torch.cat([torch.arange(length, device=device) for length in lengths]),
        cu_seqlens=cumulative(lengths, device),
        score_positions=places,
        target_ids=ids,
        completion_cu_seqlens=cumulative(lengths, device),
        completion_positions=places,
        engine_logprobs=torch.zeros(total, device=device),
        rewards=torch.zeros(2, 1, device=device),
        valid=torch.ones(2, 1, dtype=torch.bool, device=device),
        lengths=lengths,
    )


@torch.no_grad()
def choose_layout(
    model: PreTrainedModel,
    probe: PackedBatch,
    dtype: torch.dtype = torch.float32,
    *,
    tolerance: float = 1e-3,
    layouts: Sequence[str] = ("packed", "padded"),
    max_tokens: int | None = None,
) -> tuple[str, str]:
    """("packed" | "padded", reason): the first of `layouts` that agrees with separate forwards on `probe`.

    probe: a small batch of sequences of different lengths. The tolerance is relative to the largest hidden value.
    max_tokens: of the longest sequence that will be scored (None: the model's context). The packed layout has to agree
    beyond every window in which such a sequence would not fit, too, since a model may keep one in its mask only.
    dtype: that of the run's matrix products; in half precision, whose attention may be another one, the layout has to
    agree under autocast too (HALF_TOLERANCE). Raises RuntimeError when none agrees: such a model would be mis-scored.
    """
    register_packed_attention()
    checks: list[tuple[Callable[[], Any], PackedBatch, float]] = [(nullcontext, probe, tolerance)]
    if dtype != torch.float32:
        checks.append((lambda: torch.autocast(probe.input_ids.device.type, dtype=dtype), probe, HALF_TOLERANCE))
    windows = _windows_within(model.config, max_tokens)
    reasons = []
    for layout in layouts:
        errors = []
        beyond = windows if layout == "packed" else []  # padded rows keep the model's own mask
        if beyond and max(beyond) >= LONGEST_PROBE:
            reasons.append(f"packed cannot be tried beyond the window of {max(beyond)} tokens")
            continue
        long = [(nullcontext, long_probe(model, max(beyond)), tolerance)] if beyond else []
        for context, batch, bound in checks + long:
            try:
                with context():
                    errors.append(_difference(model, batch, layout))
            except (RuntimeError, TypeError, ValueError, KeyError, AttributeError) as failure:
                reasons.append(f"{layout} does not work ({str(failure).splitlines()[0][:120]})")
                break
            if errors[-1] > bound or math.isnan(errors[-1]):
                reasons.append(f"{layout} differs from separate forwards by {errors[-1]:.1e}")
                break
        else:
            found = f"{layout} agrees with separate forwards to {errors[0]:.1e}"
            found += f", in {str(dtype).removeprefix('torch.')} to {errors[1]:.1e}" if dtype != torch.float32 else ""
            found += f", beyond the window of {max(beyond)} tokens to {errors[-1]:.1e}" if beyond else ""
            return layout, "; ".join([*reasons, found])
    raise RuntimeError("no way of batching agrees with one-at-a-time forwards (" + "; ".join(reasons) + ")")


def _difference(model: PreTrainedModel, batch: PackedBatch, layout: str) -> float:
    """Largest difference of the layout's hidden states from those of separate forwards, relative to the largest."""
    rows = batch.input_ids.split([length for length in batch.lengths if length])
    backbone = backbone_of(model)
    states = [backbone(input_ids=row[None], use_cache=False).last_hidden_state[0] for row in rows]
    separate = torch.cat(states).index_select(0, batch.score_positions)
    with scoring(model, layout):
        return float((hidden_states(model, batch, layout) - separate).abs().max() / separate.abs().max())
