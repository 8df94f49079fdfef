"""The tasks of the comparisons, from reasoning-gym: chat prompts with their answers, and rewards."""

from __future__ import annotations

import re
from typing import Any

TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "sums": (
        "basic_arithmetic",
        {"operators": ["+"], "min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2,
         "allow_parentheses": False, "allow_negation": False},
    ),
    "differences": ("chain_sum", {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}),
}  # fmt: skip
"""Sums of two numbers; sums and differences of two. Each is a task of reasoning-gym and its options."""


def questions(task: str, size: int, seed: int) -> list[dict[str, Any]]:
    """Rows with the columns `prompt` (chat messages) and `answer`."""
    import reasoning_gym

    name, options = TASKS[task]
    return [
        {"prompt": [{"role": "user", "content": entry["question"]}], "answer": entry["answer"]}
        for entry in reasoning_gym.create_dataset(name, size=size, seed=seed, **options)
    ]


def last_number(text: str) -> str | None:
    """The last number that a text holds, as it is written."""
    found = re.findall(r"-?\d+", text)
    return found[-1] if found else None


def right(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """1 where the last number is the answer, 0 elsewhere. Completions are texts or lists of messages."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [float(last_number(text) == expected) for text, expected in zip(texts, answer, strict=True)]


def digits(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """1 where the last number is the answer; elsewhere half the share of its characters that are right, read from the
    end, so that a sum that misses one digit teaches something, too. Completions are texts or lists of messages."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [_digits(last_number(text) or "", expected) for text, expected in zip(texts, answer, strict=True)]


def _digits(number: str, expected: str) -> float:
    if number == expected:
        return 1.0
    same = sum(a == b for a, b in zip(reversed(number), reversed(expected), strict=False))
    return 0.5 * same / max(len(number), len(expected))
