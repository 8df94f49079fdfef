"""The built-in reward functions; where a text shows what earned it, with the highlighter that marks its characters."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any

from fastkl.rewards.gym import gym

Span = tuple[int, int]  # characters [start, end)
Reward = Callable[..., list[float]]
Highlighter = Callable[[str], list[Span]]  # prompt + completion -> spans in reading order


BUILT_IN: dict[str, Reward] = {"gym": gym}
NONE = "none"
HIGHLIGHTERS: dict[str, Highlighter] = {}


def built_in(highlighter: Highlighter) -> Callable[[Reward], Reward]:
    """Makes a reward function known under its name, with what marks the text that earned it."""

    def register(reward: Reward) -> Reward:
        BUILT_IN[reward.__name__], HIGHLIGHTERS[reward.__name__] = reward, highlighter
        return reward

    return register


def no_reward(completions: Sequence[Any]) -> list[float]:
    """0 for every completion: what is learned comes from the KL alone."""
    return [0.0] * len(completions)


def alliterating_runs(text: str) -> list[Span]:
    """Spans of two or more adjacent words that start with the same letter, whatever its case."""
    spans = []
    for letter, group in groupby(_words(text), key=lambda word: word[0][0].lower()):
        words = list(group)
        if letter.isalpha() and len(words) > 1:
            spans.append((words[0].start(), words[-1].end()))
    return spans


@built_in(alliterating_runs)
def alliteration(prompts: Sequence[Any], completions: Sequence[Any]) -> list[float]:
    """Adjacent pairs of words (str.split of prompt + completion) that start with the same letter, case-insensitive."""
    return [float(_num_alliterating_pairs(text)) for text in map(_whole_text, prompts, completions)]


def words_with_a(text: str) -> list[Span]:
    """Spans of the words that start with a or A."""
    return [word.span() for word in _words(text) if word[0][0] in "aA"]


@built_in(words_with_a)
def starts_with_a(prompts: Sequence[Any], completions: Sequence[Any]) -> list[float]:
    """Words (str.split of prompt + completion) that start with a or A."""
    return [float(sum(word[0] in "aA" for word in text.split())) for text in map(_whole_text, prompts, completions)]


def reward_spans(reward_names: Iterable[str], text: str) -> list[Span]:
    """Spans of `text` that earned a reward, by the first of `reward_names` that can be shown; empty if none can."""
    return next((HIGHLIGHTERS[name](text) for name in reward_names if name in HIGHLIGHTERS), [])


def _num_alliterating_pairs(text: str) -> int:
    initials = [word[0].lower() for word in text.split()]
    return sum(first == second and first.isalpha() for first, second in zip(initials, initials[1:], strict=False))


def _whole_text(prompt: Any, completion: Any) -> str:
    """Prompt and completion as one text; of a chat, the assistant's words alone."""
    return prompt + completion if isinstance(prompt, str) else " ".join(message["content"] for message in completion)


def _words(text: str) -> list[re.Match[str]]:
    return list(re.finditer(r"\S+", text))
