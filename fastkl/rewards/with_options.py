"""Built-in rewards that take options: NAME?KEY=VALUE&KEY=VALUE, as `regex?pattern=\\d+` or `length?target=40`.

In: the options as text. Out: a reward function. Each maker's keywords are its options, with their types and defaults,
so a new reward is a function and its line in MAKERS. In a value %26 stands for & and %25 for %.
"""

from __future__ import annotations

import inspect
import logging
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, Literal, get_args, get_type_hints

from fastkl.address import check_options, name_and_options
from fastkl.errors import UserError

Reward = Callable[..., list[float | None]]
Unit = Literal["tokens", "words", "characters"]


def regex(*, pattern: str) -> Reward:
    """1 where the pattern (of Python's re) is found in the completion, else 0."""
    try:
        compiled = re.compile(pattern)
    except (re.error, RecursionError) as failure:
        raise UserError(f"reward: the pattern {pattern!r} is no regular expression ({failure}).") from failure

    def regex(completions: Sequence[Any]) -> list[float | None]:
        return [float(compiled.search(text_of(completion)) is not None) for completion in completions]

    return regex


def length(*, target: int, unit: Unit = "tokens") -> Reward:
    """-|n - target| / target for a completion of n tokens (the end of text among them), words or characters."""
    refuse_unless(target >= 1, "length", "target", target, "1 or more")

    def length(completions: Sequence[Any], completion_ids: Sequence[Sequence[int]]) -> list[float | None]:
        sizes = map(len, completion_ids) if unit == "tokens" else (size_in[unit](text_of(c)) for c in completions)
        return [-abs(n - target) / target for n in sizes]

    size_in: dict[str, Callable[[str], int]] = {"words": lambda text: len(text.split()), "characters": len}
    return length


def soft_overlong(*, max_tokens: int, cache: int) -> Reward:
    """0 up to max_tokens - cache tokens, falling evenly to -1 at max_tokens, -1 beyond (Yu et al. 2025, DAPO, eq. 13):

    0 where n <= L - C;  ((L - C) - n) / C where L - C < n <= L;  -1 where L < n.
    """
    refuse_unless(max_tokens >= 1, "soft_overlong", "max_tokens", max_tokens, "1 or more")
    refuse_unless(0 <= cache <= max_tokens, "soft_overlong", "cache", cache, f"0 to max_tokens ({max_tokens})")

    def soft_overlong(completion_ids: Sequence[Sequence[int]]) -> list[float | None]:
        over = [len(ids) - (max_tokens - cache) for ids in completion_ids]
        return [0.0 if n <= 0 else -1.0 if n > cache else -n / cache for n in over]

    return soft_overlong


def math_verify(*, answer: str = "answer") -> Reward:
    """1 where the completion's last answer equals the prompt's, by value (math-verify), else 0.

    answer: the column with the right one, as text or LaTeX; where it is no mathematics, the reward does not apply.
    """
    if find_spec("math_verify") is None:
        raise UserError("reward: math_verify needs the package math-verify; pip install 'fastkl[math]' brings it.")
    refuse_unless(answer.isidentifier(), "math_verify", "answer", repr(answer), "a column's name without spaces")

    def math_verify(completions: Sequence[Any], **columns: Sequence[Any]) -> list[float | None]:
        pairs = zip(completions, columns[answer], strict=True)
        return [equal_in_value(text_of(completion), right) for completion, right in pairs]

    names = ("completions", answer)
    parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names]
    math_verify.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return math_verify


FORMULA = re.compile(r"[\d\\^=+*/]")
"""What words have not: "the sky" between dollars would be a product of six variables."""


def equal_in_value(text: str, right: Any) -> float | None:
    """Whether the answer in `text` equals the right one, 1 or 0; None where the right one cannot be read."""
    from math_verify import parse, verify

    on_main = threading.current_thread() is threading.main_thread()
    limit = 5 if on_main else None  # seconds; it keeps them by signal.alarm, which other threads have not
    for name in () if on_main else ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).setLevel(logging.ERROR)  # a warning per answer that there is no limit
    gold = [] if right is None else parse(str(right), parsing_timeout=limit)
    if not gold and FORMULA.search(str(right)):
        gold = parse(f"${right}$", parsing_timeout=limit)
    if not gold:
        return None
    return float(verify(gold, parse(text, parsing_timeout=limit), timeout_seconds=limit))


MAKERS: dict[str, Callable[..., Reward]] = {
    maker.__name__: maker for maker in (regex, length, soft_overlong, math_verify)
}
"""Makers of reward functions by name; keywords are options."""


def make(address: str) -> Reward:
    """The reward function that NAME?KEY=VALUE&... describes. UserError for options that are unknown or missing."""
    name, given = name_and_options("reward", address)
    parameters = inspect.signature(MAKERS[name]).parameters
    check_options("reward", address, given, parameters)
    missing = [key for key, p in parameters.items() if p.default is p.empty and key not in given]
    if missing:
        example = "&".join(f"{key}={given.get(key, '...')}" for key in parameters if key in given or key in missing)
        raise UserError(f"reward: {address!r} does not say its {' and '.join(missing)}; write {name}?{example}")
    return MAKERS[name](**converted(address, given, get_type_hints(MAKERS[name])))


def converted(address: str, given: Mapping[str, str], hints: Mapping[str, Any]) -> dict[str, Any]:
    """The options as their types: texts, numbers, or one of several words. UserError for one that is not."""
    values: dict[str, Any] = {}
    for key, text in given.items():
        choices = get_args(hints[key])
        try:
            values[key] = text if choices else hints[key](text)
        except ValueError:
            raise UserError(f"reward: {key}={text} in {address!r} is not a number.") from None
        if (choices and text not in choices) or not text:
            wanted = f"one of {', '.join(choices)}" if choices else "not empty"
            raise UserError(f"reward: {key}={text} in {address!r} must be {wanted}.")
    return values


def refuse_unless(fits: bool, name: str, key: str, value: Any, wanted: str) -> None:
    """UserError for an option's value that is out of its range."""
    if not fits:
        raise UserError(f"reward: {key}={value} of {name} is out of range; it must be {wanted}.")


def text_of(completion: Any) -> str:
    """A completion as text; of a chat, the assistant's words."""
    return completion if isinstance(completion, str) else completion[-1]["content"]
