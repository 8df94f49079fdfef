"""`UserError`, for a user's mistake, and what its messages share. It is defined beside the operators, which need
nothing else of fastkl."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from fastkl.kernels.errors import UserError

__all__ = ["UserError", "nearest", "printable", "short"]

MAX_SHOWN = 80  # characters of a value in a message


def nearest(name: str, known: Iterable[str]) -> str:
    """ " Did you mean 'X'?" with the known name that is most like `name`; empty if none is similar."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {found[0]!r}?" if found else ""


def short(value: object) -> str:
    """repr(value), cut: a value that somebody else wrote may be a number of thousands of digits, or a long list."""
    if isinstance(value, list) and len(value) > MAX_SHOWN:
        value = value[:MAX_SHOWN]
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # Python writes no whole number of more than 4300 digits
        return "a value that is too long to show"
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def printable(text: str) -> str:
    """Text safe for a terminal: control characters but the line break (escape codes, too) and those that change the
    direction of text are blanks."""
    return "".join(character if character.isprintable() or character == "\n" else " " for character in text)
