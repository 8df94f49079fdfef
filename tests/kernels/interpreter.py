"""Triton's interpreter, without what it does again at each call."""

from __future__ import annotations

import inspect
from functools import cache
from types import ModuleType

import triton.language as tl
from triton.runtime import interpreter


def call_without_patching_anew(self, *arguments, **options):
    """What a kernel's call of another function comes to; takes the place of InterpretedFunction.__call__.

    Triton's own first replaces every function of triton.language, which is more than half of all its time, although the
    launch has replaced those that kernels see, and the first call those that triton.language's own functions see.
    """
    if any(tl.core.is_builtin(language.load) for language in languages_of(self.fn)):
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*arguments, **options)


@cache
def languages_of(function) -> list[ModuleType]:
    """The modules whose functions are replaced, of those that a function sees."""
    return [value for value in function.__globals__.values() if inspect.ismodule(value) and value in (tl, tl.core)]
