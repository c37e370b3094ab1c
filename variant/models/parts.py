"""The parts of a model: what its config asks for, and what is there.

A part may be removed, replaced, wrapped, or cast alone. What a model of the same config has tells
where. Functions that run the modules name a changed part when they fail (:func:`explains`): another
part in its place may well run. Those that read weights past the modules check before they start
(:func:`check_parts`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from inspect import isroutine
from itertools import takewhile
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from variant_kernels.arguments import shown, typed
from variant_kernels.dispatch.request import dtype_name
from variant_kernels.integrations.alterations import (
    is_equal,
    methods_on_instance,
    readable,
    settings_of,
)

Method = TypeVar("Method", bound=Callable[..., Any])

# What a call raises where a part is missing, is none of its class, or has other tensors.
FAILURES = (AttributeError, TypeError, ValueError, RuntimeError, KeyError, IndexError)
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
NAMES = {"VAR": "var", "VQVAE": "vae"}  # of a model in messages, by its class
# Methods that decide what a call computes: torch's convolutions and our blocks have a second one.
COMPUTING = ("forward", "_conv_forward", "compute")
MAX_TOLD = 3  # changes in a message


class SkipInit(TorchFunctionMode):
    """Skips the functions of ``torch.nn.init``.

    Meta tensors have no values to initialise, and drawing them imports torch._dynamo: 1.2 s of CPU.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


@dataclass(frozen=True)
class Change:
    """A part that is not what the config asks for.

    path: of the part, "" for the model.  rank: the lower, the more surely a call fails by it.
    text: names the part, what is expected and what came.
    """

    path: str
    rank: int
    error: type[Exception]
    text: str


MISSING, SHAPE, KIND, DEVICE, DTYPE = range(5)


def check_parts(
    op: str, models: Mapping[str, nn.Module], is_called: Callable[[str], bool] | None = None
) -> None:
    """Check that every part of the models is there, runs by the code of its class and fits.

    Args:
        models: VAR and VQVAE objects by the names that messages give them.
        is_called: of a path, whether the caller calls that module: then it may be of any class.
    Raises:
        TypeError: a part is missing or of another class.
        ValueError: a tensor of another shape, another number of layers, tensors on two devices.
    """
    for change in _changes(models, ()):
        called = is_called is not None and is_called(change.path)
        if change.rank != DTYPE and not (called and change.rank == KIND):
            raise change.error(f"{op}: {change.text}")
    for name, model in models.items():
        for path, tensor in model.named_parameters():
            if is_traceable_wrapper_subclass(tensor):
                raise TypeError(
                    f"{op}: {name}.{path} must be a plain tensor; got {typed(tensor)}. Gather or "
                    "dequantise the weights first"
                )


def check_saved(op: str, name: str, model: nn.Module) -> None:
    """Check that a model of its config that has its weights computes what it computes.

    Raises:
        TypeError, ValueError: as :func:`check_parts`, or for weights under other names, or for a
            setting of a part that is not the config's.
    """
    check_parts(op, {name: model})
    expected = expected_model(model)
    own, needed = model.state_dict().keys(), expected.state_dict().keys()
    other = [*sorted(own - needed), *sorted(needed - own)]
    if other:
        what = "has a weight that its config does not ask for" if own - needed else "lacks a weight"
        raise ValueError(
            f"{op}: {name} {what}, {shown(other[0])} (of {len(other)} such names); a model of its "
            "config could not load it. Remove parametrizations, wrappers and added parts first"
        )
    for path, part in expected.named_modules():
        found = vars(model.get_submodule(path))
        for setting, value in settings_of(part).items():
            if setting != "inplace" and not is_equal(found.get(setting, value), value):
                where = f"{name}.{readable(path)}".removesuffix(".")
                raise ValueError(
                    f"{op}: {where}.{setting} must be {value!r}, as {name}.config says; got "
                    f"{shown(found[setting])}, which a model loaded from the file would not have. "
                    "Set it back"
                )


def explains(op: str, *unused: str) -> Callable[[Method], Method]:
    """A method of a model, or of an object with ``var`` and ``vae``, names parts by which it fails.

    Args:
        op: names the method; errors whose text begins with it are those of its arguments.
        unused: parts that it does not use; of the VQ-VAE where there are two models.
    """

    def decorate(method: Method) -> Method:
        @wraps(method)
        def run(self: Any, *args: Any, **options: Any) -> Any:
            if torch.compiler.is_compiling():
                return method(self, *args, **options)
            with explained(op, self, unused):
                return method(self, *args, **options)

        return cast("Method", run)

    return decorate


@contextmanager
def explained(op: str, owner: Any, unused: Collection[str] = ()) -> Iterator[None]:
    """Within the block, an error that a changed part causes names it; see :func:`explains`.

    Raises:
        TypeError, ValueError: a part is not what the config asks for, and the block failed.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except FAILURES as error:
        told, cause = getattr(error, "part_changes", None), error
        if told is not None:  # by a method that this one called
            cause = error.__cause__ or error
        elif str(error).startswith(f"{op}: "):
            raise
        else:
            told = changes_of(owner, unused)
        if not told:
            raise
        what = shown_text(" ".join(f"{type(cause).__name__}: {cause}".split()))
        named = told[0].error(f"{op}: {_told(told)}. The call failed with {what}")
        named.part_changes = told  # type: ignore[attr-defined]  # an outer method names itself
        raise named from cause


@contextmanager
def unexplained() -> Iterator[None]:
    """Within the block, a caller's own code runs: no changed part is named for an error of it."""
    try:
        yield
    except FAILURES as error:
        if not hasattr(error, "part_changes"):
            error.part_changes = []  # type: ignore[attr-defined]
        raise


def changes_of(owner: Any, unused: Collection[str] = ()) -> list[Change]:
    """The changed parts, first those by which a call fails most surely.

    Args:
        owner: a VAR or VQVAE, or an object with one of each as ``var`` and ``vae``.
        unused: parts that do not count.
    """
    kind = _own_class(owner)
    if kind is None:
        models = {"var": owner.var, "vae": owner.vae}
    else:
        models = {NAMES[kind.__name__]: owner}
    return _sorted_changes(models, unused)


def raise_changes(op: str, var: Any) -> None:
    """Raises: TypeError or ValueError, if a part of a VAR is not what its config asks for."""
    changes = _sorted_changes({"var": var}, ())
    if changes:
        raise changes[0].error(f"{op}: {_told(changes)}")


def head_weight(op: str, var: Any) -> Tensor:
    """The weight (V, C) of the transformer's head, whose dtype and device are the model's.

    Raises:
        TypeError: there is none, as a part was removed or replaced.
    """
    weight = getattr(getattr(var, "head", None), "weight", None)
    if not isinstance(weight, Tensor):
        raise_changes(op, var)
        raise TypeError(f"{op}: var.head.weight must be a tensor; got {typed(weight)}")
    return weight


def _told(changes: Sequence[Change]) -> str:
    more = f"; and {len(changes) - MAX_TOLD} more" if len(changes) > MAX_TOLD else ""
    return "; ".join(change.text for change in changes[:MAX_TOLD]) + more


def shown_text(text: str, longest: int = 160) -> str:
    """A text, shortened."""
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def is_plain(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether a call of the module does what one of these classes does: no hooks, no other code."""
    own = module.__dict__
    return (
        any(isinstance(module, kind) and _computes_as(module, kind) for kind in kinds)
        and own.keys().isdisjoint(COMPUTING)
        and not own["_forward_hooks"]
        and not own["_forward_pre_hooks"]
        and "parametrizations" not in own["_modules"]
    )


# --- the comparison -------------------------------------------------------------------------------


def expected_model(model: nn.Module) -> nn.Module:
    """A model of the same config without values, on the meta device."""
    with torch.device("meta"), SkipInit():
        return _own_class(model)(cast("Any", model).config)


def _own_class(model: Any) -> Any:
    """VAR or VQVAE, of which the model's class may be a subclass; None for another object."""
    ours = (kind for kind in type(model).__mro__ if kind.__module__.startswith("variant.models."))
    return next((kind for kind in ours if kind.__name__ in NAMES), None)


def _sorted_changes(models: Mapping[str, nn.Module], unused: Collection[str]) -> list[Change]:
    return sorted(_changes(models, unused), key=lambda change: change.rank)


def _changes(models: Mapping[str, nn.Module], unused: Collection[str]) -> Iterator[Change]:
    for name, model in models.items():
        if not isinstance(model, nn.Module) or _own_class(model) is None:
            kind = next(kind for kind, known in NAMES.items() if known == name)
            came = type(model).__name__ if isinstance(model, nn.Module) else typed(model)
            yield Change("", MISSING, TypeError, f"{name} must be of type {kind}; got {came}")
            continue
        expected = expected_model(model)
        for part in unused:
            expected._modules.pop(part, None)
        yield from _changes_below(name, "", expected, model, is_root=True)
        yield from _mixed(name, expected, model)


def _changes_below(
    where: str, path: str, expected: nn.Module, found: nn.Module, *, is_root: bool = False
) -> Iterator[Change]:
    """The changes of a module and of the parts in it."""
    if not is_root and not _runs_as(found, type(expected)):
        kind = type(expected).__name__
        yield Change(path, KIND, TypeError, f"{where} must be of type {kind}; {_came(found, kind)}")
        return
    for name, tensor in (*expected._parameters.items(), *expected._buffers.items()):
        yield from _tensor_changes(f"{where}.{name}", path, tensor, getattr(found, name, None))
    names = list(expected._modules)
    if isinstance(expected, CONTAINERS) and (len(found._modules) != len(names)):
        what = "layers" if path == "blocks" else "parts"
        yield Change(
            path,
            MISSING,
            ValueError,
            f"{where} must have {len(names)} {what}, as {where.split('.')[0]}.config says; got "
            f"{len(found._modules)}"
            + (". A depth leaves layers out, and removes none" if path == "blocks" else ""),
        )
        return
    for name in names:
        inside = f"{where}[{name}]" if name.isdigit() else f"{where}.{name}"
        below, part = f"{path}.{name}".removeprefix("."), getattr(found, name, None)
        wanted = cast("nn.Module", expected._modules[name])
        if isinstance(part, nn.Module):
            yield from _changes_below(inside, below, wanted, part)
            continue
        if part is None and isinstance(wanted, CONTAINERS) and len(wanted._modules) == 0:
            continue  # empty in most models: `zones`
        came = "it was removed" if part is None else f"got {typed(part)}"
        text = f"{inside} must be of type {type(wanted).__name__}; {came}"
        yield Change(below, MISSING, TypeError, text)


def _tensor_changes(where: str, path: str, expected: Any, found: Any) -> Iterator[Change]:
    if expected is None:
        if found is not None:
            text = f"{where} must be None; got {typed(found)}"
            yield Change(path, SHAPE, ValueError, text)
    elif not isinstance(found, Tensor):
        came = "it was removed" if found is None else f"got {typed(found)}"
        text = f"{where} must be a tensor of shape {tuple(expected.shape)}; {came}"
        yield Change(path, MISSING, TypeError, text)
    elif found.shape != expected.shape:
        text = f"{where} must have shape {tuple(expected.shape)}; got {tuple(found.shape)}"
        yield Change(path, SHAPE, ValueError, text)
    elif expected.is_floating_point() and not found.is_floating_point():
        text = f"{where} must be of a floating-point dtype; got {dtype_name(found.dtype)}"
        yield Change(path, SHAPE, TypeError, text)


def _runs_as(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of the module computes what its class does with the same tensors."""
    if issubclass(kind, nn.Linear):
        base = nn.Linear
        # torch's own computes the same, torchao's for training the same with products of 8 bits.
        forwards = [k.forward for k in kind.__mro__ if issubclass(k, nn.Linear)]
        in_8_bits = type(module).__module__.startswith("torchao.float8")
        known = in_8_bits or type(module).forward in forwards
    else:
        base, known = kind, _computes_as(module, kind)
    return isinstance(module, base) and known and not methods_on_instance(module)


def _computes_as(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether the module's class has the code of a class of which it may be a subclass."""
    return all(getattr(type(module), n, None) is getattr(kind, n, None) for n in COMPUTING)


def overridden_methods(module: nn.Module, base: type[nn.Module]) -> list[str]:
    """The methods of ``base`` that a subclass overrides, without ``__init__`` and the like."""
    kind = type(module)
    names = sorted(name for name, value in vars(base).items() if isroutine(value))
    names = [name for name in names if not name.startswith("__")]
    return [name for name in names if getattr(kind, name, None) is not getattr(base, name)]


def has_method_of(module: nn.Module, base: type[nn.Module], name: str) -> bool:
    """Whether a call of this method runs the code of ``base``."""
    return getattr(type(module), name) is getattr(base, name) and (
        name not in methods_on_instance(module)
    )


def _came(module: nn.Module, kind: str) -> str:
    if type(module).__name__ == "OptimizedModule":
        return "it is compiled by torch.compile; put its _orig_mod there"
    methods = methods_on_instance(module)
    if methods:
        return f"its {methods[0]} was replaced on the instance; delete that attribute"
    if type(module).__name__ == kind:  # of the same name, elsewhere
        return f"got one of {type(module).__module__}"
    return f"got {type(module).__name__}"


def _mixed(name: str, expected: nn.Module, model: nn.Module) -> Iterator[Change]:
    """Tensors on another device, or of another dtype, than most of the model."""
    used = tuple(f"{part}." for part in (*expected._modules, *expected._parameters))
    tensors = {k: t for k, t in model.named_parameters() if f"{k}.".startswith(used)}
    if not tensors:
        return
    for rank, what, of in (
        (DEVICE, "on one device", lambda t: str(t.device)),
        (DTYPE, "of one dtype", lambda t: dtype_name(t.dtype)),
    ):
        counts = Counter(of(tensor) for tensor in tensors.values())
        most = counts.most_common(1)[0][0]
        others = [k.split(".") for k, tensor in tensors.items() if of(tensor) != most]
        if not others:
            continue
        came = of(tensors[".".join(others[0])])
        common = [
            same[0] for same in takewhile(lambda c: len(set(c)) == 1, zip(*others, strict=False))
        ]
        parts = common or others[0]
        where = name + "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in parts)
        text = (
            f"the weights of {name} must be {what}; got {counts[came]} of {came} ({where}"
            f"{'' if common else ' and others'}) among {counts[most]} of {most}"
        )
        yield Change(".".join(parts), rank, ValueError, text)
