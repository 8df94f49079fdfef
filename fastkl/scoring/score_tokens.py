"""Scores of any causal language model of transformers, from token ids and masks: what `fastkl score` and hand-written
loops call.

A model is checked when it is seen for the first time: backbone and head must give its own logits, and the batched
forward must equal separate ones. integrations/transformers.py is the public name of these functions, with examples.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastkl.errors import UserError
from fastkl.kernels.operators import Support, TokenScores, head_token_scores
from fastkl.kernels.types import OUTPUTS, Head
from fastkl.scoring import backbone
from fastkl.scoring.distinct import spread
from fastkl.scoring.head import check_head, head_of
from fastkl.scoring.models import backbone_of, dropouts, first_line
from fastkl.scoring.pack import cumulative
from fastkl.scoring.prefixes import distinct_of, tree_of
from fastkl.types import PackedBatch

_LAYOUTS: WeakKeyDictionary[nn.Module, dict[tuple[bool, torch.dtype], str]] = WeakKeyDictionary()
"""The layouts of the models that have been checked, by gradient checkpointing and the dtype of the products."""


def backbone_and_head(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Head]:
    """Hidden states [B, T, H] of every position, in one forward without the head, and the head as data.

    input_ids i64 [B, T]; attention_mask bool or 0/1 [B, T], None: every token counts. hidden[b, t] predicts
    input_ids[b, t + 1]; where attention_mask is 0 it means nothing. Position ids count the tokens that the mask leaves,
    so rows padded on the left are right. Differentiable towards all of the model's weights.

    `head_scores` makes scores of them, with rows selected as you like: hidden[:, :-1][mask[:, 1:]] predicts
    input_ids[:, 1:][mask[:, 1:]]. Raises UserError for a model that would be mis-scored, and for inputs that do not
    fit together.
    """
    plain = _plain(model)
    layout_of(plain)
    inputs: dict[str, Tensor] = {"input_ids": _checked_ids(input_ids)}
    if attention_mask is not None:
        counted = _same_shape("attention_mask", attention_mask, input_ids)
        inputs["attention_mask"] = counted.long()
        inputs["position_ids"] = (counted.cumsum(1) - 1).clamp(min=0)
    with backbone.scoring(plain, "padded"):
        hidden = backbone_of(plain)(**inputs, use_cache=False).last_hidden_state
    return hidden, head_of(plain)


def head_scores(
    hidden: Tensor, head: Head, ref_hidden: Tensor | None, ref_head: Head | None, target_ids: Tensor, **options: Any
) -> TokenScores:
    """TokenScores of hidden states [N, H] and heads, f32 [N] each: the models' own log-probs.

    target_ids i64 [N]; ref_hidden and ref_head: both or neither. options: mask, temperature, support, outputs,
    chunk_tokens, check_values, as there. Raises UserError, also for heads that compute their logits differently.
    """
    if ref_head is not None:
        check_same_logits(head, ref_head)
    return head_token_scores(hidden, head, ref_hidden, ref_head, target_ids, **options)


def score_tokens(
    policy: nn.Module,
    reference: nn.Module | None,
    input_ids: Tensor,
    completion_mask: Tensor,
    *,
    attention_mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    support: Support | None = None,
    outputs: Collection[str] = OUTPUTS,
    chunk_tokens: int | None = None,
) -> TokenScores:
    """Scores of the tokens that `completion_mask` marks, under policy and reference: TokenScores of [B, T] each.

    What rows begin with alike, such as the prompt of several samples, goes through the models once (prefixes.py).

    input_ids i64 [B, T]: prompts and completions, padded on any side. completion_mask bool or 0/1 [B, T]: the tokens to
    score; scores are zero elsewhere. attention_mask bool or 0/1 [B, T]: the tokens that exist; None: all up to a row's
    last scored one, so padding on the left must be declared here. temperature: a number, or a tensor that broadcasts to
    [B, T]. support: what the sampler allowed; fields with one entry per row have one per scored token, in the order of
    input_ids[completion_mask]. outputs, chunk_tokens: see fastkl.kernels.operators.head_token_scores.

    f32 (f64 for float64 models), in nats; differentiable towards the policy's weights only, tied ones included. The
    reference needs the policy's vocabulary and width; None leaves its scores out. Raises UserError for inputs that do
    not fit together and for a model that would be mis-scored. Formulas: fastkl.TokenScores.
    """
    mask = _same_shape("completion_mask", completion_mask, _checked_ids(input_ids))
    per_token = isinstance(temperature, Tensor) or support is not None  # equal tokens may have other scores then
    batch = _packed(input_ids, mask, attention_mask, find_equal=not per_token)
    ref_hidden, ref_head = None, None
    if reference is not None:
        ref_head = head_of(_plain(reference))
        check_same_logits(head_of(_plain(policy)), ref_head)  # before any forward
        with torch.no_grad():
            ref_hidden = _hidden(reference, batch)
    scores = head_scores(
        _hidden(policy, batch),
        head_of(_plain(policy)),
        ref_hidden,
        ref_head,
        batch.state_target_ids,
        temperature=temperature.expand(mask.shape)[mask] if isinstance(temperature, Tensor) else temperature,
        support=support,
        outputs=outputs,
        chunk_tokens=chunk_tokens,
    )

    if batch.distinct is not None:
        scores = spread(scores, batch.distinct.copies)

    def in_rows(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.new_zeros(mask.shape).masked_scatter(mask, values)

    return TokenScores(*map(in_rows, scores.values()))


def completion_mask(input_ids: Tensor, prompt_tokens: int, stop_token_ids: int | Sequence[int] = ()) -> Tensor:
    """Which tokens were sampled, bool [B, T]: those after the prompt, up to the first stop token and with it.

    input_ids i64 [B, T] as `generate` returns them: every prompt fills the first `prompt_tokens` columns (padded on the
    left), and what follows a stop token is padding. stop_token_ids: one or several ids, as in eos_token_id.
    """
    stops = torch.tensor([stop_token_ids] if isinstance(stop_token_ids, int) else list(stop_token_ids))
    sampled = torch.ones_like(input_ids, dtype=torch.bool)
    sampled[:, :prompt_tokens] = False
    stopped = torch.isin(input_ids, stops.to(input_ids)) & sampled
    return sampled & (stopped.long().cumsum(1) - stopped.long() == 0)


def layout_of(model: nn.Module, dtype: torch.dtype = torch.float32) -> str:
    """How the backbone batches a model's sequences (backbone.py); checks the model when it is seen first.

    dtype: that of the matrix products, if they run under autocast.
    Raises UserError if backbone and head do not give the model's own logits, or no batched forward equals separate
    ones.
    """
    model = _plain(model)
    checkpointing = bool(getattr(model, "is_gradient_checkpointing", False))
    known = _LAYOUTS.setdefault(model, {})
    if (checkpointing, dtype) not in known:
        known[checkpointing, dtype] = _checked_layout(model, checkpointing, dtype)
    return known[checkpointing, dtype]


def check_same_logits(policy: Head, reference: Head) -> None:
    """UserError unless the heads turn equally many features into equally many logits by the same formula."""
    for name, ours, theirs in (
        ("weight's shape", list(policy.weight.shape), list(reference.weight.shape)),
        ("softcap", policy.softcap, reference.softcap),
        ("logit scale", policy.logit_scale, reference.logit_scale),
    ):
        if ours != theirs:
            raise UserError(
                f"reference: its head's {name} is {theirs} and the policy's {ours}; both must be models of one family "
                "with the same vocabulary and width."
            )


def _plain(model: Any) -> Any:
    """The transformers model inside of torch.compile's and PEFT's wrappers; adapters stay in their places."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise UserError(
            "model: a DistributedDataParallel module would be scored around its own forward, and its gradients would "
            "not be averaged; wrap a module whose forward calls score_tokens instead."
        )
    model = getattr(model, "_orig_mod", model)
    if hasattr(model, "get_base_model"):  # PEFT: layers have been exchanged for ones with adapters, in place
        if getattr(model.active_peft_config, "is_prompt_learning", False):
            raise UserError("model: PEFT's learned prompts are not scored; use adapters of the weights, such as LoRA.")
        model = model.get_base_model()
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None or not hasattr(model, "base_model"):
        raise UserError(f"model: {type(model).__name__} is no causal language model of transformers; it has no head.")
    if type(getattr(head, "weight", None)).__name__ == "DTensor":
        raise UserError(
            "model: its head is sharded where it is scored; shard a module whose forward calls score_tokens instead "
            "(fully_shard gathers the head there)."
        )
    if hasattr(head, "base_layer"):
        raise UserError("model: its output head carries an adapter, which is not scored; leave the head out of PEFT's.")
    return model


@torch.no_grad()
def _checked_layout(model: Any, checkpointing: bool, dtype: torch.dtype) -> str:
    """The fastest layout that is right. The backward of checkpointed layers runs them again, after `scoring` has given
    the model its own attention back, so they must have run with that one."""
    if checkpointing and any(dropouts(module) for module in model.modules()):
        raise UserError(
            "model: gradient checkpointing runs in training mode, where this model's dropout would make noise count as "
            "KL; call fastkl.scoring.models.without_dropout(model) first."
        )
    vocab = len(head_of(model).weight)
    lengths = torch.tensor([24, 3, 11], device=model.device)
    ids = torch.arange(72, device=model.device).view(3, 24) * 7919 % vocab  # any will do; these are spread out
    mask = torch.arange(24, device=model.device) < lengths[:, None]
    mask[:, 0] = False
    ids[1, :2], ids[2, :5] = ids[0, :2], ids[0, :5]  # the layout "shared" is tried on a tree
    half = model.dtype in (torch.bfloat16, torch.float16)
    was_training = model.training
    model.eval()
    try:
        check_head(model, ids[0].tolist(), tolerance=0.02 if half else 1e-3)
        layouts = ("padded",) if checkpointing else ("shared", "packed", "padded")
        batch = _packed(ids, mask, None, find_equal=True)
        tolerance = backbone.HALF_TOLERANCE if half else 1e-3
        return backbone.choose_layout(model, batch, dtype, tolerance=tolerance, layouts=layouts)[0]
    except UserError:
        raise
    except (RuntimeError, TypeError, ValueError, AttributeError) as failure:
        raise UserError(f"model: {type(model).__name__} cannot be scored ({first_line(failure)}).") from failure
    finally:
        model.train(was_training)


def _hidden(model: nn.Module, batch: PackedBatch) -> Tensor:
    """Hidden states [U, H] that predict the batch's distinct scored tokens."""
    layout, model = layout_of(model), _plain(model)
    with backbone.scoring(model, layout):
        return backbone.hidden_states(model, batch, layout)


def _packed(input_ids: Tensor, mask: Tensor, attention_mask: Tensor | None, *, find_equal: bool) -> PackedBatch:
    """The rows without their padding, cut after their last scored token; rows without one have length zero.

    find_equal: equal tokens after equal ones are one row for the heads.
    """
    exists = torch.ones_like(mask)
    if attention_mask is not None:
        exists = _same_shape("attention_mask", attention_mask, input_ids)
        if bool((mask & ~exists).any()):
            raise UserError("completion_mask marks tokens that attention_mask calls padding; they must not overlap.")
    exists = exists & (mask.flip(1).cumsum(1).flip(1) > 0)
    positions = exists.long().cumsum(1) - 1
    if not bool(mask.any()):
        raise UserError("completion_mask marks no token; there is nothing to score.")
    if bool((positions[mask] == 0).any()):
        raise UserError("completion_mask marks the first token of a row, which nothing predicts; mark later ones only.")
    lengths = exists.sum(1).tolist()
    num_rows, device = len(mask), input_ids.device
    packed_ids, starts = input_ids[exists], torch.tensor([0, *lengths[:-1]]).cumsum(0).tolist()
    sequences = [tuple(row.tolist()) for row in packed_ids.cpu().split(lengths)]
    tree = tree_of(sequences, starts, len(packed_ids))
    packed_position = (exists.flatten().long().cumsum(0) - 1).view(mask.shape)
    score_positions, target_ids = packed_position[mask] - 1, input_ids[mask]  # the token before, in the same row
    distinct = None
    if find_equal:
        found = score_positions.cpu(), target_ids.cpu()
        distinct = distinct_of(tree, *found, torch.zeros_like(found[1]), 1)
    return PackedBatch(
        input_ids=packed_ids,
        position_ids=positions[exists],
        cu_seqlens=cumulative(lengths, device),
        score_positions=score_positions,
        target_ids=target_ids,
        completion_cu_seqlens=cumulative(mask.sum(1).tolist(), device),
        completion_positions=(mask.long().cumsum(1) - 1)[mask],
        engine_logprobs=torch.zeros(int(mask.sum()), device=device),
        rewards=torch.zeros(num_rows, 1, device=device),
        valid=mask.any(1, keepdim=True),
        lengths=tuple(lengths),
        tree=tree.to(input_ids.device),
        distinct=distinct.to(input_ids.device) if distinct else None,
    )


def _checked_ids(input_ids: Tensor) -> Tensor:
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or input_ids.dtype != torch.int64:
        found = f"{input_ids.dtype} {list(input_ids.shape)}" if isinstance(input_ids, Tensor) else type(input_ids)
        raise UserError(f"input_ids must be an int64 tensor [B, T], not {found}.")
    return input_ids


def _same_shape(name: str, mask: Tensor, input_ids: Tensor) -> Tensor:
    """The mask as bool. UserError unless it has the shape of input_ids."""
    if not isinstance(mask, Tensor) or mask.shape != input_ids.shape:
        found = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise UserError(f"{name} must have the shape of input_ids, {list(input_ids.shape)}, not {found}.")
    return mask.bool()
