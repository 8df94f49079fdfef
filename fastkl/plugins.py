"""A user's own function by name: package.module:function, or file.py:function.

Rewards, advantages and KL estimators are found here. Every message begins with the setting that named the function.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Collection
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from fastkl.errors import UserError, nearest


def is_named(name: str) -> bool:
    """Whether `name` has the form of a user's own function, place:function."""
    place, colon, attribute = name.rpartition(":")
    return bool(colon and place and attribute)


def find_function(setting: str, name: str, built_in: Collection[str] = ()) -> Callable[..., Any]:
    """The function that `name` names. UserError, beginning with `setting`, where there is none.

    built_in: names of the setting's own entries, for the message.
    """
    if name.endswith(".py") and Path(name).expanduser().is_file():
        functions = _functions(_module_from_file(setting, Path(name).expanduser()))
        there = f"It has {', '.join(functions)}; write {name}:{functions[0]}." if functions else "It has none."
        raise UserError(f"{setting}: {name!r} is a file; which function of it is meant? {there}")
    if not is_named(name):
        raise UserError(
            f"{setting}: unknown {name!r}.{nearest(name, built_in)} Use {', '.join(built_in)}, package.module:function "
            "or file.py:function."
        )
    place, _, attribute = name.rpartition(":")
    module = _module_from_file(setting, Path(place).expanduser()) if place.endswith(".py") else _module(setting, place)
    function: Any = module
    for part in attribute.split("."):
        if not hasattr(function, part):
            raise UserError(f"{setting}: {place!r} has no function {attribute!r}.{_what_there_is(module, attribute)}")
        function = getattr(function, part)
    if not callable(function):
        raise UserError(f"{setting}: {attribute!r} in {place!r} is no function but {type(function).__name__}.")
    return function


def _functions(module: ModuleType) -> list[str]:
    """The names of the module's own functions."""
    return [
        name
        for name, value in vars(module).items()
        if callable(value) and not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]


def _what_there_is(module: ModuleType, wanted: str) -> str:
    own = _functions(module)
    return f"{nearest(wanted, own)} It has {', '.join(own)}." if own else " It has no functions."


def _module_from_file(setting: str, path: Path) -> ModuleType:
    """A Python file as a module. Modules that lie beside it can be imported from it, as when Python runs the file."""
    if not path.is_file():
        raise UserError(f"{setting}: there is no file {str(path)!r}.")
    name = f"fastkl_user_{path.stem}_{abs(hash(path.resolve())):x}"
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
        _raise_import_error(setting, str(path), failure)
    return module


def _module(setting: str, name: str) -> ModuleType:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # the console script does not look there by itself
    try:
        return importlib.import_module(name)
    except BaseException as failure:
        if isinstance(failure, ModuleNotFoundError) and failure.name and name.startswith(failure.name):
            message = f"{setting}: there is no module {failure.name!r}; is its folder the current one?"
            raise UserError(message) from failure
        _raise_import_error(setting, name, failure)


def _raise_import_error(setting: str, place: str, failure: BaseException) -> NoReturn:
    if isinstance(failure, KeyboardInterrupt):
        raise failure
    raise UserError(f"{setting}: {place!r} cannot be imported ({summary(failure)}).") from failure


def summary(failure: BaseException) -> str:
    """The exception on one line, with the place in the user's file."""
    text = " ".join(str(failure).split())
    frames = [f for f in traceback.extract_tb(failure.__traceback__) if "importlib" not in f.filename]
    place = f", {Path(frames[-1].filename).name} line {frames[-1].lineno}" if len(frames) > 1 else ""
    return f"{type(failure).__name__}: {text[:200]}{place}"
