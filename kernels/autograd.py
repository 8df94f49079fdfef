"""Scores as autograd sees them: scores now, gradients later.

`ScoreFunction` keeps only row statistics for the backward, which computes the logits again. (Where the loss's
coefficients are known, loss.py takes the gradient while the logits are still there.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .active import active_rows
from .call import Call
from .passes import Passes, Side, chunk_ranges
from .support import as_record
from .types import TokenCoefficients, TokenScores

Inputs = tuple[Tensor | None, ...]
"""The policy inputs of a Function: (hidden, weight, bias) or (logits,)."""


def policy_of(inputs: Sequence[Any]) -> Side | Tensor:
    """The policy inputs of a Function as a source takes them."""
    return Side(*inputs) if len(inputs) == 3 else inputs[0]


@contextmanager
def without_autocast() -> Iterator[None]:
    """Decorates a Function's forward and backward: the head computes float32 logits in any context."""
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


class ScoreFunction(torch.autograd.Function):
    """(Call, *policy inputs) -> the fields of TokenScores."""

    @staticmethod
    @without_autocast()
    def forward(ctx: Any, call: Call, *inputs: Tensor | None) -> Inputs:
        """inputs: hidden, weight, bias; or logits."""
        stats, support_stats = call.empty_stats()
        ctx.kept = None
        if not call.score_without_logits(policy_of(inputs), stats):
            passes = call.passes(call.source(policy_of(inputs)), stats, support_stats)
            allowed, last = [], None
            for lo, hi in chunk_ranges(len(call.rows), call.chunk_rows):
                last = Chunk(passes, lo, *passes.score(lo, hi))
                if (pairs := passes.allowed()) is not None:
                    allowed.append(pairs)
            if allowed:  # then the backward need not find these ids again
                call = replace(call, rows=replace(call.rows, support=as_record(allowed, call.rows.target_ids)))
                passes.rows = call.rows
            if call.keeps_last_chunk and any(ctx.needs_input_grad[1:]):
                ctx.kept = last
        ctx.save_for_backward(*inputs)
        ctx.call, ctx.stats, ctx.support_stats = call, stats, support_stats
        ctx.set_materialize_grads(False)
        scores = call.scores(stats, support_stats)
        constants = scores.ref_logprobs, scores.ref_logprobs_support, scores.outside_support
        ctx.mark_non_differentiable(*(x for x in constants if x is not None))
        return scores.values()

    @staticmethod
    @once_differentiable
    @without_autocast()
    def backward(ctx: Any, *grads: Any) -> Inputs:
        """First the gradient of the chunk whose logits are kept; then the logits of the other rows with a gradient are
        computed again."""
        inputs = ctx.saved_tensors
        grad = TokenScores(*grads)
        coefficients = TokenCoefficients(**{name: getattr(grad, name) for name in TokenCoefficients.__slots__})
        call, stats, support_stats = ctx.call, ctx.stats, ctx.support_stats
        if call.row_ids is not None:
            coefficients = coefficients.select(call.row_ids)
        coefficients = call.effective(coefficients)
        active = active_rows(coefficients, len(call.rows))
        kept, ctx.kept = ctx.kept, None  # the gradient overwrites it: a second backward has to compute it again
        if kept is not None:
            kept.passes.source.collect_gradients(ctx.needs_input_grad[1:], inplace=False)
            kept.gradient(coefficients.select(slice(kept.first, kept.first + len(kept.z))))
            active = active[active < kept.first]
            if not len(active):
                return None, *call.finished(kept.passes.source.gradients(inputs))
        # a recomputed support needs exactly the forward's logits, which a BLAS may not give for another number of rows
        if len(active) < len(call.rows) and not (call.rows.support is not None and call.rows.support.is_recomputed):
            call, stats, coefficients = call.select(active), stats[active], coefficients.select(active)
            support_stats = None if support_stats is None else support_stats[active]

        if kept is None:
            needed = ctx.needs_input_grad[1:]
            gradients = call.gradients_without_logits(policy_of(inputs), stats, coefficients, needed)
            if gradients is not None:
                return None, *call.finished(gradients)
            source = call.source(policy_of(inputs))
            source.collect_gradients(ctx.needs_input_grad[1:], call.inplace)
        else:
            source = copy(kept.passes.source)  # with its buffers and what it has collected, for the other rows
            source.row_ids, source.options = call.row_ids, call.options
        passes = call.passes(source, stats, support_stats)
        for lo, hi in chunk_ranges(len(call.rows), call.chunk_rows):
            z, gap = passes.reload(lo, hi, coefficients.need_reference)
            passes.gradient_(lo, hi, z, gap, coefficients.select(slice(lo, hi)))
        return None, *call.finished(source.gradients(inputs))


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows first, first + 1, ... as Passes.score left them: their gradient needs no second product."""

    passes: Passes
    first: int
    z: Tensor
    gap: Tensor | None

    def gradient(self, coefficients: TokenCoefficients) -> None:
        """Takes the gradient of those of its rows that have one; coefficients: of the chunk's rows."""
        self.passes.gradient_of_active_(self.first, self.z, self.gap, coefficients)
