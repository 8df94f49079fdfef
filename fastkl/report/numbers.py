"""How numbers are written for people, in the terminal and on the report page."""

from __future__ import annotations

import math


def number(value: float) -> str:
    """A number in about six characters: 3,120 / 31.2 / 3.12 / 0.031 / 1.2e-5."""
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size >= 999.95:
        return f"{value:,.0f}"
    if size >= 10:
        return f"{value:.1f}"
    if size >= 0.1 or size == 0:
        return f"{value:.2f}"
    return f"{value:.3f}" if size >= 0.001 else scientific(value, 1)


def scientific(value: float, decimals: int) -> str:
    """The number with a power of ten, written short: 2.2e-6."""
    digits, power = f"{value:.{decimals}e}".split("e")
    return f"{digits}e{int(power)}"


def percent(share: float) -> str:
    """A share of 1 in percent."""
    return f"{100 * share:.0f} %" if math.isfinite(share) else str(share)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: 1:02:03, or 2:03 below an hour."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def finite(value: object) -> float:
    """The number, or 0 where there is none."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else 0.0
