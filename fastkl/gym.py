"""Tasks of reasoning-gym by address: chain_sum?size=2000&seed=1&min_terms=2.

The options are the fields of the task's own configuration: numbers, true, false, texts, and lists as JSON. Without
`seed` it is 0, so that an address names the same questions every time. Prompts (data/) and reward (rewards/) both come
here: a scorer may depend on the task's options.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import random
import types
import typing
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from functools import lru_cache
from typing import Any

from fastkl.address import check_options, name_and_options
from fastkl.errors import UserError, nearest

SIMPLE = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
LISTS = (list, tuple, Sequence)
EXAMPLE_OF_A_LIST = '["+", "-"]'


@lru_cache(maxsize=64)
def task_of(address: str) -> Any:
    """The task, a reasoning_gym ProceduralDataset. UserError for an unknown task, or options that it does not take."""
    name, given = name_and_options("prompts", address)
    tasks = _tasks(address)
    if name not in tasks:
        raise UserError(
            f"prompts: reasoning-gym has no task {name!r}.{nearest(name, tasks)} It has {len(tasks)}, such as "
            "chain_sum, letter_counting, simple_equations."
        )
    task, config = tasks[name]
    hints = typing.get_type_hints(config)
    fields = [field.name for field in dataclasses.fields(config)]
    check_options("prompts", f"gym:{name}", given, fields)
    options = {"seed": 0} | {key: _value(f"gym:{name}", key, text, hints[key]) for key, text in given.items()}
    try:
        return task(config(**options))
    except Exception as failure:  # each task checks in its own way, most by assertions
        reason = " ".join(str(failure).split()) or type(failure).__name__
        raise UserError(f"prompts: the task gym:{address} cannot be made ({reason}); correct its options.") from failure


def entries(address: str) -> Iterator[dict[str, Any]]:
    """Its entries, each with question, answer and metadata: the same ones every time, those of a task that draws from
    the global generator, too."""
    task = task_of(address)
    with _global_generator(task.seed):
        found = [task[index] for index in range(len(task))]
    return iter(found)


def first_seed_beyond(address: str, other: str) -> int | None:
    """The least seed with which `other` has no seed of a question in common with `address`; None where it has none now.

    Question n, from 0, of a task with the seed S is drawn with the seed S + n.
    """
    ours, theirs = task_of(address), task_of(other)
    meet = theirs.seed < ours.seed + len(ours) and ours.seed < theirs.seed + len(theirs)
    same = ours.config.__class__ is theirs.config.__class__
    return ours.seed + len(ours) if same and meet else None


def _tasks(address: str) -> dict[str, tuple[Any, Any]]:
    """Every task of the library and its configuration, by name."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its dependencies, about their own syntax
            return importlib.import_module("reasoning_gym.factory").DATASETS
    except ModuleNotFoundError as missing:
        raise UserError(
            f"prompts: gym:{address} needs {missing.name}, which is not installed; pip install 'fastkl[gym]' brings it."
        ) from missing


def _value(task: str, key: str, text: str, hint: Any) -> Any:
    """An option's text as its type: what can be checked is, anything else is read as JSON where it is JSON."""
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    members = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    known = [choice for member in members for choice in _choices(member)]
    if known:
        if text not in known:
            raise UserError(f"prompts: {key} of {task} is one of {', '.join(known)}, not {text!r}.")
        return hint(text) if isinstance(hint, type) else text
    if any(typing.get_origin(member) in LISTS for member in members):
        if not isinstance(value, list):
            raise UserError(f"prompts: {key} of {task} is a list, written as JSON ({EXAMPLE_OF_A_LIST}), not {text!r}.")
        return value
    kinds = [kind for kind in members if kind in SIMPLE or kind is type(None)]
    if kinds == [str]:
        return text
    fits = any(type(value) is kind or (kind is float and type(value) is int) for kind in kinds)
    if kinds and not fits:
        raise UserError(f"prompts: {key} of {task} is {SIMPLE[kinds[0]]}, not {text!r}.")
    return value


def _choices(hint: Any) -> list[str]:
    """The texts that an option of this type may be: an Enum's values or those of a Literal; none for any other."""
    if isinstance(hint, type) and issubclass(hint, Enum):
        return [str(member.value) for member in hint]
    return [str(choice) for choice in typing.get_args(hint)] if typing.get_origin(hint) is typing.Literal else []


@contextmanager
def _global_generator(seed: int) -> Iterator[None]:
    """Python's global generator begins at `seed`, and is as it was afterwards."""
    before = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(before)
