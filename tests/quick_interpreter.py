"""Triton's interpreter without repeated work: its runs of our kernels take a third less time.

Triton replaces the functions of ``triton.language`` by interpreted ones at every call of a function
within a kernel, though the launch has replaced them before: it looks at every attribute of four
modules and classes, thousands of times in a launch (Triton 3.9).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import ModuleType


def leave_out_repeated_patches() -> bool:
    """False, and no change, where this version of Triton works in another way."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch = getattr(interpreter, "_patch_lang", None)
    new_scope = getattr(interpreter, "_LangPatchScope", None)
    if patch is None or new_scope is None or not hasattr(tl.core, "is_builtin"):
        return False
    languages: dict[Callable[..., object], list[ModuleType]] = {}

    def is_patched(language: ModuleType) -> bool:
        """Triton marks its own functions as builtin, but not those that it puts in their place."""
        own = (language.load, language.tensor.__add__, tl.math.exp)
        return not any(tl.core.is_builtin(function) for function in own)

    def patch_once(function: Callable[..., object]) -> object:
        if function not in languages:
            languages[function] = [
                value
                for value in function.__globals__.values()
                if inspect.ismodule(value) and value in (tl, tl.core)
            ]
        known = languages[function]
        return new_scope() if known and all(map(is_patched, known)) else patch(function)

    interpreter._patch_lang = patch_once
    return True
