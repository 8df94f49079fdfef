"""The built-in reward functions, each beside the highlighter that shows what earned it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any


def alliteration(prompts: Sequence[Any], completions: Sequence[Any]) -> list[float]:
    """Adjacent pairs of words (str.split of prompt + completion) that start with the same letter, case-insensitive."""
    return [float(_num_alliterating_pairs(text)) for text in map(_whole_text, prompts, completions)]


def starts_with_a(prompts: Sequence[Any], completions: Sequence[Any]) -> list[float]:
    """Words (str.split of prompt + completion) that start with a or A."""
    return [float(sum(word[0] in "aA" for word in text.split())) for text in map(_whole_text, prompts, completions)]


BUILT_IN: dict[str, Callable[..., Any]] = {"alliteration": alliteration, "starts_with_a": starts_with_a}


def _num_alliterating_pairs(text: str) -> int:
    initials = [word[0].lower() for word in text.split()]
    return sum(first == second and first.isalpha() for first, second in zip(initials, initials[1:], strict=False))


def _whole_text(prompt: Any, completion: Any) -> str:
    """Prompt and completion as one text; of a chat, the assistant's words alone."""
    return prompt + completion if isinstance(prompt, str) else " ".join(message["content"] for message in completion)


Span = tuple[int, int]


def _words(text: str) -> list[re.Match[str]]:
    return list(re.finditer(r"\S+", text))


def alliterating_runs(text: str) -> list[Span]:
    """Spans of two or more adjacent words that start with the same letter, whatever its case."""
    spans = []
    for letter, group in groupby(_words(text), key=lambda word: word[0][0].lower()):
        words = list(group)
        if letter.isalpha() and len(words) > 1:
            spans.append((words[0].start(), words[-1].end()))
    return spans


def words_with_a(text: str) -> list[Span]:
    """Spans of the words that start with a or A."""
    return [word.span() for word in _words(text) if word[0][0] in "aA"]


HIGHLIGHTERS: dict[str, Callable[[str], list[Span]]] = {
    "alliteration": alliterating_runs,
    "starts_with_a": words_with_a,
}


def reward_spans(reward_names: Iterable[str], text: str) -> list[Span]:
    """Spans of `text` that earned a reward, by the first of `reward_names` that can be shown; empty if none can."""
    for name in reward_names:
        if name in HIGHLIGHTERS:
            return HIGHLIGHTERS[name](text)
    return []
