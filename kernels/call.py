"""One operator call after the border checks: which rows, which options, which implementation, how large a chunk."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import checks
from .checks import check_heads, check_logits, check_options, check_rows, check_support, check_vocab, check_vocabs
from .compose import whole_heads
from .cpu import sources as cpu
from .cpu.passes import CpuPasses
from .dispatch import uses_triton
from .errors import UserError
from .passes import LogitOptions, Passes, Rows, Side, Source, chunk_ranges
from .stats import RowStats
from .support import switched_on
from .types import DIVERGENCES, IGNORED_ID, OUTPUTS, Head, Support, TokenCoefficients, TokenScores
from .vocab_group import Facts, Share, open_share

CHUNK_BYTES = {"cpu": 48 << 20, "cuda": 2 << 30}
"""Default size of one chunk's policy and reference logits together. On a GPU chunks must be long, or accumulating the
head's gradient costs as much as computing it. On a CPU each of the two buffers should stay below 32 MiB: glibc returns
larger ones to the system after every call, and touching fresh pages costs as much as the arithmetic on them."""

LONG_CHUNK_BYTES = 128 << 20
"""The same on a CPU where longer chunks save more than that: where the backward finds the last chunk still there, and
where the head's gradient, which every chunk reads and writes, is larger than CACHED_BYTES."""

CACHED_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked of an operator beside the logits; token_scores says what each field means."""

    target_ids: Tensor
    mask: Tensor | None
    temperature: float | Tensor
    support: Support | None
    valid_vocab: int | None
    logits_dtype: str
    gradient_dtype: str
    outputs: Collection[str]
    chunk_tokens: int | None
    check_values: bool | None
    vocab_group: Any = None


@dataclass(frozen=True, slots=True)
class Call:
    """One operator call after the border checks. n of the N rows are scored: those of `row_ids`, or all."""

    num_rows: int  # N
    row_ids: Tensor | None  # i64 [n]
    rows: Rows  # of the n rows
    options: LogitOptions  # of the n rows
    reference: Side | Tensor | None  # hidden states and head, or logits
    chunk_rows: int
    dtype: torch.dtype
    use_triton: bool
    check_values: bool
    inplace: bool = False  # logits in: the gradient overwrites the logits
    chunk_given: bool = False  # the caller has said how many rows' logits there may be at a time

    def source(self, policy: Side | Tensor) -> Source:
        """The logits of the scored rows."""
        chunk_rows = max(1, min(self.chunk_rows, len(self.rows)))
        sources: Any = cpu
        if self.use_triton:
            from .gpu import sources as gpu

            sources = gpu
        kind = sources.HeadSource if isinstance(policy, Side) else sources.LogitsSource
        return kind(policy, self.reference, self.row_ids, self.options, chunk_rows, self.dtype)

    def passes(self, source: Any, stats: RowStats, support_stats: RowStats | None) -> Passes:
        """The passes over a source of this call."""
        if self.use_triton:
            from .gpu.passes import GpuPasses

            return GpuPasses(source, self.rows, stats, support_stats)
        return CpuPasses(source, self.rows, stats, support_stats)

    def score_without_logits(self, policy: Side | Tensor, stats: RowStats) -> bool:
        """Fills `stats` by the kernel that stores no logits, if it serves this call; returns whether it does."""
        sides = self._multiplied_heads(policy)
        if sides is None or self.rows.support is not None or self.rows.divergences:
            return False
        from .gpu import heads

        if self.rows.kl and heads.blas_is_faster(*sides):
            return False
        heads.linear_score(*sides, self.rows.target_ids, self.row_ids, self.options, stats, kl=self.rows.kl)
        if self.rows.share is not None:  # another rank's heads may not fit: it merges chunk by chunk
            for lo, hi in chunk_ranges(len(self.rows), self.chunk_rows):
                self.rows.share.merge_(stats[lo:hi], lo, hi)
        return True

    def gradients_without_logits(
        self, policy: Side | Tensor, stats: RowStats, coefficients: TokenCoefficients, needed: Sequence[bool]
    ) -> tuple[Tensor | None, ...] | None:
        """The gradients of the policy's inputs by the kernel that stores no logits, from the statistics over the full
        vocabulary; None if it does not serve this call."""
        sides = self._multiplied_heads(policy)
        of_divergences = any(c is not None for c in coefficients.of_divergences)
        if sides is None or coefficients.need_support or of_divergences:
            return None
        from .gpu import slices

        ids, row_ids, share = self.rows.target_ids, self.row_ids, self.rows.share
        if share is not None:
            ids = share.own(ids)
        return slices.linear_gradient(*sides, ids, row_ids, self.options, stats, coefficients, needed)

    def _multiplied_heads(self, policy: Side | Tensor) -> tuple[Side, Side | None] | None:
        """Policy and reference, if there are kernels that multiply these heads themselves."""
        if not (self.use_triton and isinstance(policy, Side)):
            return None
        assert not isinstance(self.reference, Tensor)
        from .gpu import heads

        sides = policy, self.reference
        return sides if heads.fits(*sides, self.row_ids is not None) else None

    def finished(self, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """The gradients of the policy's inputs, from those of this process's ids."""
        return gradients if self.rows.share is None else self.rows.share.with_hidden_summed(gradients)

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
        options = self.options
        if isinstance(options.temperature, Tensor):
            options = replace(options, temperature=options.temperature[index])
        row_ids = index if self.row_ids is None else self.row_ids[index]
        return replace(self, row_ids=row_ids, rows=self.rows.select(index), options=options)

    def effective(self, coefficients: TokenCoefficients) -> TokenCoefficients:
        """The factors of the n scored rows, zero where a row has no target."""
        if self.rows.untargeted is None:
            return coefficients
        targeted = self.rows.untargeted.isinf()
        return TokenCoefficients(*(None if c is None else torch.where(targeted, c, 0) for c in coefficients.values()))

    def available(self) -> set[str]:
        """The names of the scores that this call computes."""
        kl = ("kl",) if self.rows.kl and self.reference is not None else ()
        twins = {"policy_logprobs", *kl, *self.rows.divergences}
        on_support = {f"{name}_support" for name in twins} if self.rows.support is not None else set()
        return twins | on_support | ({"entropy"} if self.rows.entropy else set())

    def scores(self, stats: RowStats, support_stats: RowStats | None) -> TokenScores:
        """The statistics of the n scored rows as scores of all N rows, zero in the others."""
        has_ref, untargeted = self.reference is not None, self.rows.untargeted

        def expand(values: Tensor) -> Tensor:
            values = values.to(self.dtype, copy=True)
            if untargeted is not None:
                values = torch.where(untargeted.isinf(), values, untargeted.to(self.dtype))
            if self.row_ids is None:
                return values
            return values.new_zeros(self.num_rows).index_copy_(0, self.row_ids, values)

        want_kl = has_ref and self.rows.kl
        divergences = self.rows.divergences
        on = support_stats
        return TokenScores(
            policy_logprobs=expand(stats.logprobs),
            ref_logprobs=expand(stats.ref_logprobs) if has_ref else None,
            entropy=expand(stats.entropy()) if self.rows.entropy else None,
            kl=expand(stats.kl()) if want_kl else None,
            policy_logprobs_support=expand(on.logprobs) if on is not None else None,
            ref_logprobs_support=expand(on.ref_logprobs) if on is not None and has_ref else None,
            kl_support=expand(on.kl()) if on is not None and want_kl else None,
            outside_support=expand(on.outside) if on is not None else None,
            **{name: expand(getattr(stats, name)) for name in divergences},
            **{f"{name}_support": expand(getattr(on, name)) for name in divergences if on is not None},
        )


def logits_call(
    request: Request, policy_logits: Tensor, ref_logits: Tensor | None, inplace: bool
) -> tuple[Call, Tensor]:
    """The checked call for given logits, and the policy's cut to the vocabulary that exists."""
    share = None
    if request.vocab_group is None:
        check_logits(policy_logits, ref_logits)
        valid = check_vocab(policy_logits.shape[1], request.valid_vocab)
    else:
        share = open_share(
            request.vocab_group, _device_of(policy_logits), lambda: _facts_of_logits(request, policy_logits, ref_logits)
        )
        valid = share.num_ids
    call = _new_call(request, policy_logits, valid, LogitOptions(), share)
    reference = None if ref_logits is None else ref_logits.detach()[:, :valid]
    if valid < policy_logits.shape[1]:
        policy_logits = policy_logits[:, :valid]
    if call.use_triton and request.chunk_tokens is None:
        from .gpu.supports import needs_masks

        if not needs_masks(call.rows.support, valid):  # the kernels read logits in place: no buffer, one launch
            call = replace(call, chunk_rows=max(1, call.num_rows))
    return _with_reference(replace(call, inplace=inplace), reference), policy_logits


def head_call(
    request: Request,
    policy_hidden: Tensor,
    policy_head: Head,
    ref_hidden: Tensor | None,
    ref_head: Head | None,
    keeps_last_chunk: bool,
) -> tuple[Call, tuple[Tensor | None, ...]]:
    """The checked call, and the policy's inputs (hidden, weight, bias) cut to the vocabulary that exists."""
    dtypes = {"logits_dtype": request.logits_dtype, "gradient_dtype": request.gradient_dtype}
    share = None
    if request.vocab_group is None:
        policy_head, ref_head = whole_heads(policy_head, ref_head)
        check_heads(policy_hidden, policy_head, ref_hidden, ref_head)
        if ref_head is not None:
            check_vocabs(len(policy_head.weight), len(ref_head.weight), request.valid_vocab)
        check_options(policy_head, **dtypes)
        valid = check_vocab(len(policy_head.weight), request.valid_vocab)
    else:
        share = open_share(
            request.vocab_group, _device_of(policy_hidden),
            lambda: _facts_of_heads(request, policy_hidden, policy_head, ref_hidden, ref_head, dtypes),
        )  # fmt: skip
        valid = share.num_ids
    options = LogitOptions(request.temperature, policy_head.softcap, policy_head.logit_scale, *dtypes.values())
    call = _new_call(request, policy_hidden, valid, options, share)
    weight = policy_head.weight
    widest, head_size = (valid, weight.numel()) if share is None else (share.widest, share.widest * weight.shape[1])
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (policy_hidden, weight))
    if request.chunk_tokens is None and policy_hidden.is_cuda:
        biases = [None if head is None else head.bias for head in (policy_head, ref_head)]
        rounded = options.rounded_by_product(policy_hidden.dtype, *biases)
        num_bytes = (1 if ref_head is None else 2) * (2 if rounded else 4)
        call = replace(call, chunk_rows=_chunk_rows(CHUNK_BYTES["cuda"], widest * num_bytes, unit=128))
    keeps = keeps_last_chunk or weight.requires_grad and head_size * 4 > CACHED_BYTES
    if request.chunk_tokens is None and policy_hidden.device.type == "cpu" and needs_grad and keeps:
        call = replace(call, chunk_rows=_default_chunk_rows(policy_hidden, widest, call.dtype, LONG_CHUNK_BYTES))
    if ref_hidden is not None and ref_head is not None:
        ref_head = _cut(ref_head, valid)
    reference = None if ref_hidden is None or ref_head is None else Side(ref_hidden, ref_head.weight, ref_head.bias)
    call = _with_reference(call, reference)
    policy_head = _cut(policy_head, valid)
    return call, (policy_hidden, policy_head.weight, policy_head.bias)


def _with_reference(call: Call, reference: Side | Tensor | None) -> Call:
    """The same call with the reference's side; without one there is nothing to diverge from."""
    rows = call.rows if reference is not None else replace(call.rows, divergences=())
    return replace(call, reference=reference, rows=rows)


def _new_call(request: Request, policy: Tensor, vocab: int, options: LogitOptions, share: Share | None = None) -> Call:
    """The part of a call that does not depend on where the logits come from, without the reference.

    policy: hidden states or logits [N, *]. vocab: how many ids this process has, all or those of its share.
    """
    target_ids, mask, temperature, support = request.target_ids, request.mask, request.temperature, request.support
    check_rows(policy, target_ids, mask, temperature)
    if support is not None:
        check_support(support, policy)
        support = switched_on(support, vocab)
    if unknown := set(request.outputs) - {*OUTPUTS, *DIVERGENCES}:
        raise UserError(f"outputs has {sorted(unknown)}, expected some of {[*OUTPUTS, *DIVERGENCES]}.")
    chunk = request.chunk_tokens
    if chunk is not None and chunk < 1:
        raise UserError(f"chunk_tokens is {chunk}, expected at least 1, or None for a size that fits the cache.")
    widest = vocab if share is None else share.widest
    dtype = torch.float64 if policy.dtype == torch.float64 else torch.float32
    on_cpu = policy.device.type == "cpu"
    if isinstance(temperature, Tensor):
        temperature = temperature.detach().to(policy.device, dtype).expand(len(policy))
    call = Call(
        num_rows=len(policy),
        row_ids=None,
        rows=Rows(
            target_ids,
            support,
            entropy="entropy" in request.outputs,
            kl="kl" in request.outputs,
            divergences=tuple(name for name in DIVERGENCES if name in request.outputs),
        ),  # fmt: skip
        options=replace(options, temperature=temperature),
        reference=None,
        chunk_rows=chunk or _default_chunk_rows(policy, widest, dtype, CHUNK_BYTES.get(policy.device.type)),
        dtype=dtype,
        use_triton=dtype == torch.float32 and uses_triton(policy),
        check_values=on_cpu if request.check_values is None else request.check_values,
        chunk_given=chunk is not None,
    )
    mask = _scored_rows(mask, target_ids, call.check_values)
    if mask is not None and not (on_cpu and bool(mask.all())):
        call = call.select(mask.nonzero()[:, 0])
    all_ids = vocab if share is None else share.vocab
    if call.check_values:
        checks.check_values(all_ids, call.rows.target_ids, call.options.temperature, call.rows.support)
    else:
        call = replace(call, rows=_with_targets_inside(call.rows, all_ids))
    if share is None:
        return call
    share, places = share.of_targets(call.rows.target_ids)
    return replace(call, rows=replace(call.rows, target_ids=places, share=share))


def _facts_of_logits(request: Request, policy_logits: Tensor, ref_logits: Tensor | None) -> Facts:
    """Of the columns that this process has."""
    check_logits(policy_logits, ref_logits)
    num_ids = policy_logits.shape[1]
    sizes = num_ids, 0 if ref_logits is None else num_ids
    return _facts(request, policy_logits, LogitOptions(), sizes, 0, policy_logits)


def _facts_of_heads(
    request: Request,
    policy_hidden: Tensor,
    policy_head: Head,
    ref_hidden: Tensor | None,
    ref_head: Head | None,
    dtypes: dict[str, str],
) -> Facts:
    """Of the rows of the heads that this process has."""
    check_heads(policy_hidden, policy_head, ref_hidden, ref_head)
    check_options(policy_head, **dtypes)
    sizes = len(policy_head.weight), 0 if ref_head is None else len(ref_head.weight)
    options = LogitOptions(softcap=policy_head.softcap, logit_scale=policy_head.logit_scale)
    num_biases = sum(head is not None and head.bias is not None for head in (policy_head, ref_head))
    return _facts(request, policy_hidden, options, sizes, num_biases, policy_head.weight)


def _facts(
    request: Request,
    policy: Tensor,
    options: LogitOptions,
    sizes: tuple[int, int],
    num_biases: int,
    of_slice: Tensor,
) -> Facts:
    """policy: hidden states or logits [N, *]; sizes: how many ids policy and reference have here; of_slice: the weight
    or the logits."""
    target_ids, mask, temperature = request.target_ids, request.mask, request.temperature
    check_rows(policy, target_ids, mask, temperature)
    if request.support is not None:
        raise UserError(
            "support is given, but the ranks of vocab_group do not tell one another which ids a sampler allowed: leave "
            "the support out, or gather the head and leave vocab_group out."
        )
    if request.valid_vocab is not None and request.valid_vocab < 1:
        raise UserError(f"valid_vocab is {request.valid_vocab}, expected at least 1.")
    scored = target_ids != IGNORED_ID if mask is None else mask & (target_ids != IGNORED_ID)
    if isinstance(temperature, Tensor):
        temperature = torch.where(scored, temperature.detach(), 0.0).double().nan_to_num().sum()
    wanted = sum(1 << i for i, name in enumerate((*OUTPUTS, *DIVERGENCES)) if name in request.outputs)
    with_gradient = torch.is_grad_enabled()
    return Facts(
        *sizes, len(policy), scored.sum(), (target_ids * scored).sum(),
        temperature, options.softcap or 0.0, options.logit_scale,
        request.valid_vocab or 0, request.chunk_tokens or 0, wanted, policy.element_size(),
        num_biases, with_gradient and policy.requires_grad, with_gradient and of_slice.requires_grad,
    )  # fmt: skip


def _device_of(x: Any) -> torch.device:
    """Where the ranks exchange what they say of x."""
    return x.device if isinstance(x, Tensor) else torch.device("cpu")


def _scored_rows(mask: Tensor | None, target_ids: Tensor, may_look: bool) -> Tensor | None:
    """The mask without the rows whose target is IGNORED_ID; where there is no mask and values may not be looked at,
    those rows stay, and `_with_targets_inside` finds them.
    """
    if mask is None and not (may_look and bool((target_ids == IGNORED_ID).any())):
        return None
    targeted = target_ids != IGNORED_ID
    return targeted if mask is None else mask & targeted


def _with_targets_inside(rows: Rows, vocab: int) -> Rows:
    """The rows with id 0 in place of targets that are no ids, and what their scores are to be; found without waiting
    for the device.
    """
    ids = rows.target_ids
    inside = (ids >= 0) & (ids < vocab)
    scores = torch.where(ids == IGNORED_ID, 0.0, torch.nan)
    return replace(rows, target_ids=torch.where(inside, ids, 0), untargeted=torch.where(inside, torch.inf, scores))


def _default_chunk_rows(policy: Tensor, vocab: int, dtype: torch.dtype, num_bytes: int | None) -> int:
    """As many rows of two models' logits as `num_bytes` (None: those of a CPU) hold."""
    unit = 128 if policy.is_cuda else 16
    return _chunk_rows(CHUNK_BYTES["cpu"] if num_bytes is None else num_bytes, 2 * dtype.itemsize * vocab, unit)


def _chunk_rows(num_bytes: int, row_bytes: int, unit: int) -> int:
    """As many rows as fit, in whole units (on a GPU: tiles) of the products where there are enough of them."""
    rows = num_bytes // max(1, row_bytes)
    unit = unit if rows >= 8 * unit else 16
    return max(16, rows // unit * unit)


def _cut(head: Head, valid: int) -> Head:
    """The part of the vocabulary that exists; the head itself where that is all, which spares the backward a copy."""
    if valid == len(head.weight):
        return head
    return replace(head, weight=head.weight[:valid], bias=None if head.bias is None else head.bias[:valid])
