"""Other projects' own functions, imported from where those are installed, without what only their servers need."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType


class Hollow(ModuleType):
    """A module from which any name can be imported, and nothing be done with it."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def function_module(name: str, stand_ins: tuple[str, ...] = ()) -> ModuleType:
    """The module `name` of an installed package, without running the __init__.py of the packages above it (they import
    Ray or DeepSpeed). stand_ins: modules that it imports and that what is tested does not use; hollow while it is
    imported, if not installed.

    Raises ModuleNotFoundError if the package, or anything else that the module imports, is not installed.
    """
    if name in sys.modules:
        return sys.modules[name]
    top, *_ = parts = name.split(".")
    found = importlib.util.find_spec(top)
    if found is None:
        raise ModuleNotFoundError(f"{top} is not installed", name=top)
    root = Path(found.submodule_search_locations[0])
    for depth in range(1, len(parts)):
        parent = ".".join(parts[:depth])
        if parent not in sys.modules:
            sys.modules[parent] = bare = ModuleType(parent)
            bare.__spec__ = importlib.machinery.ModuleSpec(parent, None, is_package=True)
            bare.__path__ = bare.__spec__.submodule_search_locations = [str(root.joinpath(*parts[1:depth]))]
    missing = [stand_in for stand_in in stand_ins if importlib.util.find_spec(stand_in.split(".")[0]) is None]
    for stand_in in missing:
        sys.modules[stand_in] = Hollow(stand_in)
        sys.modules[stand_in].__spec__ = importlib.machinery.ModuleSpec(stand_in, None)
    try:
        return importlib.import_module(name)
    finally:
        for stand_in in missing:
            del sys.modules[stand_in]
