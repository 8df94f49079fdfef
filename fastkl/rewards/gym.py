"""The reward `gym`: reasoning-gym's own score of the answer in a completion, 0 to 1, for prompts from gym:TASK."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

from fastkl.gym import task_of

TAGGED = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL)
NUMBER = re.compile(
    r"(?:(?<![\w.)])[-+\N{MINUS SIGN}])?"  # a sign, and no operator between two numbers
    r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+)?"
)


def gym(
    completions: Sequence[Any],
    question: Sequence[str],
    answer: Sequence[str | None],
    metadata: Sequence[dict[str, Any]],
    task: Sequence[str],
    log_metric: Callable[[str, float], None],
) -> list[float]:
    """The score that the task gives to each completion's answer; partial credit where the task gives it.

    The scorers of some tasks raise on what they cannot read. That scores 0, and the metric gym_unreadable says how
    often it happened.
    """
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    scores = list(map(score_of, texts, question, answer, metadata, task))
    unreadable = scores.count(None)
    if unreadable:
        log_metric("gym_unreadable", unreadable / len(scores))
    return [score or 0.0 for score in scores]


def score_of(text: str, question: str, answer: str | None, metadata: dict[str, Any], task: str) -> float | None:
    """The task's score of the answer in `text`; None where its scorer raises."""
    entry = {"question": question, "answer": answer, "metadata": deepcopy(metadata)}  # which a scorer may change
    scorer = task_of(task).score_answer
    try:
        return float(scorer(answer_in(text, answer), entry))
    except Exception:  # scorers parse what the policy has written, each in its own way
        return None


def answer_in(text: str, oracle: str | None) -> str:
    """What is handed to the scorer: the last <answer>...</answer>; else, where the oracle's answer is a number, the
    last number; else the text. Without the space around it."""
    if tagged := TAGGED.findall(text):
        return tagged[-1].strip()
    if oracle is not None and NUMBER.fullmatch(oracle.strip()) and (numbers := NUMBER.findall(text)):
        return numbers[-1].replace("\N{MINUS SIGN}", "-")
    return text.strip()
