"""The public operators: border checks, and the one place that decides which path computes a call.

    token_scores        policy and reference logits in
    head_token_scores   hidden states and heads in: the logits are never stored for all rows
    head_token_loss     the same with a loss linear in the scores, whose gradient is taken at once
    linear_token_scores, linear_token_loss      the same two for weights and biases that are not in a Head

All agree with reference.py, which is their definition; TokenScores (types.py) says what comes back.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from .autograd import ScoreFunction
from .call import Call, Request, head_call, logits_call
from .checks import check_finite
from .compose import one_graph_break
from .errors import UserError
from .loss import LossFunction
from .types import OUTPUTS, CoefficientsFunction, Head, Support, TokenCoefficients, TokenScores

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "Head", "Support", "TokenCoefficients", "TokenScores", "head_token_loss", "head_token_scores", "linear_token_loss",
    "linear_token_scores", "token_scores",
]  # fmt: skip


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
    vocab_group: ProcessGroup | None = None,
    inplace_backward: bool = False,
) -> TokenScores:
    """Scores of the target tokens under policy and reference logits, from one pass over both.

    policy_logits float [N, V], ref_logits float [N, V] or None; rows may be strided. target_ids i64 [N]. Rows where
    mask (bool [N]) is false cost nothing, may hold anything and come back zero. So do rows with the target -100, which
    Hugging Face's labels have where nothing is to be predicted (but without a mask and without check_values they cost
    what others cost, and their logits must be finite). temperature divides all logits: a number or [N]. support: what
    the sampler allowed (see Support). Only the first valid_vocab columns exist.
    outputs: which of "entropy", "kl", "forward_kl" and "jsd" are wanted; the others come back as None. The latter two
    take a second pass over the logits of each chunk, after the one that finds the normalisers.
    chunk_tokens: rows held in work buffers at a time. check_values: look at ids and for NaN (None: only on the CPU,
    where it costs nothing); without it, a target that is no id makes the scores of its row NaN, with no gradient.
    inplace_backward: the backward overwrites policy_logits with their gradient instead of allocating N * V numbers
    more; for logits that nothing else needs.
    vocab_group: the processes that hold the logits in slices of the vocabulary, one each in the order of their ranks,
    of any sizes: policy_logits and ref_logits are then [N, V_rank], their gradient too, and all else is the same on all
    ranks: target_ids and valid_vocab mean ids of the whole vocabulary. Every rank gets the same scores, bit for bit,
    and must come to the same loss. Without support.

    Returns TokenScores, f32 [N] (f64 for f64 logits), differentiable towards policy_logits. Raises UserError for
    inputs that do not fit together. Formulas: TokenScores; definition: reference.token_scores.
    """
    request = Request(
        target_ids, mask, temperature, support, valid_vocab, "float32", "float32", outputs, chunk_tokens,
        check_values, vocab_group,
    )  # fmt: skip
    call, policy_logits = logits_call(request, policy_logits, ref_logits, inplace_backward)
    return _checked(TokenScores(*ScoreFunction.apply(call, policy_logits)), call)


@one_graph_break
def head_token_scores(
    policy_hidden: Tensor,
    policy_head: Head,
    ref_hidden: Tensor | None,
    ref_head: Head | None,
    target_ids: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    support: Support | None = None,
    valid_vocab: int | None = None,
    logits_dtype: str = "float32",
    gradient_dtype: str = "float32",
    outputs: Collection[str] = OUTPUTS,
    chunk_tokens: int | None = None,
    check_values: bool | None = None,
    vocab_group: ProcessGroup | None = None,
) -> TokenScores:
    """token_scores of the logits of two language-model heads, without ever storing the logits of all rows.

    policy_hidden [N, H] goes through policy_head (weight [V, H]); the same of the reference, or None, None. The
    reference may have another H (a teacher of another size), and with valid_vocab another V.
    logits = softcap * tanh((hidden @ weight^T + bias) / softcap) * logit_scale / temperature, in float32 whatever
    autocast says; logits_dtype="bfloat16" rounds the head's output first, as an engine with bfloat16 logits does.
    gradient_dtype="bfloat16" lets a CPU take the gradients of hidden states and weight by bfloat16 products (a relative
    error of 2e-3, 4 times as fast where the processor has them); a GPU takes them in the dtype of hidden states.
    If both heads hold the same weight (and bias) tensor, one product serves both. softcap and logit_scale must be the
    same in both. Weights and biases may be DTensors (FSDP2): they are gathered, and their gradient is averaged and
    scattered. Other arguments: token_scores.

    vocab_group: the processes over which the heads are split by ids (tensor parallelism). Weights [V_rank, H] and
    biases [V_rank] are then plain tensors with this rank's rows; hidden states are whole and the same on all ranks,
    like the rest (see token_scores). The gradient of policy_hidden is summed over the ranks, once per backward
    (head_token_loss: once per call): what comes back is that of the whole vocabulary, not to be summed again. Those of
    weight and bias are of the own rows.

    forward_kl and jsd need a chunk of logits at hand: on a GPU, too, heads are then multiplied by the BLAS, chunk by
    chunk.

    Returns TokenScores, differentiable towards policy_hidden and the policy head's weight and bias; the backward
    computes the logits again, chunk_tokens rows at a time, only for rows with a gradient (on a CPU, not for the last
    chunk, whose logits wait for it). Where the loss's coefficients are known, head_token_loss is cheaper. Raises
    UserError for inputs that do not fit. Definition: reference.py.
    """
    request = Request(
        target_ids, mask, temperature, support, valid_vocab, logits_dtype, gradient_dtype, outputs, chunk_tokens,
        check_values, vocab_group,
    )  # fmt: skip
    call, inputs = head_call(request, policy_hidden, policy_head, ref_hidden, ref_head, keeps_last_chunk=True)
    return _checked(TokenScores(*ScoreFunction.apply(call, *inputs)), call)


@one_graph_break
def head_token_loss(
    policy_hidden: Tensor,
    policy_head: Head,
    ref_hidden: Tensor | None,
    ref_head: Head | None,
    target_ids: Tensor,
    coefficients: TokenCoefficients | CoefficientsFunction,
    *,
    row_splits: Sequence[int] | None = None,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    support: Support | None = None,
    valid_vocab: int | None = None,
    logits_dtype: str = "float32",
    gradient_dtype: str = "float32",
    outputs: Collection[str] = OUTPUTS,
    chunk_tokens: int | None = None,
    check_values: bool | None = None,
    vocab_group: ProcessGroup | None = None,
) -> tuple[Tensor, TokenScores]:
    """A loss that is linear in the token scores, with its gradient taken while the logits are at hand.

    loss = sum over rows and scores of coefficient * score. coefficients: a TokenCoefficients of N rows, or a function
    (slice of rows, their TokenScores) -> TokenCoefficients of these rows, called in order for ranges that begin and end
    at row_splits (ascending from 0 to N; default: one range of all rows). Give the bounds of the prompt groups there,
    and a baseline that needs a whole group's scores can be computed inside. A range's logits are held at once:
    as many whole groups as fit into chunk_tokens rows, but at least one.

    Other arguments: head_token_scores. Returns the loss (a scalar whose backward, to be called once, hands the
    gradients to policy_hidden and the policy head's weight and bias) and the scores as constants. Costs four head
    products with the exact KL's gradient where scores and a separate backward cost six. Raises UserError as the others
    do.
    """
    request = Request(
        target_ids, mask, temperature, support, valid_vocab, logits_dtype, gradient_dtype, outputs, chunk_tokens,
        check_values, vocab_group,
    )  # fmt: skip
    call, inputs = head_call(request, policy_hidden, policy_head, ref_hidden, ref_head, keeps_last_chunk=False)
    num_rows = call.num_rows
    splits = [0, num_rows] if row_splits is None else [int(s) for s in row_splits]
    if splits[0] != 0 or splits[-1] != num_rows or any(a > b for a, b in zip(splits, splits[1:], strict=False)):
        raise UserError(f"row_splits must ascend from 0 to the number of rows, {num_rows}; got {splits[:8]}.")
    loss, *scores = LossFunction.apply(call, coefficients, splits, *inputs)
    return loss, _checked(TokenScores(*scores), call)


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
    gradient_dtype: str = "float32",
    outputs: Collection[str] = OUTPUTS,
    chunk_tokens: int | None = None,
    check_values: bool | None = None,
    vocab_group: ProcessGroup | None = None,
) -> TokenScores:
    """head_token_scores for weights [V, H] and biases [V] that are not in a Head; differentiable towards the policy's.

    softcap and logit_scale hold for both sides; ref_hidden and ref_weight are both given or both None.
    """
    return head_token_scores(
        policy_hidden, Head(policy_weight, policy_bias, softcap, logit_scale),
        ref_hidden, None if ref_weight is None else Head(ref_weight, ref_bias, softcap, logit_scale), target_ids,
        mask=mask, temperature=temperature, support=support, valid_vocab=valid_vocab, logits_dtype=logits_dtype,
        gradient_dtype=gradient_dtype, outputs=outputs, chunk_tokens=chunk_tokens, check_values=check_values,
        vocab_group=vocab_group,
    )  # fmt: skip


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
    gradient_dtype: str = "float32",
    outputs: Collection[str] = OUTPUTS,
    chunk_tokens: int | None = None,
    check_values: bool | None = None,
    vocab_group: ProcessGroup | None = None,
) -> tuple[Tensor, TokenScores]:
    """head_token_loss for weights and biases that are not in a Head; see linear_token_scores."""
    return head_token_loss(
        policy_hidden, Head(policy_weight, policy_bias, softcap, logit_scale),
        ref_hidden, None if ref_weight is None else Head(ref_weight, ref_bias, softcap, logit_scale), target_ids,
        coefficients, row_splits=row_splits, mask=mask, temperature=temperature, support=support,
        valid_vocab=valid_vocab, logits_dtype=logits_dtype, gradient_dtype=gradient_dtype, outputs=outputs,
        chunk_tokens=chunk_tokens, check_values=check_values, vocab_group=vocab_group,
    )  # fmt: skip


def _checked(scores: TokenScores, call: Call) -> TokenScores:
    """The scores, after a look for NaN if wanted."""
    for name in ("policy_logprobs", "ref_logprobs") if call.check_values else ():
        if getattr(scores, name) is not None:
            check_finite(name, getattr(scores, name))
    return scores
