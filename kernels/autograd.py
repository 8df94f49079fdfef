"""The operators as autograd sees them: scores now, gradients later.

`Call` is one checked operator call. `ScoreFunction` keeps only row statistics for the backward, which computes the
logits again. (Where the loss's coefficients are known, loss.py takes the gradient while the logits are still there.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import wraps

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .chunked import Chunks, Rows, chunk_ranges
from .epilogue import RowStats
from .linear import LinearSource, LogitOptions, LogitsSource, Side
from .listed import as_record
from .types import TokenCoefficients, TokenScores

GAP_ROWS = 64
"""Runs of rows with a gradient are taken together if fewer rows than this lie between them."""


@dataclass(frozen=True, slots=True)
class Call:
    """One operator call after the border checks. n of the N rows are scored: those of `row_ids`, or all."""

    num_rows: int  # N
    row_ids: Tensor | None  # i64 [n]
    rows: Rows  # of the n rows
    options: LogitOptions  # of the n rows
    reference: Side | Tensor | None  # hidden states and head, or logits
    outputs: frozenset[str]
    chunk_rows: int
    dtype: torch.dtype
    use_triton: bool
    check_values: bool
    inplace: bool = False  # logits in: the gradient overwrites the logits

    def source(self, policy: Side | Tensor) -> LinearSource | LogitsSource:
        """The logits of the scored rows."""
        chunk_rows = max(1, min(self.chunk_rows, len(self.rows)))
        if self.use_triton:
            from .triton_chunks import triton_source

            return triton_source(policy, self.reference, self.row_ids, self.options, chunk_rows)
        kind = LinearSource if isinstance(policy, Side) else LogitsSource
        return kind(policy, self.reference, self.row_ids, self.options, chunk_rows, self.dtype)

    def chunks(self, source: LinearSource | LogitsSource, stats: RowStats, support_stats: RowStats | None) -> Chunks:
        """The passes over a source."""
        if self.use_triton:
            from .triton_chunks import TritonChunks

            return TritonChunks(source, self.rows, stats, support_stats)
        return Chunks(source, self.rows, stats, support_stats)

    def score_without_logits(self, policy: Side | Tensor, stats: RowStats) -> bool:
        """Fills `stats` by the kernel that stores no logits, if it serves this call; returns whether it does."""
        if not (self.use_triton and isinstance(policy, Side) and self.rows.support is None):
            return False
        from . import triton_linear

        if not triton_linear.fits(policy, self.reference):
            return False
        triton_linear.linear_score(policy, self.reference, self.rows.target_ids, self.row_ids, self.options, stats)
        return True

    @property
    def keeps_last_chunk(self) -> bool:
        """Whether the last chunk's logits wait for the backward. Not on a GPU, whose chunks are large; not where the
        backward writes over the caller's logits, rows without a gradient included.
        """
        return not self.use_triton and self.rows.target_ids.device.type == "cpu" and not self.inplace

    def empty_stats(self) -> tuple[RowStats, RowStats | None]:
        """Room for the statistics of all scored rows: full vocabulary, and support."""
        dtype = torch.float32 if self.use_triton else torch.float64
        new = [RowStats.empty(len(self.rows), self.rows.target_ids, dtype) for _ in range(2)]
        return new[0], None if self.rows.support is None else new[1]

    def select(self, index: Tensor) -> Call:
        """The same call for some of its scored rows, i64 [m] in any order."""
        rows, options = self.rows, self.options
        support = None if rows.support is None else rows.support.select(index)
        if isinstance(options.temperature, Tensor):
            options = replace(options, temperature=options.temperature[index])
        return replace(
            self,
            row_ids=index if self.row_ids is None else self.row_ids[index],
            rows=replace(rows, target_ids=rows.target_ids[index], support=support),
            options=options,
        )

    def available(self) -> set[str]:
        """The names of the scores that this call computes."""
        names = {"policy_logprobs", *(self.outputs if self.reference is not None else self.outputs - {"kl"})}
        if self.rows.support is not None:
            names |= {"policy_logprobs_support"} | ({"kl_support"} if "kl" in names else set())
        return names

    def scores(self, stats: RowStats, support_stats: RowStats | None) -> TokenScores:
        """The statistics of the n scored rows as scores of all N rows, zero in the others."""
        has_ref = self.reference is not None

        def expand(values: Tensor) -> Tensor:
            values = values.to(self.dtype, copy=True)
            if self.row_ids is None:
                return values
            return values.new_zeros(self.num_rows).index_copy_(0, self.row_ids, values)

        want_kl = has_ref and "kl" in self.outputs
        on_support = support_stats is not None
        return TokenScores(
            policy_logprobs=expand(stats.logprobs),
            ref_logprobs=expand(stats.ref_logprobs) if has_ref else None,
            entropy=expand(stats.entropy()) if "entropy" in self.outputs else None,
            kl=expand(stats.kl()) if want_kl else None,
            policy_logprobs_support=expand(support_stats.logprobs) if on_support else None,
            ref_logprobs_support=expand(support_stats.ref_logprobs) if on_support and has_ref else None,
            kl_support=expand(support_stats.kl()) if on_support and want_kl else None,
        )


def flat_scores(scores: TokenScores) -> tuple[Tensor | None, ...]:
    """The seven fields in order."""
    return tuple(getattr(scores, name) for name in TokenScores.__slots__)


def collect(source: LinearSource | LogitsSource, needs_grad: tuple[bool, ...], inplace: bool = False) -> None:
    """Asks the source for the gradients of the policy inputs that need one."""
    if isinstance(source, LinearSource):
        source.collect_gradients(*needs_grad[:3])
    else:
        source.collect_gradients(inplace)


def gradients_of(source: LinearSource | LogitsSource, inputs: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The collected gradients in the dtypes of (hidden, weight, bias) or (logits,)."""
    if hasattr(source, "grad_logits"):
        return (source.grad_logits,)
    if source.needs_weight_grad and source.grad_weight is None:  # no row had a gradient
        source.grad_weight = torch.zeros_like(source.policy.weight)
    grads = (source.grad_hidden, source.grad_weight, source.grad_bias)
    return tuple(None if g is None else g.to(x.dtype) for g, x in zip(grads, inputs, strict=True))


def policy_of(inputs: tuple[Tensor | None, ...]) -> Side | Tensor:
    """The policy inputs of a Function (hidden, weight, bias; or logits) as a source takes them."""
    return Side(*inputs) if len(inputs) == 3 else inputs[0]


def without_autocast(function: Callable) -> Callable:
    """Runs a Function's forward or backward with autocast off: the head computes float32 logits in any context."""

    @wraps(function)
    def run(ctx, *args):
        with ExitStack() as stack:
            for device_type in ("cpu", "cuda"):
                stack.enter_context(torch.autocast(device_type, enabled=False))
            return function(ctx, *args)

    return run


class ScoreFunction(torch.autograd.Function):
    """(Call, *policy inputs) -> the seven fields of TokenScores."""

    @staticmethod
    @without_autocast
    def forward(ctx, call: Call, *inputs: Tensor | None):
        """inputs: hidden, weight, bias; or logits."""
        stats, support_stats = call.empty_stats()
        ctx.kept = None
        if not call.score_without_logits(policy_of(inputs), stats):
            chunks = call.chunks(call.source(policy_of(inputs)), stats, support_stats)
            lists = []
            for lo, hi in chunk_ranges(len(call.rows), call.chunk_rows):
                last = Kept(chunks, lo, *chunks.score(lo, hi))
                lists.append(chunks.listed)
            if call.rows.support is not None and call.rows.support.is_recomputed and None not in lists:
                # the backward need not find these ids again
                call = replace(call, rows=replace(call.rows, support=as_record(lists, call.rows.target_ids)))
                chunks.rows = call.rows
            if lists and call.keeps_last_chunk and any(ctx.needs_input_grad[1:]):
                ctx.kept = last
        ctx.save_for_backward(*inputs)
        ctx.call, ctx.stats, ctx.support_stats = call, stats, support_stats
        ctx.set_materialize_grads(False)
        scores = call.scores(stats, support_stats)
        ctx.mark_non_differentiable(*(x for x in (scores.ref_logprobs, scores.ref_logprobs_support) if x is not None))
        return flat_scores(scores)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, *grads: Tensor | None):
        """The gradient of the chunk that is still there; then the logits of the other rows that matter once more."""
        inputs = ctx.saved_tensors
        grad = TokenScores(*grads)
        coefficients = TokenCoefficients(
            grad.policy_logprobs, grad.entropy, grad.kl, grad.policy_logprobs_support, grad.kl_support
        )
        call, stats, support_stats = ctx.call, ctx.stats, ctx.support_stats
        if call.row_ids is not None:
            coefficients = coefficients.select(call.row_ids)
        active = active_rows(coefficients, len(call.rows))
        kept, ctx.kept = ctx.kept, None  # the gradient overwrites it: a second backward has to compute it again
        if kept is not None:
            collect(kept.chunks.source, ctx.needs_input_grad[1:])
            kept.gradient(coefficients)
            active = active[active < kept.first]
            if not len(active):
                return None, *gradients_of(kept.chunks.source, inputs)
        # a recomputed support must see the very logits of the forward, whatever the BLAS does with other row counts
        if len(active) < len(call.rows) and not (call.rows.support is not None and call.rows.support.is_recomputed):
            call, stats, coefficients = call.select(active), stats[active], coefficients.select(active)
            support_stats = None if support_stats is None else support_stats[active]

        source = call.source(policy_of(inputs))
        if kept is None:
            collect(source, ctx.needs_input_grad[1:], call.inplace)
        else:
            source.take_over(kept.chunks.source)
        chunks = call.chunks(source, stats, support_stats)
        need_gap = coefficients.kl is not None or coefficients.kl_support is not None
        for lo, hi in chunk_ranges(len(call.rows), call.chunk_rows):
            z, gap = chunks.reload(lo, hi, need_gap)
            chunks.gradient_(lo, hi, z, gap, coefficients.select(slice(lo, hi)))
        return None, *gradients_of(source, inputs)


@dataclass(frozen=True, slots=True)
class Kept:
    """The last chunk of a forward as Chunks.score left it: its rows need no second product in the backward."""

    chunks: Chunks
    first: int
    z: Tensor
    gap: Tensor | None

    def gradient(self, coefficients: TokenCoefficients) -> None:
        """Takes the gradient of its rows; coefficients: of all rows of the call."""
        coefficients = coefficients.select(slice(self.first, self.first + len(self.z)))
        for i, j in active_runs(coefficients, len(self.z)):
            gap = None if self.gap is None else self.gap[i:j]
            first = self.first + i
            self.chunks.gradient_(first, self.first + j, self.z[i:j], gap, coefficients.select(slice(i, j)))


def active_rows(coefficients: TokenCoefficients, num_rows: int) -> Tensor:
    """Indices of the rows with any coefficient that is not zero (NaN counts as not zero)."""
    given = [c for c in coefficients.values() if c is not None]
    if not given:
        return torch.empty(0, dtype=torch.int64)
    active = torch.zeros(num_rows, dtype=torch.bool, device=given[0].device)
    for c in given:
        active |= c != 0
    return active.nonzero()[:, 0]


def active_runs(coefficients: TokenCoefficients, num_rows: int) -> Iterator[tuple[int, int]]:
    """Ranges that together hold all rows with a coefficient, without the long stretches that have none."""
    active = active_rows(coefficients, num_rows).tolist()
    if not active:
        return
    start = end = active[0]
    for row in active:
        if row - end > GAP_ROWS:
            yield start, end + 1
            start = row
        end = row
    yield start, end + 1
