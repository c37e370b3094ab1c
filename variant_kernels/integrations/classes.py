"""The classes of patched objects: made for a patch, and taken out again at its end.

Other tools change an object's class too: ``torch.nn.utils.parametrize`` and ``fully_shard`` put a
subclass on top, before a patch or after it. The class of a patch always comes below theirs, and
only that class is taken out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

# In the namespace of each class that a patch makes: the class that it was made from.
_ORIGINAL = "_variant_original"
# torch makes its classes in these modules: one of its own for each parametrized module, and one for
# each sharded class.
_PARAMETRIZED, _SHARDED = "torch.nn.utils.parametrize", "torch.distributed"
# Names that type() adds to a namespace, or the interpreter later: when annotations are read, and
# when an object is pickled or copied.
_OWN_NAMES = (
    *("__dict__", "__weakref__", "__static_attributes__", "__firstlineno__", "__slotnames__"),
    *("__annotations__", "__annotations_cache__", "__annotate__", "__annotate_func__"),
)
# By mixin and original.
_CLASSES: dict[tuple[type, type], type] = {}


def patched_class(mixin: type, original: type) -> type:
    """The class of a patched object: ``mixin`` over the object's own class, below torch's."""
    if original.__module__ == _PARAMETRIZED:  # of one object only: not worth caching
        return _over_torch(mixin, original)
    return _cached_class(mixin, original)


def _cached_class(mixin: type, original: type) -> type:
    made = _CLASSES.get((mixin, original))
    if made is None:  # of two threads that make it, both take that of the first
        made = _CLASSES.setdefault((mixin, original), _made_class(mixin, original))
    return made


def _made_class(mixin: type, original: type) -> type:
    if original.__module__.startswith(_SHARDED):
        return _over_torch(mixin, original)
    names = ("__module__", "__qualname__", "__doc__")
    namespace = {name: getattr(original, name) for name in names} | {_ORIGINAL: original}
    return type(original.__name__, (mixin, original), namespace)


def _over_torch(mixin: type, original: type) -> type:
    own = original.__bases__[-1]
    return _rebased(original, lambda base: patched_class(mixin, base) if base is own else base)


def class_without_patch(patched: type) -> type:
    """The class that an object has without its patch.

    Raises:
        TypeError: a class that was put on top since cannot be built without the patch.
    """
    original = vars(patched).get(_ORIGINAL)
    if original is not None:
        return original
    if not any(_ORIGINAL in vars(base) for base in patched.__mro__):
        return patched
    return _rebased(patched, class_without_patch)


def _rebased(kind: type, replace: Callable[[type], type]) -> type:
    """A copy of a class, with other bases."""
    namespace = own_namespace(kind)
    for name, value in namespace.items():
        code = getattr(value, "__code__", None)
        if code is not None and "__class__" in code.co_freevars:
            # super() without arguments is bound to the class that it was written in.
            raise TypeError(f"{kind.__name__}.{name} calls super(), so its bases cannot be changed")
    if kind.__module__ == _PARAMETRIZED:
        # torch adds it, unless a base has it, because its classes allow no pickles.
        namespace.setdefault("__deepcopy__", _deepcopy_members)
    bases = tuple(replace(base) for base in kind.__bases__)
    return type(kind)(kind.__name__, bases, namespace)


def _deepcopy_members(self: Any, memo: dict[int, Any]) -> Any:
    copied = object.__new__(type(self))
    memo[id(self)] = copied
    copied.__dict__.update(copy.deepcopy(vars(self), memo))
    return copied


def own_namespace(kind: type) -> dict[str, Any]:
    """What a class itself defines."""
    return {name: value for name, value in vars(kind).items() if name not in _OWN_NAMES}


def added_names(patched: type) -> list[str]:
    """Names that were set on the class of a patch since it was made."""
    if _ORIGINAL not in vars(patched):
        return []
    made = {"__module__", "__qualname__", "__doc__", _ORIGINAL, "__abstractmethods__"}
    return sorted(own_namespace(patched).keys() - made)
