"""Which cases of a test `make quick` leaves out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def slow(*cases: Any) -> list[Any]:
    """Cases of one argument that show again what the others of their test show."""
    return [pytest.param(case, marks=pytest.mark.slow) for case in cases]


def slow_rows(*cases: tuple[Any, ...]) -> list[Any]:
    """The same of several arguments."""
    return [pytest.param(*case, marks=pytest.mark.slow) for case in cases]


def slow_where(is_slow: Callable[[Any], bool], cases: Iterable[Any]) -> list[Any]:
    """All cases of one argument, those of which this holds as slow ones."""
    return [pytest.param(case, marks=pytest.mark.slow if is_slow(case) else []) for case in cases]
