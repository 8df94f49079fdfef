"""What a user may meet: `UserError` for a mistake (its home is the operators, which need nothing else of fastkl)."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from fastkl.kernels.errors import UserError

__all__ = ["UserError", "nearest"]


def nearest(name: str, known: Iterable[str]) -> str:
    """A question that names the known name most like `name` (begins with a space), or nothing where none is."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {found[0]!r}?" if found else ""
