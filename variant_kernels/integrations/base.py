"""Patch a model of another codebase in place, completely or not at all, and undo it.

A :class:`ModelFamily` recognises models by their structure, verifies them completely, and lists the
class swaps. Nothing of the other codebase is imported: an object gets a subclass of its own class,
so that parameters, names, hooks and ``isinstance`` keep working. alterations.py finds what other
tools changed before a patch, classes.py what they put on top of it.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import takewhile
from types import FunctionType
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from variant_kernels.arguments import boolean
from variant_kernels.integrations import alterations
from variant_kernels.integrations.claims import one_thread
from variant_kernels.integrations.classes import (
    added_names,
    class_without_patch,
    own_namespace,
    patched_class,
)
from variant_kernels.integrations.runtime import PatchError, Runtime, Stats
from variant_kernels.plans.depth_schedule import DepthSchedule

# The one entry that a patch adds to an object's __dict__.
STATE = "_variant_patch"
_ABSENT = object()


@dataclass(frozen=True)
class ClassSwap:
    """One object and the class that a patch gives it.

    target: the object; its new class derives from ``mixin`` and from its own class.
    mixin: a subclass of :class:`Patched`, whose methods override the object's own.
    attributes: set in the object's ``__dict__`` while it is patched; the previous values are
        restored.
    needed: whether the patch relies on the mixin's methods. If not, an object whose methods were
        replaced before is left as it is: it computes the same, only no faster.
    """

    target: Any
    mixin: type[Patched]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    needed: bool = True

    @property
    def methods(self) -> list[str]:
        """Names of the object's methods that the mixin replaces."""
        return replaced_methods(self.mixin, type(self.target))


def replaced_methods(mixin: type, original: type) -> list[str]:
    """Names of the methods of ``original`` that a mixin replaces."""
    ours = __name__.split(".")[0]
    kinds = [k for k in mixin.__mro__ if k.__module__.startswith(ours) and k is not Patched]
    names = {n for kind in kinds for n, v in vars(kind).items() if isinstance(v, FunctionType)}
    return sorted(name for name in names if hasattr(original, name))


@dataclass(frozen=True)
class PatchState:
    """State of one patched object: its name, classes and attributes, and the shared runtime."""

    name: str
    original: type
    patched: type
    mixin: type
    hidden: Mapping[str, Any]
    runtime: Any
    handle: Handle

    def original_dict(self, members: Mapping[str, Any]) -> dict[str, Any]:
        """The ``__dict__`` of the unpatched object, from that of the patched one."""
        plain = {name: value for name, value in members.items() if name != STATE}
        for name, value in self.hidden.items():
            if value is _ABSENT:
                plain.pop(name, None)
            else:
                plain[name] = value
        return plain


class Patched:
    """Mixin for the class of every patched object.

    Copies and pickles of a patched object are unpatched: a deep copy (for an average of the
    weights, say) may be patched itself, and a pickled model loads where this package is not
    installed.
    """

    @property
    def patch_state(self) -> PatchState:
        """The state that the patch stores in this object."""
        return self.__dict__[STATE]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        state = self.patch_state
        plain, members = _plain_class(self, state), state.original_dict(vars(self))
        if hasattr(plain, "__deepcopy__"):  # the object's class has its own
            twin = object.__new__(plain)
            twin.__dict__.update(members)
            copied = copy.deepcopy(twin, memo)
        else:
            copied = object.__new__(plain)
            memo[id(self)] = copied
            copied.__dict__.update(copy.deepcopy(members, memo))
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        members = self.patch_state.original_dict(cast(Any, self.__getstate__()))
        # Not copyreg.__newobj__: pickle requires it to create the object's current class.
        return object.__new__, (_plain_class(self, self.patch_state),), members


class ModelFamily(ABC):
    """A family of models: how to recognise, verify and patch them.

    name: the family's public name.  structure: what :meth:`recognise` looks for, for error
    messages.
    """

    name: ClassVar[str]
    structure: ClassVar[str]

    @abstractmethod
    def recognise(self, model: nn.Module) -> bool:
        """Whether the model's structure is that of this family; cheap, never raises."""

    @abstractmethod
    def verify(self, model: nn.Module) -> None:
        """Check everything that the class swaps rely on.

        Raises:
            PatchError: a requirement is not met; see :func:`require`.
        """

    @abstractmethod
    def runtime(self, model: nn.Module) -> Runtime:
        """A new runtime for a model that passed :meth:`verify`; patched objects share it."""

    @abstractmethod
    def class_swaps(self, model: nn.Module, runtime: Runtime) -> list[ClassSwap]:
        """The class swaps of a patch; this method changes nothing."""

    def module_names(self, model: nn.Module) -> dict[int, str]:
        """Names of the modules by their ``id``, for messages."""
        return alterations.readable_names(model)

    def probe(self, model: nn.Module) -> list[Tensor]:
        """Outputs of a small run, which must agree before and after the patch.

        This detects an edited forward, which the structure does not show. An implementation must
        leave the model unchanged and must not use a global random generator.
        """
        return []


def require(family: str, condition: bool, requirement: str, actual: Any) -> None:
    """Check one requirement.

    Raises:
        PatchError: the condition is false; names the family, the requirement and the actual value.
    """
    if not condition:
        found = " ".join(str(actual).split())  # of a module, which prints one line for each part
        raise PatchError(f"patch: the model looks like {family}, but {requirement}; found {found}")


class Handle:
    """Controls a patched model: depth, statistics, unpatching.

    As a context manager it unpatches the model at the end of the block.
    """

    def __init__(self, model: nn.Module, family: ModelFamily, runtime: Runtime) -> None:
        self.model, self.family = model, family.name
        self._runtime = runtime
        self._objects: list[Any] = []

    def __copy__(self) -> Self:
        return self

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a pickle of a patched model is unpatched, and so is the handle that it holds.
        return {**vars(self), "_runtime": None, "_objects": []}

    @property
    def patched(self) -> bool:
        """False after :meth:`unpatch`, and of a deep copy."""
        return bool(self._objects)

    def set_depth(
        self,
        depth: int | Sequence[int] | DepthSchedule | None = None,
        bridge: int | None = None,
    ) -> None:
        """Set the layers that later generations run.

        Args:
            depth: layers in the flexible zone, as a number or a list, or a
                :class:`DepthSchedule`; None is every layer.
            bridge: first scales that run every layer; None is 6 of 10, in proportion.
        Raises:
            TypeError: depth or bridge of another type.  ValueError: one of them out of range.
            PatchError: the model is unpatched.
        """
        self._check()
        self._runtime.set_depth(depth, bridge)

    def stats(self) -> Stats:
        """Time and K/V bytes of the last finished generation.

        Raises:
            PatchError: the model is unpatched or has not generated anything yet.
        """
        self._check()
        if self._runtime.last is None:
            raise PatchError("stats: nothing has been generated since the model was patched")
        return self._runtime.last

    def unpatch(self) -> None:
        """Take away what the patch brought; a second call does nothing.

        What other tools changed since stays: classes that they put on top, hooks, parameters.

        Raises:
            PatchError: a method was replaced since, perhaps by one that calls the patch's: the
                message names it. Or the model is generating: the rest would run without the K and V
                of the scales so far. Nothing has been changed.
        """
        with one_thread("unpatch", [*self.model.modules(), *self._objects]):
            if not self._objects:
                return
            if not self._runtime.close(self.model):
                raise PatchError(
                    "unpatch: the model is generating; unpatch it after that. Nothing has been "
                    "changed"
                )
            found = (_obstacle(target) for target in self._objects)
            obstacles = [text for text in found if text is not None]
            if obstacles:
                self._runtime.closed = False
                more = f" ({len(obstacles)} such changes)" if len(obstacles) > 1 else ""
                raise PatchError(f"unpatch: {obstacles[0]}{more}; nothing has been changed")
            for target in reversed(self._objects):
                _restore(target)
            self._objects = []

    def _check(self) -> None:
        if not self.patched:
            raise PatchError("this handle's model has been unpatched; patch it again")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.unpatch()

    def _apply(self, swaps: Iterable[ClassSwap], names: Mapping[int, str]) -> None:
        try:
            for swap in swaps:
                name = names.get(id(swap.target), type(swap.target).__name__) or "the model"
                _swap(swap, name, self._runtime, self)
                self._objects.append(swap.target)
        except BaseException:
            self.unpatch()
            raise


def _swap(swap: ClassSwap, name: str, runtime: Runtime, handle: Handle) -> None:
    target, members = swap.target, vars(swap.target)
    original = type(target)
    hidden = {attribute: members.get(attribute, _ABSENT) for attribute in swap.attributes}
    target.__class__ = patched = patched_class(swap.mixin, original)
    members[STATE] = PatchState(name, original, patched, swap.mixin, hidden, runtime, handle)
    members.update(swap.attributes)


def _plain_class(target: Any, state: PatchState) -> type:
    """The class of a patched object without the patch, but with what was put on top since.

    Raises:
        TypeError: a class on top cannot be built without the patch.
    """
    current = type(target)
    if current is state.patched:
        plain = class_without_patch(current)
        # A class of torch's above the patch's: the very class from before, unless it was changed.
        same = plain is state.original or own_namespace(plain) == own_namespace(state.original)
        return state.original if same else plain
    return class_without_patch(current)


def _obstacle(target: Any) -> str | None:
    """Why an object cannot be unpatched, or None."""
    state: PatchState = vars(target)[STATE]
    for name in replaced_methods(state.mixin, state.original):
        if name in vars(target):
            return (
                f"{state.name}.{name} was replaced since patch; restore it first "
                f"(del {state.name}.{name})"
            )
    added = added_names(state.patched)
    if added:
        return f"the class of {state.name} was changed since patch: it has {', '.join(added)}"
    try:
        _plain_class(target, state)
    except TypeError as error:
        return f"the class of {state.name} was wrapped since patch: {error}; undo that first"
    return None


def _restore(target: Any) -> None:
    members = vars(target)
    state: PatchState = members[STATE]
    plain, kind = state.original_dict(members), _plain_class(target, state)
    target.__class__ = kind
    for name in [name for name in members if name not in plain]:
        del members[name]
    members.update({name: plain[name] for name in state.hidden if name in plain})


def apply_patch(
    families: Sequence[ModelFamily],
    model: nn.Module,
    depth: int | Sequence[int] | DepthSchedule | None,
    bridge: int | None,
    keep_copies: bool = False,
) -> Handle:
    """Find the model's family, verify the model, then swap the classes; see ``patch``."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch: model must be a torch.nn.Module; got {type(model).__name__}")
    keep_copies = boolean("patch", "keep_copies", keep_copies)
    try:
        with one_thread("patch", model.modules()):
            family = _family_of(families, model)
            with _naming_the_failure(family, "its structure cannot be read"):
                family.verify(model)
                runtime = family.runtime(model)
            runtime.set_depth(depth, bridge, "patch")  # raises before anything is changed
            runtime.set_depth(None, None)
            handle = _patched(family, model, runtime)
            runtime.last, runtime.keep_copies = None, keep_copies
            runtime.set_depth(depth, bridge)
    except PatchError as error:
        raise PatchError(f"{error}; nothing has been changed") from error.__cause__
    return handle


def _family_of(families: Sequence[ModelFamily], model: nn.Module) -> ModelFamily:
    """The family of an unpatched, uncompiled model.

    Raises:
        PatchError: there is none, or the model cannot be patched as it is.
    """
    wrapped = alterations.wrapper_alteration(model, "model")
    if wrapped is not None:
        raise PatchError(f"patch: {wrapped}")
    family = next((f for f in families if f.recognise(model)), None)
    names = alterations.readable_names(model) if family is None else family.module_names(model)
    for module in model.modules():
        where = names[id(module)] or "the model"
        if isinstance(module, Patched):
            raise PatchError(
                f"patch: {where} is patched already, perhaps by another thread; use the handle of "
                "that patch, or call its unpatch() first"
            )
        if vars(module).get("caching") is True:
            raise PatchError(
                f"patch: {where} holds the keys and values of a generation, which is running or "
                "was interrupted; patch after it, or call kv_caching(False) on every such layer"
            )
        compiled = alterations.compilation(module)
        if compiled is not None:
            raise PatchError(
                f"patch: {where} is compiled by {compiled}, which keeps the unpatched forward; "
                "patch first, compile afterwards"
            )
        zones = module._modules.get("zones")
        if zones is not None and len(zones._modules) > 0:
            raise PatchError(
                f"patch: {where} has zone weights: other weights for the tokens of some scales, "
                "which a patch does not run; VARiant(var, vae).generate does"
            )
    if family is None:
        if any(kind.__module__.partition(".")[0] == "variant" for kind in type(model).__mro__):
            raise PatchError(
                f"patch: {type(model).__name__} is no model of another codebase and runs these "
                "kernels already; VARiant(var, vae).generate(labels) gives images"
            )
        structures = "; ".join(f"{f.name}: {f.structure}" for f in families)
        raise PatchError(
            f"patch: {type(model).__name__} does not have the structure of a known model family. "
            f"Known are {structures}"
        )
    remedy = "patch the model before it is distributed"
    altered = alterations.tensor_alteration(model, names, remedy)
    if altered is not None:
        raise PatchError(f"patch: {altered}")
    return family


def _patched(family: ModelFamily, model: nn.Module, runtime: Runtime) -> Handle:
    names = family.module_names(model)
    with _naming_the_failure(family, "its structure cannot be read"):
        swaps = _checked(family.class_swaps(model, runtime), names)
    with _naming_the_failure(family, "a short run of its layers failed"), kept_members(model):
        before = family.probe(model)
    if all(swap.target is not model for swap in swaps):
        swaps = [*swaps, ClassSwap(model, Patched)]  # marks the model as patched
    handle = Handle(model, family, runtime)
    with _naming_the_failure(family, "its classes cannot be extended"):
        handle._apply(swaps, names)
    try:
        with _naming_the_failure(family, "a short run of its patched layers failed"):
            with kept_members(model):
                after = family.probe(model)
            compare_outputs(family.name, before, after)
    except BaseException:
        handle.unpatch()
        raise
    return handle


def _checked(swaps: Iterable[ClassSwap], names: Mapping[int, str]) -> list[ClassSwap]:
    """The class swaps that can be made.

    Raises:
        PatchError: one that the patch relies on cannot be made.
    """
    swaps = list(swaps)
    needed = [
        (names[id(s.target)], s.attributes["patch_layer"], s.target)
        for s in swaps
        if "patch_layer" in s.attributes
    ]
    common = alterations.shared(needed)
    if common is not None:
        raise PatchError(f"patch: {common}")
    made: dict[int, ClassSwap] = {}
    for swap in swaps:
        where = names.get(id(swap.target), type(swap.target).__name__)
        found = (alterations.method_alteration(swap.target, m, where) for m in swap.methods)
        altered = next((text for text in found if text is not None), None)
        if altered is not None and swap.needed:
            raise PatchError(f"patch: {altered}")
        if altered is None:
            made.setdefault(id(swap.target), swap)  # a module with two names is one object
    return list(made.values())


@contextmanager
def _naming_the_failure(family: ModelFamily, what: str) -> Iterator[None]:
    """Any exception becomes a PatchError."""
    try:
        yield
    except PatchError:
        raise
    except Exception as error:
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        raise PatchError(
            f"patch: the model looks like {family.name}, but {what}: {text}"
        ) from error


@contextmanager
def kept_members(model: nn.Module) -> Iterator[None]:
    """Restores what is set on the model's modules meanwhile.

    Other threads may walk through the modules, so what torch's constructor sets first stays there.
    """
    kept = [(vars(module), dict(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for members, old in kept:
            pairs = zip(members, old, strict=False)
            same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            for name in list(members)[same:]:
                del members[name]
            members.update(old)


# Relative to the largest element: 20 times the effect of rounding, 1/100 of that of an edit.
_PROBE_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}


def compare_outputs(family: str, before: list[Tensor], after: list[Tensor]) -> None:
    """Check that two short runs gave the same.

    Raises:
        PatchError: a difference that rounding does not explain.
    """
    for index, (old, new) in enumerate(zip(before, after, strict=True)):
        limit = _PROBE_TOLERANCE.get(old.dtype, 0.05) * float(old.abs().max())
        difference = float((old - new).abs().max())
        require(
            family,
            old.shape == new.shape and difference <= limit,
            f"its layers must compute the same as that family's within {limit:.2g} (step {index} "
            "of a short run; has its forward been edited?)",
            f"a difference of {difference:.2g}",
        )
