"""Chats to texts, by the model's chat template: a program that comes with the model and may never end, or write without
end. transformers runs it in a sandbox, from which it reaches nothing; here it gets its time and its length.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Mapping
from typing import Any

from fastkl.errors import UserError

MAX_SECONDS = 5.0  # for one chat; templates take less than a millisecond
MAX_CHARACTERS = 10_000_000  # of one chat's text


def is_chat(prompt: Any) -> bool:
    """Whether it is a list of messages, each with a role and a content."""

    def is_message(item: Any) -> bool:
        return isinstance(item, dict) and all(isinstance(item.get(key), str) for key in ("role", "content"))

    return isinstance(prompt, list) and bool(prompt) and all(map(is_message, prompt))


def has_template(tokenizer: Any) -> bool:
    """Whether chat messages can be rendered."""
    return bool(getattr(tokenizer, "chat_template", None))


def rendered(
    messages: list[dict[str, str]], where: str, tokenizer: Any, kwargs: Mapping[str, Any] | None = None
) -> str:
    """The chat rendered as the model's text, up to where the assistant's answer begins (or continues, if the last
    message is its own). kwargs: for the template. UserError where that is missing, refuses, or takes too long."""
    if not has_template(tokenizer):
        raise UserError(
            f"prompts: {where} holds chat messages, but the model's tokenizer has no chat template; use texts."
        )
    own_words = messages[-1]["role"] == "assistant"

    def render() -> str:
        return tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=not own_words,
            continue_final_message=own_words,
            **(kwargs or {}),
        )

    try:
        text = within(MAX_SECONDS, render)
    except TimeoutError:
        raise UserError(
            f"prompts: the model's chat template has not rendered {where} in {MAX_SECONDS:g} s; mend its chat_template."
        ) from None
    except Exception as failure:  # templates are programs and may raise anything
        raise UserError(f"prompts: the chat template refuses {where} ({failure}).") from failure
    if len(text) > MAX_CHARACTERS:
        raise UserError(
            f"prompts: the model's chat template makes {len(text):,} characters of {where}, more than "
            f"{MAX_CHARACTERS:,}; mend its chat_template."
        )
    return text


def within(seconds: float, call: Callable[[], str]) -> str:
    """call(), in a thread; TimeoutError where it takes longer than `seconds`, and the thread is told to end."""
    results: list[str] = []
    failures: list[BaseException] = []

    def work() -> None:
        try:
            results.append(call())
        except BaseException as failure:
            failures.append(failure)

    thread = threading.Thread(target=work, daemon=True)  # one that does not listen does not keep the process alive
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(TimeoutError))
        raise TimeoutError
    if failures:
        raise failures[0]
    return results[0]
