"""Backbone: packed tokens through a transformer, without its head and without cross-talk between sequences.

In: a Hugging Face causal language model and a PackedBatch. Out: hidden states [U, H] that predict the scored tokens,
one row for tokens that are the same (PackedBatch.distinct).

"packed": the M tokens are one row, so that no matrix product is spent on padding; only attention (attention.py) knows
where sequences begin.
"shared": such a row in which what sequences begin with alike stands once (prefixes.py), and the last token of a
sequence, which predicts nothing that is scored, is left out: at most P + sum of (T_i - 1) tokens for the K samples of a
prompt instead of K * P + sum of T_i.
"padded": right-padded rows through the model's own attention, for architectures that do not take an attention
implementation from outside. `choose_layout` compares with one-at-a-time forwards before the first step and decides;
where the configuration names a window, on sequences that are longer than it, too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastkl.errors import UserError
from fastkl.scoring.attention import ATTENTION, branches_of, register_packed_attention, sequences_of
from fastkl.scoring.models import backbone_of, context_length, text_config
from fastkl.scoring.pack import cumulative
from fastkl.scoring.prefixes import tree_of
from fastkl.types import PackedBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCE = 1e-3
"""How far layouts may differ in float32, relative to the largest hidden value."""

HALF_TOLERANCE = 0.05
"""And in half precision, where they round in a different order."""

LONGEST_PROBE = 12_288
"""Tokens that the packed layout is tried on at most; beyond, a model with windows is scored in padded rows."""

WINDOW = "window|chunk|block|local|span|index_topk"
NO_WINDOW = "num|multiple|pattern|layer|expert|freq|theta|ind(ices|exes)|head|repeat|per_|group|kernel|dilation|_ids?$"
"""Parts of the names of a configuration's numbers: what makes one a window, and what makes it something else."""


@contextmanager
def scoring(model: PreTrainedModel, layout: str) -> Iterator[None]:
    """Prepares a model for `hidden_states` and for the backward through it, and gives it back as it was.

    Under gradient checkpointing the backward runs layers again: they must find the same attention as in the forward,
    and transformers recomputes in training mode only (dropout is off, so nothing else changes).
    """
    own_attention, was_training = model.config._attn_implementation, model.training
    if layout in ("packed", "shared"):
        model.config._attn_implementation = ATTENTION  # layers that take an attention from outside look here each call
    model.train(getattr(model, "is_gradient_checkpointing", False))
    try:
        yield
    finally:
        model.config._attn_implementation = own_attention
        model.train(was_training)


def packed_hidden_states(model: PreTrainedModel, batch: PackedBatch) -> torch.Tensor:
    """The backbone over one packed row; returns the hidden states [U, H] that predict the distinct scored tokens."""
    hidden = backbone_of(model)(
        input_ids=batch.input_ids[None],
        position_ids=batch.position_ids[None],
        use_cache=False,
        packed_rows=sequences_of(batch.lengths, batch.input_ids.device),
    ).last_hidden_state[0]
    return hidden.index_select(0, batch.state_positions)


def shared_hidden_states(model: PreTrainedModel, batch: PackedBatch) -> torch.Tensor:
    """The backbone over one row in which no beginning stands twice; returns [U, H] as above."""
    tree = batch.tree
    assert tree is not None, "a batch whose sequences were packed for it"
    hidden = backbone_of(model)(
        input_ids=batch.input_ids[tree.source][None],
        position_ids=batch.position_ids[tree.source][None],
        use_cache=False,
        packed_rows=branches_of(tree, batch.input_ids.device),
    ).last_hidden_state[0]
    return hidden.index_select(0, tree.place[batch.state_positions])


def padded_hidden_states(model: PreTrainedModel, batch: PackedBatch, rows_at_once: int = 32) -> torch.Tensor:
    """The backbone over right-padded rows, sorted by length, `rows_at_once` at a time; returns [U, H] as above.

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
    return torch.cat(hidden).index_select(0, place[batch.state_positions])


def hidden_states(model: PreTrainedModel, batch: PackedBatch, layout: str) -> torch.Tensor:
    """Hidden states [U, H] that predict the distinct scored tokens, in the layout that `scoring` was entered with.
    Differentiable."""
    return LAYOUTS[layout](model, batch)


LAYOUTS: dict[str, Callable[[PreTrainedModel, PackedBatch], torch.Tensor]] = {
    "shared": shared_hidden_states,
    "packed": packed_hidden_states,
    "padded": padded_hidden_states,
}
"""The ways to batch, the fastest first."""


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
    """A sequence that is a quarter longer than the window, behind a short one."""
    longest = min(context_length(model.config) or LONGEST_PROBE, LONGEST_PROBE)
    return probe_of(model, (6, min(window + window // 4 + 16, longest)))


def probe_of(model: PreTrainedModel, lengths: tuple[int, ...]) -> PackedBatch:
    """Sequences of so many tokens; all tokens but their last are scored."""
    device, total = model.device, sum(lengths)
    ids = torch.arange(total, device=device) * 7919 % model.get_input_embeddings().weight.shape[0]  # spread out
    positions = torch.cat([torch.arange(length, device=device) for length in lengths])
    scored = torch.ones(total, dtype=torch.bool, device=device)
    scored[torch.tensor(lengths).cumsum(0) - 1] = False
    places = scored.nonzero().flatten()
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()[:-1]]
    tree = tree_of([tuple(sequence.tolist()) for sequence in ids.cpu().split(lengths)], starts, total)
    return PackedBatch(
        input_ids=ids,
        position_ids=positions,
        cu_seqlens=cumulative(lengths, device),
        score_positions=places,
        target_ids=ids[places + 1],
        completion_cu_seqlens=cumulative([length - 1 for length in lengths], device),
        completion_positions=positions[places],
        engine_logprobs=torch.zeros(len(places), device=device),
        rewards=torch.zeros(len(lengths), 1, device=device),
        valid=torch.ones(len(lengths), 1, dtype=torch.bool, device=device),
        lengths=lengths,
        tree=tree.to(device),
    )


@torch.no_grad()
def choose_layout(
    model: PreTrainedModel,
    probe: PackedBatch,
    dtype: torch.dtype = torch.float32,
    *,
    tolerance: float = TOLERANCE,
    layouts: Sequence[str] = ("shared", "packed", "padded"),
    max_tokens: int | None = None,
) -> tuple[str, str]:
    """("shared" | "packed" | "padded", reason): the first of `layouts` that agrees with separate forwards on `probe`.

    probe: a small batch of sequences of different lengths. The tolerance is relative to the largest hidden value.
    max_tokens: of the longest sequence that will be scored (None: the model's context). Packed tokens have to agree
    beyond every window in which such a sequence would not fit, too, since a model may keep one in its mask only.
    dtype: that of the run's matrix products; in half precision, whose attention may be another one, the layout has to
    agree under autocast too (HALF_TOLERANCE). Raises UserError when none agrees: such a model would be mis-scored.
    """
    register_packed_attention()
    checks: list[tuple[Callable[[], Any], PackedBatch, float]] = [(nullcontext, probe, tolerance)]
    if dtype != torch.float32:
        checks.append((lambda: torch.autocast(probe.input_ids.device.type, dtype=dtype), probe, HALF_TOLERANCE))
    windows = _windows_within(model.config, max_tokens)
    reasons = []
    for layout in layouts:
        errors = []
        beyond = windows if layout != "padded" else []  # padded rows keep the model's own mask
        if beyond and max(beyond) >= LONGEST_PROBE:
            reasons.append(f"{layout} cannot be tried beyond the window of {max(beyond)} tokens")
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
    raise UserError(
        f"model: {type(model).__name__} cannot be scored in batches, since none agrees with one-at-a-time forwards ("
        + "; ".join(reasons)
        + ")."
    )


def _difference(model: PreTrainedModel, batch: PackedBatch, layout: str) -> float:
    """Largest difference of the layout's hidden states from those of separate forwards, relative to the largest."""
    rows = batch.input_ids.split([length for length in batch.lengths if length])
    backbone = backbone_of(model)
    states = [backbone(input_ids=row[None], use_cache=False).last_hidden_state[0] for row in rows]
    separate = torch.cat(states).index_select(0, batch.state_positions)
    with scoring(model, layout):
        return float((hidden_states(model, batch, layout) - separate).abs().max() / separate.abs().max())
