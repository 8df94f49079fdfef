"""Prompts: from rows (rows.py says where they come from) to a list of `Prompt`, and in shuffled order to the steps.

A text becomes one user message where a system prompt precedes it, and where it is a question of reasoning-gym and the
tokenizer has a chat template. Other texts are tokenised as they are; chat messages go through the chat template.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastkl.data.chat import has_template, rendered
from fastkl.data.rows import Row, read_rows
from fastkl.errors import UserError
from fastkl.types import Prompt

HALF_CHARACTER = re.compile("[\ud800-\udfff]")
TOKENIZER_BATCH = 1024  # prompts tokenised at a time
TEMPLATE_KWARGS = "chat_template_kwargs"  # the setting, and the column that overrides it row by row
OURS = ("tokenize", "add_generation_prompt", "continue_final_message", "return_dict", "return_tensors", "conversation")
"""What apply_chat_template is told by us."""


@dataclass(frozen=True, slots=True)
class PromptFormat:
    """How rows become prompts: the settings of the same names."""

    prompt_column: str = "prompt"
    system_prompt: str = ""  # the first message of every prompt that has no system message of its own
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    long_prompts: str = "error"  # or "drop"

    @classmethod
    def of(cls, settings: Any) -> PromptFormat:
        """That of a TrainConfig."""
        kwargs = template_kwargs(settings.chat_template_kwargs)
        return cls(settings.prompt_column, settings.system_prompt, kwargs, settings.long_prompts)


def template_kwargs(pairs: Iterable[str]) -> dict[str, Any]:
    """KEY=VALUE ... as keywords of the chat template; a value is JSON where it is JSON, else a text. UserError else."""
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name.isidentifier():
            raise UserError(f"{TEMPLATE_KWARGS}: {pair!r} is no KEY=VALUE, such as enable_thinking=false.")
        if name in OURS:
            raise UserError(f"{TEMPLATE_KWARGS}: {name!r} is set by fastkl; leave it out.")
        try:
            found[name] = json.loads(text)
        except ValueError:
            found[name] = text
    return found


def load_prompts(
    source: Any,
    tokenizer: Any,
    *,
    max_prompt_tokens: int,
    form: PromptFormat | None = None,
    say: Callable[[str], None] = lambda message: None,
) -> list[Prompt]:
    """Reads `source` (see rows.py) and tokenises it. UserError on bad input, with the line or row.

    max_prompt_tokens: what the model's context leaves for a prompt. say: shows a person what was dropped.
    """
    form = form or PromptFormat()
    rows = list(read_rows(source, form.prompt_column))
    if not rows:
        name = repr(source) if isinstance(source, str) else f"the {type(source).__name__}"
        raise UserError(f"prompts: {name} holds no prompts; give at least one.")
    rows = as_chats(rows, form, tokenizer, questions=isinstance(source, str) and source.startswith("gym:"))
    prompts = []
    for start in range(0, len(rows), TOKENIZER_BATCH):
        prompts += _prompts(rows[start : start + TOKENIZER_BATCH], tokenizer, form.chat_template_kwargs)
    empty = next((row for row, prompt in zip(rows, prompts, strict=True) if not prompt.token_ids), None)
    if empty:
        raise UserError(f"prompts: {empty[0]} is empty for this tokenizer; a prompt needs at least one token.")
    return without_long(rows, prompts, max_prompt_tokens, form.long_prompts, say)


def as_chats(rows: list[Row], form: PromptFormat, tokenizer: Any, *, questions: bool) -> list[Row]:
    """The rows with messages for prompts, where there is a system prompt, or questions and a chat template."""
    if form.system_prompt:
        check_system_prompt(form.system_prompt, tokenizer)
    elif not (questions and has_template(tokenizer)):
        return rows
    return [
        (where, number, {**columns, "prompt": as_chat(columns["prompt"], form.system_prompt)})
        for where, number, columns in rows
    ]


def without_long(
    rows: Sequence[Row], prompts: list[Prompt], most: int, long_prompts: str, say: Callable[[str], None]
) -> list[Prompt]:
    """The prompts of at most `most` tokens; for a longer one UserError, unless they are to be dropped."""
    long = [(row, prompt) for row, prompt in zip(rows, prompts, strict=True) if len(prompt.token_ids) > most]
    if not long:
        return prompts
    (where, _, _), prompt = long[0]
    if long_prompts == "error":
        raise UserError(
            f"prompts: {where} has {len(prompt.token_ids)} tokens, and the model's context leaves room for {most}; "
            "shorten it, lower max_new_tokens, or drop such prompts with --long-prompts drop."
        )
    if len(long) == len(prompts):
        raise UserError(
            f"prompts: none fits; the model's context leaves room for {most} tokens, and {where} has "
            f"{len(prompt.token_ids)}; lower max_new_tokens."
        )
    say(f"prompts: {len(long)} of {len(prompts)} dropped, of more than {most} tokens; the first is {where}")
    return [prompt for prompt in prompts if len(prompt.token_ids) <= most]


class PromptSource:
    """Prompts in an order that is shuffled anew in every epoch and depends on (seed, epoch) alone, or in their own.

    The last prompts of an epoch and the first of the next may share a step; a single prompt is repeated.
    """

    def __init__(self, prompts: Sequence[Prompt], *, seed: int, shuffle: bool = True) -> None:
        self._prompts = tuple(prompts)
        self._seed, self._shuffle = seed, shuffle
        self._begin(epoch=0, position=0)

    def take(self, count: int) -> tuple[Prompt, ...]:
        """The next `count` prompts."""
        taken = []
        for _ in range(count):
            if self._position == len(self._prompts):
                self._begin(self._epoch + 1, position=0)
            taken.append(self._prompts[self._order[self._position]])
            self._position += 1
        return tuple(taken)

    def state(self) -> dict[str, int]:
        """What `load_state` needs to continue from here; can be written as JSON."""
        return {"epoch": self._epoch, "position": self._position, "num_prompts": len(self._prompts)}

    def load_state(self, state: Mapping[str, int]) -> None:
        """Continues from where `state` was taken. UserError if the number of prompts has changed since."""
        before = state.get("num_prompts", len(self._prompts))
        if before != len(self._prompts):
            raise UserError(
                f"prompts: there were {before} when the run was saved and are {len(self._prompts)} now; resume with "
                "the same prompts."
            )
        self._begin(state["epoch"], state["position"])

    def _begin(self, epoch: int, position: int) -> None:
        self._epoch, self._position = epoch, position
        self._order = list(range(len(self._prompts)))
        if self._shuffle:
            random.Random(f"prompts, seed {self._seed}, epoch {epoch}").shuffle(self._order)


def as_chat(prompt: str | list[dict[str, str]], system_prompt: str) -> list[dict[str, str]]:
    """The prompt as messages: a text is the user's, and the system prompt comes first unless there is one already."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not system_prompt or any(message["role"] == "system" for message in messages):
        return messages
    return [{"role": "system", "content": system_prompt}, *messages]


def check_system_prompt(text: str, tokenizer: Any) -> None:
    """UserError where the tokenizer's chat template is missing, refuses system messages, or leaves them out."""
    remedy = "put the instruction into the prompts, or use a model whose template takes one."
    if not has_template(tokenizer):
        raise UserError(f"system_prompt: the model's tokenizer has no chat template to put it in; {remedy}")
    user = [{"role": "user", "content": "?"}]
    try:
        with_it, without = (
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            for messages in (as_chat(user, text), user)
        )
    except Exception as failure:  # templates are programs and may raise anything
        raise UserError(f"system_prompt: the model's chat template refuses it ({failure}); {remedy}") from failure
    if with_it == without:
        raise UserError(f"system_prompt: the model's chat template leaves it out; {remedy}")


def _prompts(rows: Sequence[Row], tokenizer: Any, kwargs: Mapping[str, Any]) -> list[Prompt]:
    """The rows tokenised together: texts with special tokens, rendered chats (which bring their own) without."""
    raws = [columns["prompt"] for _, _, columns in rows]
    texts = [
        raw if isinstance(raw, str) else rendered(raw, where, tokenizer, {**kwargs, **own_kwargs(columns, where)})
        for raw, (where, _, columns) in zip(raws, rows, strict=True)
    ]
    for text, (where, _, _) in zip(texts, rows, strict=True):
        if HALF_CHARACTER.search(text):
            raise UserError(
                f"prompts: {where} holds half of a surrogate pair, or a byte that is not UTF-8: no character; mend it."
            )
    ids: list[Sequence[int]] = [()] * len(rows)
    for is_text in (True, False):
        chosen = [i for i, raw in enumerate(raws) if isinstance(raw, str) == is_text]
        if chosen:
            encoded = tokenizer([texts[i] for i in chosen], add_special_tokens=is_text)["input_ids"]
            for i, token_ids in zip(chosen, encoded, strict=True):
                ids[i] = as_beginning(token_ids, texts[i], tokenizer)
    return [
        Prompt(tuple(token_ids), text, raw, number, {k: v for k, v in columns.items() if k != "prompt"})
        for token_ids, text, raw, (_, number, columns) in zip(ids, texts, raws, rows, strict=True)
    ]


def as_beginning(token_ids: Sequence[int], text: str, tokenizer: Any) -> Sequence[int]:
    """The ids of a text that is to be continued: without an end that the tokenizer has put after it, which the model
    would write on from, and without the second of two beginnings, one of them written in the text.
    """
    end, begin = (getattr(tokenizer, f"{name}_token_id", None) for name in ("eos", "bos"))
    if end is not None and token_ids and token_ids[-1] == end and not text.rstrip().endswith(tokenizer.eos_token):
        token_ids = token_ids[:-1]
    if begin is not None and list(token_ids[:2]) == [begin] * 2 and not text.startswith(tokenizer.bos_token * 2):
        token_ids = token_ids[1:]
    return token_ids


def own_kwargs(columns: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The row's own keywords for the chat template; none without such a column."""
    own = columns.get(TEMPLATE_KWARGS) or {}
    if not isinstance(own, Mapping) or any(name in OURS for name in own):
        raise UserError(
            f"prompts: the {TEMPLATE_KWARGS!r} in {where} are no keywords of a chat template; write an object such as "
            '{"enable_thinking": false}.'
        )
    return {name: value for name, value in own.items() if value is not None}  # absent in other rows of a data set
