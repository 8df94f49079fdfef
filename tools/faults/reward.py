"""A reward that draws random numbers: a resumed run must go on with the generators' states, too."""

from __future__ import annotations

import random


def noisy_length(completions: list[str]) -> list[float]:
    """The length, up to a random tenth."""
    return [len(completion) / 50 + random.random() / 10 for completion in completions]
