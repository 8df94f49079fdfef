"""Which characters of a text earned its reward, for the terminal and for the report.

In: the name of a reward function and a text (prompt + completion). Out: character spans [start, end) in reading order.
Only rewards whose source can be pointed at in the text have an entry here; for every other one the text stays plain.
"""

from __future__ import annotations

from collections.abc import Iterable

from fastkl.rewards.built_in import Span


def pieces(text: str, spans: Iterable[Span]) -> list[tuple[str, bool]]:
    """Cut `text` at the spans: (piece, whether it is highlighted), nothing empty, together the text again."""
    cut: list[tuple[str, bool]] = []
    position = 0
    for start, end in spans:
        cut += [(text[position:start], False), (text[start:end], True)]
        position = end
    return [(piece, marked) for piece, marked in [*cut, (text[position:], False)] if piece]
