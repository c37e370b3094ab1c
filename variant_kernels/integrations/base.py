"""Patch a model of another codebase in place, completely or not at all, and undo it.

A :class:`ModelFamily` recognises models by their structure, verifies them completely, and lists the
class swaps. Nothing of the other codebase is imported: an object gets a subclass of its own class,
so that parameters, names, hooks and ``isinstance`` keep working.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from variant_kernels.integrations.runtime import Runtime, Stats

# The one entry that a patch adds to an object's __dict__.
STATE = "_variant_patch"
_ABSENT = object()


class PatchError(ValueError):
    """The model cannot be patched; the message names the requirement that it does not meet."""


@dataclass(frozen=True)
class ClassSwap:
    """One object and the class that a patch gives it.

    target: the object; its new class derives from ``mixin`` and from its own class.
    mixin: a subclass of :class:`Patched`, whose methods override the object's own.
    attributes: set in the object's ``__dict__`` while it is patched; the previous values are
        restored.
    """

    target: Any
    mixin: type[Patched]
    attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PatchState:
    """State of one patched object: its original class and attributes, and the shared runtime."""

    original: type
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

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = self.patch_state
        members = cast(Any, super()).__getstate__()
        # Not copyreg.__newobj__: pickle requires it to create the object's current class.
        return object.__new__, (state.original,), state.original_dict(members)


@cache
def _patched_class(mixin: type[Patched], original: type) -> type:
    names = ("__module__", "__qualname__", "__doc__")
    return type(original.__name__, (mixin, original), {n: getattr(original, n) for n in names})


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
        raise PatchError(f"patch: the model looks like {family}, but {requirement}; found {actual}")


class Handle:
    """Controls a patched model: depth, statistics, unpatching.

    As a context manager it unpatches the model at the end of the block.
    """

    def __init__(self, model: nn.Module, family: ModelFamily, runtime: Runtime) -> None:
        self.model, self.family = model, family.name
        self._runtime = runtime
        self._objects: list[Any] = []

    @property
    def patched(self) -> bool:
        """False after :meth:`unpatch`."""
        return bool(self._objects)

    def set_depth(
        self, depth: int | Sequence[int] | None = None, bridge: int | None = None
    ) -> None:
        """Set the layers that later generations run.

        Args:
            depth: layers in the flexible zone, as a number or a list; None is every layer.
            bridge: first scales that run every layer; None is 6 of 10, in proportion.
        Raises:
            ValueError: depth or bridge out of range.  RuntimeError: the model is unpatched.
        """
        self._check()
        self._runtime.set_depth(depth, bridge)

    def stats(self) -> Stats:
        """Time and K/V bytes of the last finished generation.

        Raises:
            RuntimeError: the model is unpatched or has not generated anything yet.
        """
        self._check()
        if self._runtime.last is None:
            raise RuntimeError("stats: nothing has been generated since the model was patched")
        return self._runtime.last

    def unpatch(self) -> None:
        """Restore every object's class and attributes; a second call does nothing."""
        for target in reversed(self._objects):
            _restore(target)
        self._objects = []

    def _check(self) -> None:
        if not self.patched:
            raise RuntimeError("this handle's model has been unpatched; patch it again")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.unpatch()

    def _apply(self, swaps: Iterable[ClassSwap]) -> None:
        try:
            for swap in swaps:
                _swap(swap, self._runtime, self)
                self._objects.append(swap.target)
        except BaseException:
            self.unpatch()
            raise


def _swap(swap: ClassSwap, runtime: Runtime, handle: Handle) -> None:
    target, members = swap.target, vars(swap.target)
    original = type(target)
    hidden = {name: members.get(name, _ABSENT) for name in swap.attributes}
    target.__class__ = _patched_class(swap.mixin, original)
    members[STATE] = PatchState(original, hidden, runtime, handle)
    members.update(swap.attributes)


def _restore(target: Any) -> None:
    members = vars(target)
    state: PatchState = members[STATE]
    plain = state.original_dict(members)
    target.__class__ = state.original
    for name in [name for name in members if name not in plain]:
        del members[name]
    members.update({name: plain[name] for name in state.hidden if name in plain})


def apply_patch(
    families: Sequence[ModelFamily],
    model: nn.Module,
    depth: int | Sequence[int] | None,
    bridge: int | None,
    keep_copies: bool = False,
) -> Handle:
    """Find the model's family, verify the model, then swap the classes; see ``patch``."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch: model must be a torch.nn.Module; got {type(model).__name__}")
    for name, module in model.named_modules():
        where = f"module {name!r}" if name else "the model"
        if isinstance(module, Patched):
            raise PatchError(f"patch: {where} is patched already; call unpatch() on its handle")
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise PatchError(
                f"patch: {where} is compiled by Module.compile(), which keeps the unpatched "
                "forward; patch first, compile afterwards"
            )
    family = next((f for f in families if f.recognise(model)), None)
    if family is None:
        structures = "; ".join(f"{f.name}: {f.structure}" for f in families)
        raise PatchError(
            f"patch: {type(model).__name__} does not have the structure of a known model family. "
            f"Known are {structures}"
        )
    family.verify(model)
    runtime = family.runtime(model)
    runtime.set_depth(depth, bridge)  # raises before anything is changed
    runtime.set_depth(None, None)
    swaps = family.class_swaps(model, runtime)
    before = family.probe(model)
    if all(swap.target is not model for swap in swaps):
        swaps = [*swaps, ClassSwap(model, Patched)]  # marks the model as patched
    handle = Handle(model, family, runtime)
    handle._apply(swaps)
    try:
        _compare(family.name, before, family.probe(model))
    except BaseException:
        handle.unpatch()
        raise
    runtime.last, runtime.keep_copies = None, keep_copies
    runtime.set_depth(depth, bridge)
    return handle


# Relative to the largest element: 20 times the effect of rounding, 1/100 of that of an edit.
_PROBE_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}


def _compare(family: str, before: list[Tensor], after: list[Tensor]) -> None:
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
