"""The public operators: border checks, and the one place that decides which path computes a call.

    token_scores         policy and reference logits in
    linear_token_scores  hidden states and heads in: the logits are never stored for all rows
    linear_token_loss    the same with a loss linear in the scores, whose gradient is taken at once

All agree with reference.py, which is their definition; TokenScores (types.py) says what comes back.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from . import checks
from .autograd import Call, ScoreFunction
from .checks import FLOATS, check_finite, check_heads, check_options, check_rows, check_support, check_tensor
from .chunked import Rows
from .compose import one_graph_break, whole
from .dispatch import uses_triton
from .errors import UserError
from .linear import Head, LogitOptions
from .loss import LossFunction
from .support import switched_on
from .types import OUTPUTS, CoefficientsFunction, Support, TokenCoefficients, TokenScores

__all__ = [
    "Support", "TokenCoefficients", "TokenScores", "linear_token_loss", "linear_token_scores", "token_scores",
]  # fmt: skip

CHUNK_BYTES = {"cpu": 48 << 20, "cuda": 2 << 30}
"""Default size of one chunk's policy and reference logits together. On a GPU chunks must be long, or accumulating the
head's gradient costs as much as computing it. On a CPU each of the two buffers should stay below 32 MiB: glibc returns
larger ones to the system after every call, and touching fresh pages costs as much as the arithmetic on them."""

LONG_CHUNK_BYTES = 128 << 20
"""The same on a CPU where longer chunks save more than that: where the backward finds the last chunk still there, and
where the head's gradient, which every chunk reads and writes, is larger than CACHED_BYTES."""

CACHED_BYTES = 16 << 20


@one_graph_break
def token_scores(
    policy_logits: Tensor,
    ref_logits: Tensor | None,
    target_ids: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    support: Support | None = None,
    valid_vocab: int | None = None,
    outputs: Collection[str] = OUTPUTS,
    chunk_tokens: int | None = None,
    check_values: bool | None = None,
    inplace_backward: bool = False,
) -> TokenScores:
    """Scores of the target tokens under policy and reference logits, from one pass over both.

    policy_logits float [N, V], ref_logits float [N, V] or None; rows may be strided. target_ids i64 [N]. Rows where
    mask (bool [N]) is false cost nothing, may hold anything and come back zero. temperature divides all logits: a
    number or [N]. support: what the sampler allowed (see Support). Only the first valid_vocab columns exist.
    outputs: which of "entropy" and "kl" are wanted; the others come back as None.
    chunk_tokens: rows held in work buffers at a time. check_values: look at ids and for NaN (None: only on the CPU,
    where it costs nothing). inplace_backward: the backward overwrites policy_logits with their gradient instead of
    allocating N * V numbers more; for logits that nothing else needs.

    Returns TokenScores, f32 [N] (f64 for f64 logits), differentiable towards policy_logits. Raises UserError for
    inputs that do not fit together. Formulas: TokenScores; definition: reference.token_scores.
    """
    check_tensor("policy_logits", policy_logits, (None, None), FLOATS, policy_logits)
    if ref_logits is not None:
        check_tensor("ref_logits", ref_logits, tuple(policy_logits.shape), FLOATS, policy_logits)
    valid = check_options(policy_logits.shape[1], None, "float32", valid_vocab)
    rows = policy_logits, target_ids, mask, temperature, support
    call, check = _call(*rows, valid, outputs, chunk_tokens, check_values, LogitOptions())
    call = replace(
        call, reference=None if ref_logits is None else ref_logits.detach()[:, :valid], inplace=inplace_backward
    )
    if valid < policy_logits.shape[1]:
        policy_logits = policy_logits[:, :valid]
    return _checked(TokenScores(*ScoreFunction.apply(call, policy_logits)), check)


@one_graph_break
def linear_token_scores(
    policy_hidden: Tensor,
    policy_weight: Tensor,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    target_ids: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    support: Support | None = None,
    policy_bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    valid_vocab: int | None = None,
    logits_dtype: str = "float32",
    outputs: Collection[str] = OUTPUTS,
    chunk_tokens: int | None = None,
    check_values: bool | None = None,
) -> TokenScores:
    """token_scores of the logits of two language-model heads, without ever storing the logits of all rows.

    policy_hidden [N, H], policy_weight [V, H], policy_bias [V] or None; the same of the reference, or None, None.
    logits = softcap * tanh((hidden @ weight^T + bias) / softcap) * logit_scale / temperature, in float32 whatever
    autocast says; logits_dtype="bfloat16" rounds the head's output first, as an engine with bfloat16 logits does.
    If both sides pass the same weight (and bias) tensor, one product serves both. Weights and biases may be DTensors
    (FSDP2): they are gathered, and their gradient is averaged and scattered. Other arguments: token_scores.

    Returns TokenScores, differentiable towards policy_hidden, policy_weight and policy_bias; the backward computes the
    logits again, chunk_tokens rows at a time, only for rows with a gradient (on a CPU, not for the last chunk, whose
    logits wait for it). Where the loss's coefficients are known,
    linear_token_loss is cheaper. Raises UserError for inputs that do not fit. Definition: reference.py.
    """
    inputs, call, check = _linear_call(
        policy_hidden, policy_weight, ref_hidden, ref_weight, target_ids, mask, temperature, support, policy_bias,
        ref_bias, softcap, logit_scale, valid_vocab, logits_dtype, outputs, chunk_tokens, check_values,
        keeps_last_chunk=True,
    )  # fmt: skip
    return _checked(TokenScores(*ScoreFunction.apply(call, *inputs)), check)


@one_graph_break
def linear_token_loss(
    policy_hidden: Tensor,
    policy_weight: Tensor,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    target_ids: Tensor,
    coefficients: TokenCoefficients | CoefficientsFunction,
    *,
    row_splits: Sequence[int] | None = None,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    support: Support | None = None,
    policy_bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    valid_vocab: int | None = None,
    logits_dtype: str = "float32",
    outputs: Collection[str] = OUTPUTS,
    chunk_tokens: int | None = None,
    check_values: bool | None = None,
) -> tuple[Tensor, TokenScores]:
    """A loss that is linear in the token scores, with its gradient taken while the logits are at hand.

    loss = sum over rows and scores of coefficient * score. coefficients: a TokenCoefficients of N rows, or a function
    (slice of rows, their TokenScores) -> TokenCoefficients of these rows, called in order for ranges that begin and end
    at row_splits (ascending from 0 to N; default: one range of all rows). Give the bounds of the prompt groups there,
    and a baseline that needs a whole group's scores can be computed inside. A range's logits are held at once:
    as many whole groups as fit into chunk_tokens rows, but at least one.

    Other arguments: linear_token_scores. Returns the loss (a scalar whose backward, to be called once, hands the
    gradients to policy_hidden, policy_weight and policy_bias) and the scores as constants. Costs four head products
    with the exact KL's gradient where scores and a separate backward cost six. Raises UserError as the others do.
    """
    inputs, call, check = _linear_call(
        policy_hidden, policy_weight, ref_hidden, ref_weight, target_ids, mask, temperature, support, policy_bias,
        ref_bias, softcap, logit_scale, valid_vocab, logits_dtype, outputs, chunk_tokens, check_values,
        keeps_last_chunk=False,
    )  # fmt: skip
    num_rows = call.num_rows
    splits = [0, num_rows] if row_splits is None else [int(s) for s in row_splits]
    if splits[0] != 0 or splits[-1] != num_rows or any(a > b for a, b in zip(splits, splits[1:], strict=False)):
        raise UserError(f"row_splits must ascend from 0 to the number of rows, {num_rows}; got {splits[:8]}.")
    loss, *scores = LossFunction.apply(call, coefficients, splits, *inputs)
    return loss, _checked(TokenScores(*scores), check)


def _linear_call(
    policy_hidden, policy_weight, ref_hidden, ref_weight, target_ids, mask, temperature, support, policy_bias,
    ref_bias, softcap, logit_scale, valid_vocab, logits_dtype, outputs, chunk_tokens, check_values, *,
    keeps_last_chunk,
) -> tuple[tuple[Tensor | None, ...], Call, bool]:  # fmt: skip
    """The checked call, and the policy's inputs cut to the vocabulary that exists."""
    policy_weight, ref_weight, policy_bias, ref_bias = whole(policy_weight, ref_weight, policy_bias, ref_bias)
    check_heads(policy_hidden, policy_weight, ref_hidden, ref_weight, policy_bias, ref_bias)
    valid = check_options(len(policy_weight), softcap, logits_dtype, valid_vocab)
    if not logit_scale > 0:
        raise UserError(f"logit_scale is {logit_scale}, expected a positive number.")
    options = LogitOptions(softcap=softcap, logit_scale=logit_scale, logits_dtype=logits_dtype)
    call, check = _call(
        policy_hidden, target_ids, mask, temperature, support, valid, outputs, chunk_tokens, check_values, options
    )
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (policy_hidden, policy_weight))
    keeps = keeps_last_chunk or policy_weight.requires_grad and policy_weight.numel() * 4 > CACHED_BYTES
    if chunk_tokens is None and policy_hidden.device.type == "cpu" and needs_grad and keeps:
        long = _default_chunk_rows(policy_hidden, valid, call.dtype, LONG_CHUNK_BYTES)
        call = replace(call, chunk_rows=long)
    reference = None
    if ref_hidden is not None:
        reference = Head(ref_hidden, _cut(ref_weight, valid), None if ref_bias is None else _cut(ref_bias, valid))
    inputs = policy_hidden, _cut(policy_weight, valid), None if policy_bias is None else _cut(policy_bias, valid)
    return inputs, replace(call, reference=reference), check


def _call(
    policy: Tensor,
    target_ids: Tensor,
    mask: Tensor | None,
    temperature: float | Tensor,
    support: Support | None,
    vocab: int,
    outputs: Collection[str],
    chunk_tokens: int | None,
    check: bool | None,
    options: LogitOptions,
) -> tuple[Call, bool]:
    """The part of a call that does not depend on where the logits come from, without the reference."""
    check_rows(policy, target_ids, mask, temperature)
    if support is not None:
        check_support(support, policy)
        support = switched_on(support, vocab)
    if unknown := set(outputs) - set(OUTPUTS):
        raise UserError(f"outputs has {sorted(unknown)}, expected some of {list(OUTPUTS)}.")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise UserError(f"chunk_tokens is {chunk_tokens}, expected at least 1, or None for a size that fits the cache.")
    dtype = torch.float64 if policy.dtype == torch.float64 else torch.float32
    check = policy.device.type == "cpu" if check is None else check
    if isinstance(temperature, Tensor):
        temperature = temperature.detach().to(policy.device, dtype).expand(len(policy))
    call = Call(
        num_rows=len(policy),
        row_ids=None,
        rows=Rows(target_ids, support, entropy="entropy" in outputs, kl="kl" in outputs),
        options=replace(options, temperature=temperature),
        reference=None,
        outputs=frozenset(outputs),
        chunk_rows=chunk_tokens or _default_chunk_rows(policy, vocab, dtype, CHUNK_BYTES.get(policy.device.type)),
        dtype=dtype,
        use_triton=dtype == torch.float32 and uses_triton(policy),
    )
    if mask is not None and not (policy.device.type == "cpu" and bool(mask.all())):
        call = call.select(mask.nonzero()[:, 0])
    if check:
        checks.check_values(vocab, call.rows.target_ids, call.options.temperature, call.rows.support)
    return call, check


def _default_chunk_rows(policy: Tensor, vocab: int, dtype: torch.dtype, num_bytes: int | None) -> int:
    """As many rows as `num_bytes` (None: those of a CPU) hold, in whole units (on a GPU: tiles) of the products."""
    budget = CHUNK_BYTES["cpu"] if num_bytes is None else num_bytes
    rows = budget // (2 * dtype.itemsize * max(1, vocab))
    unit = 128 if policy.is_cuda and rows >= 1024 else 16
    return max(16, rows // unit * unit)


def _cut(x: Tensor, valid: int) -> Tensor:
    """The part of the vocabulary that exists; x itself where that is all, which spares the backward a copy."""
    return x if valid == len(x) else x[:valid]


def _checked(scores: TokenScores, check: bool) -> TokenScores:
    """The scores, after a look for NaN if wanted."""
    if check:
        for name in ("policy_logprobs", "ref_logprobs"):
            if getattr(scores, name) is not None:
                check_finite(name, getattr(scores, name))
    return scores
