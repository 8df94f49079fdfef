"""A teacher: a reference that is another model, of any size. In: its name. Out: where it is, once it is known to fit.

Policy and teacher must give the same text the same ids, since a token's KL compares the probabilities of one id. Rows
that pad a head beyond the tokenizer's ids may differ in number: scores are over the policy's ids, all of which the
teacher must have.
"""

from __future__ import annotations

from typing import Any

from fastkl.errors import UserError
from fastkl.scoring import models
from fastkl.scoring.source import resolve_model


def teacher_of(name: str, tokenizer: Any, model_config: Any) -> tuple[str, Any]:
    """The teacher's folder or hub id, and its configuration. UserError where it does not fit the policy."""
    try:
        source = resolve_model(name)
        config, theirs = models.load_config(source), models.load_tokenizer(source)
    except UserError as mistake:
        raise UserError(f"reference: {str(mistake).removeprefix('model: ')}") from mistake
    check_same_ids(name, tokenizer, theirs)
    ours, others = models.vocabulary(model_config), models.vocabulary(config)
    if ours is not None and others is not None and others < ours:
        raise UserError(
            f"reference: {name!r} has {others} token ids and the policy {ours}, of which the last would have no "
            "probability under it; name a teacher whose vocabulary is as large, or cut the policy's embeddings to it."
        )
    return source, config


def check_same_ids(name: str, ours: Any, theirs: Any) -> None:
    """UserError unless both tokenizers mean the same by every id."""
    mine, other = ({i: token for token, i in tokenizer.get_vocab().items()} for tokenizer in (ours, theirs))
    for i in sorted({*mine, *other}):
        if mine.get(i) != other.get(i):
            raise UserError(
                f"reference: the tokenizer of {name!r} has {other.get(i)!r} for the id {i} where the policy's has "
                f"{mine.get(i)!r}; a KL compares probabilities of one id, so name a teacher with the same tokenizer."
            )
