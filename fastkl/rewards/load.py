"""Reward functions by name: the built-in ones, and how to find the user's own in a module or a file."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from fastkl.errors import UserError, nearest
from fastkl.rewards.built_in import BUILT_IN


@dataclass(frozen=True, slots=True)
class RewardFunction:
    """A reward function with the name that metrics and messages use."""

    name: str
    function: Callable[..., Any]
    weight: float = 1.0


METRICS_OF_THE_TRAINER = ("raw", "std", "penalized")  # reward/raw and so on: no function may write over them


def load_rewards(names: Sequence[str], weights: Sequence[float] | None) -> tuple[RewardFunction, ...]:
    """The functions behind `--reward`, each under a name of its own. UserError where one cannot be found."""
    taken = list(METRICS_OF_THE_TRAINER)
    loaded = []
    for name, weight in zip(names, weights or [1.0] * len(names), strict=True):
        function = find_function(name)
        label = getattr(function, "__name__", type(function).__name__)
        taken.append(label)
        count = taken.count(label)
        loaded.append(RewardFunction(f"{label}-{count}" if count > 1 else label, function, float(weight)))
    return tuple(loaded)


def find_function(name: str) -> Callable[..., Any]:
    """The function behind a built-in name, package.module:function, or file.py:function. UserError if there is none."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    place, colon, attribute = name.rpartition(":")
    if not colon or not place or not attribute:
        raise UserError(
            f"reward: unknown {name!r}.{nearest(name, BUILT_IN)} Use {', '.join(BUILT_IN)}, package.module:function or "
            "file.py:function."
        )
    module = _module_from_file(Path(place).expanduser()) if place.endswith(".py") else _module(place)
    function: Any = module
    for part in attribute.split("."):
        if not hasattr(function, part):
            raise UserError(f"reward: {place!r} has no function {attribute!r}.{_what_there_is(module, attribute)}")
        function = getattr(function, part)
    if not callable(function):
        raise UserError(f"reward: {attribute!r} in {place!r} is no function but {type(function).__name__}.")
    return function


def _what_there_is(module: ModuleType, wanted: str) -> str:
    own = [
        name
        for name, value in vars(module).items()
        if callable(value) and not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]
    return f"{nearest(wanted, own)} It has {', '.join(own)}." if own else " It has no functions."


def _module_from_file(path: Path) -> ModuleType:
    """A Python file as a module. Modules that lie beside it can be imported from it, as when Python runs the file."""
    if not path.is_file():
        raise UserError(f"reward: there is no file {str(path)!r}.")
    name = f"fastkl_reward_{path.stem}_{abs(hash(path.resolve())):x}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader, path
    module = importlib.util.module_from_spec(spec)
    if str(path.resolve().parent) not in sys.path:
        sys.path.append(str(path.resolve().parent))
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as failure:
        del sys.modules[name]
        _raise_import_error(str(path), failure)
    return module


def _module(name: str) -> ModuleType:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # the console script does not look there by itself
    try:
        return importlib.import_module(name)
    except BaseException as failure:
        if isinstance(failure, ModuleNotFoundError) and failure.name and name.startswith(failure.name):
            raise UserError(f"reward: there is no module {failure.name!r}; is its folder the current one?") from failure
        _raise_import_error(name, failure)


def _raise_import_error(place: str, failure: BaseException) -> NoReturn:
    if isinstance(failure, KeyboardInterrupt):
        raise failure
    raise UserError(f"reward: {place!r} cannot be imported ({summary(failure)}).") from failure


def summary(failure: BaseException) -> str:
    """The exception on one line, with the place in the user's file."""
    text = " ".join(str(failure).split())
    frames = [f for f in traceback.extract_tb(failure.__traceback__) if "importlib" not in f.filename]
    place = f", {Path(frames[-1].filename).name} line {frames[-1].lineno}" if len(frames) > 1 else ""
    return f"{type(failure).__name__}: {text[:200]}{place}"
