"""What changes a module's behaviour although its class's code stays: hooks, replaced methods,
compilation, sharding, wrappers.

A patch replaces methods of some modules and does the work of others, which it then passes by. Both
are right only where these modules do what their classes say.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from inspect import isroutine
from types import FunctionType
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

_WRAPPERS = {
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "FullyShardedDataParallel": "module",
    "OptimizedModule": "_orig_mod",
}
_REPLACEABLE: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.LayerNorm,
    nn.Identity,
    nn.SiLU,
    nn.Sequential,
)


def readable_names(model: nn.Module) -> dict[int, str]:
    """The name of every module of the model, as Python spells it, by its ``id``."""
    return {id(module): readable(path) for path, module in model.named_modules()}


def readable(path: str) -> str:
    """The name of a module as Python spells it: ``blocks.0.attn`` is ``blocks[0].attn``."""
    return re.sub(r"(^|\.)(\d+)", lambda m: f"[{m.group(2)}]", path)


# --- settings -----------------------------------------------------------------------------------

# Attributes of every module, and one that the original's generation sets and resets.
_OF_ALL_MODULES = frozenset({*vars(nn.Module()), "caching"})
_SCALARS = (bool, int, float, str)
_USUAL = frozenset(_SCALARS)  # found in less time than their subclasses


def is_setting(name: str, value: object) -> bool:
    """Whether an attribute of a module is a number, a text, or a tuple of them, of its own."""
    if name in _OF_ALL_MODULES:
        return False
    return isinstance(value, _SCALARS) or (
        isinstance(value, tuple) and all(isinstance(item, _SCALARS) for item in value)
    )


def settings_of(module: nn.Module) -> dict[str, Any]:
    """What decides, beside tensors and code, what a module computes: ``eps``, ``padding_mode``."""
    found = {}
    for name, value in vars(module).items():  # of every module, at each call of a live model
        if name not in _OF_ALL_MODULES:
            kind = type(value)
            usual = kind in _USUAL or (kind is tuple and _USUAL.issuperset(map(type, value)))
            if usual or is_setting(name, value):
                found[name] = value
    return found


def is_equal(one: object, other: object) -> bool:
    """Whether two values are equal; False for a tensor in the place of a number."""
    try:
        return bool(one == other)
    except (RuntimeError, TypeError, ValueError):  # of several elements
        return False


# --- at each call -------------------------------------------------------------------------------


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of this module runs hooks, its own or global ones."""
    own = module.__dict__
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def global_hooks() -> tuple[int, ...]:
    """Ids of torch's global forward hooks and forward pre-hooks, which every module's call runs."""
    return (*torch_module._global_forward_pre_hooks, *torch_module._global_forward_hooks)


class _Paused:
    """A global hook that does nothing in some threads.

    threads: of each such thread, the modules for which it runs all the same, by ``id``.
    """

    def __init__(self, hook: Callable[..., Any]) -> None:
        self.hook = hook
        self.threads: dict[int, set[int]] = {}

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        kept = self.threads.get(threading.get_ident())
        if kept is None or id(module) in kept:
            return self.hook(module, *args, **kwargs)
        return None


_PAUSING = threading.Lock()


@contextmanager
def without_global_hooks(but: Collection[nn.Module] = ()) -> Iterator[None]:
    """Within the block, global forward hooks do nothing in this thread.

    Args:
        but: modules for which they run.
    """
    thread, kept = threading.get_ident(), {id(module) for module in but}
    tables = (torch_module._global_forward_pre_hooks, torch_module._global_forward_hooks)
    paused: list[tuple[dict[int, Any], int, _Paused, set[int] | None]] = []
    try:
        with _PAUSING:
            for table in tables:
                for key, hook in list(table.items()):
                    # Another thread may have paused it.
                    hook = hook if isinstance(hook, _Paused) else _Paused(hook)
                    table[key] = hook
                    paused.append((table, key, hook, hook.threads.get(thread)))
                    hook.threads[thread] = kept
        yield
    finally:
        with _PAUSING:
            for table, key, hook, outer in paused:
                if outer is None:
                    del hook.threads[thread]
                else:
                    hook.threads[thread] = outer
                if not hook.threads and table.get(key) is hook:  # not removed meanwhile
                    table[key] = hook.hook


def is_altered(module: nn.Module) -> bool:
    """Whether a call does anything else than the ``forward`` of the module's class."""
    own = module.__dict__
    return "forward" in own or own.get("_compiled_call_impl") is not None or has_hooks(module)


@lru_cache(maxsize=1024)
def methods_of(kind: type[nn.Module]) -> frozenset[str]:
    """``forward``, and the names of all methods that are not torch's."""
    known = (k for k in kind.__mro__ if not k.__module__.startswith(("torch.", "builtins")))
    found = {name for k in known for name, value in vars(k).items() if isroutine(value)}
    return frozenset({"forward", *found})


def methods_on_instance(module: nn.Module) -> list[str]:
    """The methods of :func:`methods_of` that were replaced on the module itself, sorted.

    What ``torch.compile`` made of the class's own is none.
    """
    kind, own = type(module), module.__dict__
    names = sorted(own.keys() & methods_of(kind))
    return [name for name in names if not _is_compiled(own[name], getattr(kind, name))]


def _is_compiled(function: Any, method: Any) -> bool:
    """Whether ``torch.compile`` made it of the method of a class."""
    original = getattr(function, "_torchdynamo_orig_callable", None)
    original = getattr(original, "__wrapped__", original)  # a bound method, in a function of torch
    return getattr(original, "__func__", original) is method


def is_plain(module: nn.Module) -> bool:
    """Whether this is one of torch's own simple modules, with the forward that torch gave it."""
    return has_own_forward(type(module)) and not is_altered(module)


def has_own_forward(kind: type[nn.Module]) -> bool:
    """Whether this class of torch's has the forward that torch gave it."""
    return _OWN_FORWARD.get(kind) is kind.forward


def all_plain(root: nn.Module) -> bool:
    """:func:`is_plain` of a module and all modules in it."""
    return is_plain(root) and all(all_plain(child) for child in root.children())


def none_altered(root: nn.Module) -> bool:
    """Whether no module in ``root`` (which itself does not count) is altered."""
    return not any(is_altered(child) or not none_altered(child) for child in root.children())


def _is_own(kind: type, function: Any) -> bool:
    """Whether a function was written in this class, and not set on it afterwards.

    A wrapper by ``functools.wraps`` has the names of what it wraps, but its own code.
    """
    if not isinstance(function, FunctionType) or hasattr(function, "__wrapped__"):
        return False
    expected = f"{kind.__qualname__}.{function.__name__}"
    return (
        function.__module__ == kind.__module__
        and function.__qualname__ == expected
        and function.__code__.co_qualname == expected
    )


# Of classes whose forward another tool had replaced before this import: none, so never plain.
_OWN_FORWARD: dict[type[nn.Module], Any] = {
    kind: kind.forward for kind in _REPLACEABLE if _is_own(kind, vars(kind).get("forward"))
}


# --- before a patch -----------------------------------------------------------------------------


def method_alteration(module: nn.Module, name: str, where: str) -> str | None:
    """Why a method of this module is not the one of its class, or None.

    Found are methods set on the object, wrappers set on its class, and methods of a subclass that
    override those of the codebase's own class.
    """
    if name in vars(module):
        return (
            f"{where}.{name} was replaced on the instance (by hooks of a library, gradient "
            f"checkpointing or torch.compile); restore it first (del {where}.{name})"
        )
    owners = [kind for kind in type(module).__mro__ if name in vars(kind) and kind is not nn.Module]
    if not owners:
        return f"{where}.{name} is not defined by its class {type(module).__name__}"
    if len(owners) > 1:
        return (
            f"{where}.{name} is that of {owners[0].__name__}, which overrides that of "
            f"{owners[1].__name__} (has its forward been edited?)"
        )
    if not _is_own(owners[0], vars(owners[0])[name]):
        return (
            f"{owners[0].__name__}.{name} was replaced on the class of {where} (has its forward "
            "been edited?); restore it first"
        )
    return None


def wrapper_alteration(model: nn.Module, argument: str) -> str | None:
    """Whether this is a wrapper around the model; names the attribute to give instead."""
    for kind in type(model).__mro__:
        inner = _WRAPPERS.get(kind.__name__)
        if inner is not None and kind.__module__.startswith("torch."):
            then = ", and compile it afterwards" if inner == "_orig_mod" else ""
            return (
                f"{argument} is wrapped in {kind.__name__}; give {argument}.{inner}, the model in "
                f"it{then}"
            )
    return None


def compilation(module: nn.Module) -> str | None:
    """How this module was compiled, or None."""
    own = vars(module)
    if own.get("_compiled_call_impl") is not None:
        return "Module.compile()"
    if any(kind.__name__ == "OptimizedModule" for kind in type(module).__mro__):
        return "torch.compile"
    if hasattr(own.get("forward"), "_torchdynamo_orig_callable"):
        return "torch.compile (its forward)"
    return None


def is_sharded(module: nn.Module) -> bool:
    """Whether ``fully_shard`` has sharded this module."""
    return any(
        kind.__name__ == "FSDPModule" and kind.__module__.startswith("torch.distributed")
        for kind in type(module).__mro__
    )


def is_dtensor(tensor: Tensor | None) -> bool:
    """Whether a tensor is distributed over several processes."""
    return any(
        kind.__name__ == "DTensor" and kind.__module__.startswith("torch.distributed")
        for kind in type(tensor).__mro__
    )


def tensor_alteration(model: nn.Module, names: Mapping[int, str], remedy: str) -> str | None:
    """Why the model's tensors cannot be read, or None: without memory, or distributed.

    Distributed parameters in a module that ``fully_shard`` gathers at each call are no obstacle.

    Args:
        names: of the modules, by ``id``.
        remedy: follows in the message about distributed parameters.
    """
    if is_sharded(model):
        return f"the model was sharded by fully_shard; {remedy}"
    gathered = {id(part) for m in model.modules() if is_sharded(m) for part in m.modules()}
    for module in model.modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            where = f"{names[id(module)]}.{name}".removeprefix(".")
            if tensor is not None and tensor.is_meta:
                return f"{where} is on the meta device; load the weights first"
            if is_dtensor(tensor) and id(module) not in gathered:
                return f"{where} is a DTensor, which several processes share; {remedy}"
    return None


def shared(named: Iterable[tuple[str, int, Any]]) -> str | None:
    """Whether one of these modules is there at two layers.

    Args:
        named: name, layer and module of each.
    """
    first: dict[int, int] = {}
    for name, layer, target in named:
        if id(target) in first:
            return (
                f"{name} is one module at layers {first[id(target)]} and {layer}, which each need "
                "their own state"
            )
        first[id(target)] = layer
    return None
