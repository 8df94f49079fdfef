"""Callbacks: objects of the caller's that a run calls while it is under way.

A callback is any object with some of these methods; what they raise ends the run like a failing reward does.

    on_step_end(metrics, samples)   after each step: its line of metrics.jsonl, and its records of samples.jsonl
    on_checkpoint(step, folder)     after each checkpoint that has been written
    on_eval(metrics)                after each evaluation: its step, its eval/* and their errors (eval_error/*)

Where a run has several processes, the callbacks of the first one are called, and of the others those with the attribute
`every_process = True`: the same numbers, but times are the process's own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastkl.distributed.world import World
from fastkl.errors import UserError

HOOKS = ("on_step_end", "on_checkpoint", "on_eval")


def check_callbacks(callbacks: Iterable[object]) -> tuple[object, ...]:
    """The callbacks as a tuple. UserError for one that has none of the methods in HOOKS."""
    checked = tuple(callbacks)
    for callback in checked:
        if not any(callable(getattr(callback, hook, None)) for hook in HOOKS):
            raise UserError(
                f"callbacks: {callback!r} has none of {', '.join(HOOKS)}; give an object with one of these methods."
            )
    return checked


def speaking(callbacks: Iterable[object], world: World) -> tuple[object, ...]:
    """Those that are called in this process."""
    return tuple(c for c in callbacks if world.is_first or getattr(c, "every_process", False))


def notify(callbacks: Iterable[object], hook: str, *arguments: Any) -> None:
    """Calls the hook of every callback that has it."""
    for callback in callbacks:
        if (method := getattr(callback, hook, None)) is not None:
            method(*arguments)
