"""Which characters of a text earned its reward, for the terminal and for the report.

In: the name of a reward function and a text (prompt + completion). Out: character spans [start, end) in reading order.
Only rewards whose source can be pointed at in the text have an entry here; for every other one the text stays plain.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from itertools import groupby

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


def pieces(text: str, spans: Iterable[Span]) -> list[tuple[str, bool]]:
    """Cut `text` at the spans: (piece, whether it is highlighted), nothing empty, together the text again."""
    cut: list[tuple[str, bool]] = []
    position = 0
    for start, end in spans:
        cut += [(text[position:start], False), (text[start:end], True)]
        position = end
    return [(piece, marked) for piece, marked in [*cut, (text[position:], False)] if piece]
