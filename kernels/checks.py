"""Checks at the operators' border: every mistake that shapes, dtypes and devices can reveal, with what to do about it.

Values are looked at only where that costs nothing (on the CPU) or when asked (`check_values=True`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .compose import is_sharded
from .errors import UserError
from .types import Head, Support

TIES = ("torch", "lowest_ids")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensor(
    name: str, x: Tensor, shape: tuple[int | None, ...], dtypes: tuple[torch.dtype, ...], like: Tensor
) -> None:
    """UserError unless x is a tensor of this shape (None: any size), of one of the dtypes, on `like`'s device."""
    if not isinstance(x, Tensor):
        raise UserError(f"{name} must be a tensor, not {type(x).__name__}.")
    if is_sharded(x):  # heads have been gathered by now
        raise UserError(f"{name} is a DTensor, but rows are scored where they are: pass {name}.to_local().")
    if x.dim() != len(shape) or any(e is not None and e != s for s, e in zip(x.shape, shape, strict=True)):
        expected = ", ".join("any" if e is None else str(e) for e in shape)
        raise UserError(f"{name} has shape {list(x.shape)}, expected [{expected}].")
    if x.dtype not in dtypes:
        raise UserError(f"{name} has dtype {x.dtype}, expected {' or '.join(str(d) for d in dtypes)}.")
    if x.device != like.device:
        raise UserError(f"{name} is on {x.device}, the policy is on {like.device}: move one of them.")


def check_logits(policy_logits: Tensor, ref_logits: Tensor | None) -> None:
    """Policy logits [N, V], and the reference's of the same shape."""
    check_tensor("policy_logits", policy_logits, (None, None), FLOATS, policy_logits)
    if ref_logits is not None:
        check_tensor("ref_logits", ref_logits, tuple(policy_logits.shape), FLOATS, policy_logits)


def check_heads(policy_hidden: Tensor, policy_head: Head, ref_hidden: Tensor | None, ref_head: Head | None) -> None:
    """Hidden states and heads fit together; the reference has both or neither. Its width is its own."""
    check_tensor("policy_hidden", policy_hidden, (None, None), FLOATS, policy_hidden)
    num_rows, hidden_size = policy_hidden.shape
    check_tensor("policy_weight", policy_head.weight, (None, hidden_size), FLOATS, policy_hidden)
    vocab = len(policy_head.weight)
    if policy_head.bias is not None:
        check_tensor("policy_bias", policy_head.bias, (vocab,), FLOATS, policy_hidden)
    if (ref_hidden is None) != (ref_head is None):
        raise UserError("ref_hidden and ref_weight belong together: pass both, or neither for no reference.")
    if ref_hidden is None or ref_head is None:
        return
    check_tensor("ref_hidden", ref_hidden, (num_rows, None), FLOATS, policy_hidden)
    check_tensor("ref_weight", ref_head.weight, (None, ref_hidden.shape[1]), FLOATS, policy_hidden)
    if ref_head.bias is not None:
        check_tensor("ref_bias", ref_head.bias, (len(ref_head.weight),), FLOATS, policy_hidden)
    for name in ("softcap", "logit_scale"):
        ours, theirs = getattr(policy_head, name), getattr(ref_head, name)
        if ours != theirs:
            raise UserError(f"{name} is {ours} in policy_head and {theirs} in ref_head: the heads must share it.")


def check_vocabs(vocab: int, ref_vocab: int, valid_vocab: int | None) -> None:
    """Policy and reference have the same number of ids, or valid_vocab says how many the two share."""
    if ref_vocab != vocab and valid_vocab is None:
        raise UserError(
            f"ref_weight has {ref_vocab} ids and policy_weight {vocab}: give valid_vocab, the number of ids that both "
            "share."
        )
    if valid_vocab is not None and valid_vocab > ref_vocab:
        raise UserError(f"valid_vocab is {valid_vocab}, and the reference has only {ref_vocab} ids.")


def check_options(head: Head, **dtypes: str) -> None:
    """A softcap, a scale and dtypes that a head can have. dtypes: logits_dtype and gradient_dtype."""
    for name, dtype in dtypes.items():
        if dtype not in ("float32", "bfloat16"):
            raise UserError(f'{name} is {dtype!r}, expected "float32" or "bfloat16".')
    if head.softcap is not None and not head.softcap > 0:
        raise UserError(f"softcap is {head.softcap}, expected a positive number or None.")
    if not head.logit_scale > 0:
        raise UserError(f"logit_scale is {head.logit_scale}, expected a positive number.")


def check_vocab(vocab: int, valid_vocab: int | None) -> int:
    """The number of columns that exist."""
    valid = vocab if valid_vocab is None else valid_vocab
    if not 1 <= valid <= vocab:
        raise UserError(f"valid_vocab is {valid_vocab}, expected 1 to {vocab}, the number of logits per row.")
    return valid


def check_rows(policy: Tensor, target_ids: Tensor, mask: Tensor | None, temperature: float | Tensor) -> None:
    """One target, one mask bit and one positive temperature per row."""
    check_tensor("target_ids", target_ids, (len(policy),), (torch.int64,), policy)
    if mask is not None:
        check_tensor("mask", mask, (len(policy),), (torch.bool,), policy)
    if isinstance(temperature, Tensor) and temperature.dim():
        check_tensor("temperature", temperature, (len(policy),), FLOATS, policy)
    elif not isinstance(temperature, Tensor) and not 0 < temperature < float("inf"):
        raise UserError(f"temperature is {temperature}, expected a positive number or a tensor of one per row.")


def check_support(support: Support, policy: Tensor) -> None:
    """One form of the support only, with one entry per row."""
    num_rows = len(policy)
    if support.ties not in TIES:
        raise UserError(f"support.ties is {support.ties!r}, expected one of {list(TIES)}.")
    if (support.kept_ids is None) != (support.kept_offsets is None):
        raise UserError("support.kept_ids and support.kept_offsets belong together: pass both or neither.")
    if support.kept_ids is not None:
        check_tensor("support.kept_ids", support.kept_ids, (None,), (torch.int64,), policy)
        check_tensor("support.kept_offsets", support.kept_offsets, (num_rows + 1,), (torch.int64,), policy)
        for name in ("excluded_ids", "banned_ids", "top_k", "top_p", "min_p"):
            if getattr(support, name) is not None:
                raise UserError(f"support.kept_ids is the whole record: leave {name} out.")
    for name in ("excluded_ids", "banned_ids"):
        if (ids := getattr(support, name)) is not None:
            check_tensor(f"support.{name}", ids, (None,), (torch.int64,), policy)
    if support.banned_rows is not None:
        check_tensor("support.banned_rows", support.banned_rows, (num_rows,), (torch.bool,), policy)
        if support.banned_ids is None:
            raise UserError("support.banned_rows says where ids are banned: pass support.banned_ids too.")
    for name in ("top_k", "top_p", "min_p"):
        value = getattr(support, name)
        if isinstance(value, Tensor) and value.dim():
            dtypes = (torch.int64, torch.int32) if name == "top_k" else FLOATS
            check_tensor(f"support.{name}", value, (num_rows,), dtypes, policy)


def check_values(valid_vocab: int, target_ids: Tensor, temperature: float | Tensor, support: Support | None) -> None:
    """Ids inside the vocabulary, temperatures positive, offsets ascending; of the rows that are scored."""
    for name, ids in (
        ("target_ids", target_ids),
        ("support.kept_ids", None if support is None else support.kept_ids),
        ("support.banned_ids", None if support is None else support.banned_ids),
        ("support.excluded_ids", None if support is None else support.excluded_ids),
    ):
        if ids is not None and ids.numel():
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= valid_vocab:
                raise UserError(
                    f"{name} has the id {low if low < 0 else high}, but the vocabulary is 0 to {valid_vocab - 1}: "
                    "check the tokenizer and valid_vocab, and mask the rows without a target (or give them the target "
                    "-100)."
                )
    if isinstance(temperature, Tensor) and not bool(((temperature > 0) & temperature.isfinite()).all()):
        raise UserError("temperature has an entry that is not a positive number: a greedy row has no distribution.")
    if support is not None and support.kept_offsets is not None:
        offsets = support.kept_offsets
        if int(offsets[0]) != 0 or int(offsets[-1]) != len(support.kept_ids) or bool((offsets.diff() < 0).any()):
            raise UserError(
                f"support.kept_offsets must ascend from 0 to {len(support.kept_ids)}, the length of kept_ids."
            )


def check_finite(name: str, logprobs: Tensor) -> None:
    """NaN in any logit of a row makes its log-probability NaN, so looking at [n] numbers finds it."""
    bad = logprobs.isnan()
    if bool(bad.any()):
        raise UserError(
            f"{name} is NaN in {int(bad.sum())} of {len(bad)} scored rows (the first is row {int(bad.nonzero()[0])} of "
            "them): the hidden states, the head or the logits hold NaN or infinity."
        )
