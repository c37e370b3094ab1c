"""Patching a model of another codebase in place: all of it or nothing, and back again.

A family of models says by which structure it is known, checks it completely, and lists which
objects get which behaviour. Nothing of the other codebase is imported: an object's class is swapped
for a subclass of itself, so that its parameters, names, hooks and ``isinstance`` stay.
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
    """A model that cannot be patched; says what was looked for and not found."""


@dataclass(frozen=True)
class Swap:
    """One object and what it becomes.

    target: its class becomes a subclass of its own class and of ``kind``.
    kind: a subclass of :class:`Patched`, whose methods come before the object's own.
    attributes: set in the object's ``__dict__`` meanwhile; what they hide is restored.
    """

    target: Any
    kind: type[Patched]
    attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PatchState:
    """What a patched object knows of its patch: its former self, and what all objects share."""

    original: type
    hidden: Mapping[str, Any]
    runtime: Any
    handle: Handle

    def undone(self, members: Mapping[str, Any]) -> dict[str, Any]:
        """An object's ``__dict__`` as it was before the patch."""
        plain = {name: value for name, value in members.items() if name != STATE}
        for name, value in self.hidden.items():
            if value is _ABSENT:
                plain.pop(name, None)
            else:
                plain[name] = value
        return plain


class Patched:
    """Mixed into the class of every object that a patch touches.

    A copy or a pickle of a patched object is the plain object: a deep copy (for an average of the
    weights, say) is not patched and may be patched itself, and a pickled model loads where this
    package is not installed.
    """

    @property
    def patch_state(self) -> PatchState:
        """Of this object."""
        return self.__dict__[STATE]

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = self.patch_state
        members = cast(Any, super()).__getstate__()
        # Not copyreg.__newobj__: pickle insists that it makes the class that the object has now.
        return object.__new__, (state.original,), state.undone(members)


@cache
def _swapped_class(kind: type[Patched], original: type) -> type:
    names = ("__module__", "__qualname__", "__doc__")
    return type(original.__name__, (kind, original), {n: getattr(original, n) for n in names})


class Family(ABC):
    """One family of models: how it is known, what it must look like, what becomes of it.

    name: as users know it.  sign: what :meth:`recognise` looks for, for error messages.
    """

    name: ClassVar[str]
    sign: ClassVar[str]

    @abstractmethod
    def recognise(self, model: nn.Module) -> bool:
        """Whether the model claims to be of this family; cheap, by structure, never raises."""

    @abstractmethod
    def verify(self, model: nn.Module) -> None:
        """Check all that the swaps rely on.

        Raises:
            PatchError: naming what was looked for and not found; see :func:`require`.
        """

    @abstractmethod
    def runtime(self, model: nn.Module) -> Runtime:
        """A new shared state for a model that passed :meth:`verify`."""

    @abstractmethod
    def swaps(self, model: nn.Module, runtime: Runtime) -> list[Swap]:
        """What becomes of which object; nothing is changed yet."""

    def probe(self, model: nn.Module) -> list[Tensor]:
        """Outputs of a small run, before and after the swaps: they must agree.

        Structure cannot tell whether a model's forward has been edited; this does. It must leave
        no trace in the model and draw from no global generator.
        """
        return []


def require(family: str, holds: bool, wanted: str, found: Any) -> None:
    """Raises: PatchError naming the family, what was looked for and what was found."""
    if not holds:
        raise PatchError(f"patch: the model looks like {family}, but {wanted}; found {found}")


class Handle:
    """A patched model: its depth, its figures, and the way back.

    As a context manager it unpatches at the end of the block.
    """

    def __init__(self, model: nn.Module, family: Family, runtime: Runtime) -> None:
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
        """Layers of the generations to come.

        Args:
            depth: layers in the flexible zone, as a number or a list; None is every layer.
            bridge: first scales that run every layer; None is 6 of 10, in proportion.
        Raises:
            ValueError: out of range.  RuntimeError: unpatched.
        """
        self._check()
        self._runtime.set_depth(depth, bridge)

    def stats(self) -> Stats:
        """Time and K/V bytes of the last finished generation.

        Raises: RuntimeError, unpatched or nothing generated yet.
        """
        self._check()
        if self._runtime.last is None:
            raise RuntimeError("stats: nothing has been generated since the model was patched")
        return self._runtime.last

    def unpatch(self) -> None:
        """Give every object its own class and attributes back; a second call does nothing."""
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

    def _apply(self, swaps: Iterable[Swap]) -> None:
        try:
            for swap in swaps:
                _swap(swap, self._runtime, self)
                self._objects.append(swap.target)
        except BaseException:
            self.unpatch()
            raise


def _swap(swap: Swap, runtime: Runtime, handle: Handle) -> None:
    target, members = swap.target, vars(swap.target)
    original = type(target)
    hidden = {name: members.get(name, _ABSENT) for name in swap.attributes}
    target.__class__ = _swapped_class(swap.kind, original)
    members[STATE] = PatchState(original, hidden, runtime, handle)
    members.update(swap.attributes)


def _restore(target: Any) -> None:
    members = vars(target)
    state: PatchState = members[STATE]
    plain = state.undone(members)
    target.__class__ = state.original
    for name in [name for name in members if name not in plain]:
        del members[name]
    members.update({name: plain[name] for name in state.hidden if name in plain})


def apply_patch(
    families: Sequence[Family],
    model: nn.Module,
    depth: int | Sequence[int] | None,
    bridge: int | None,
    keep_copies: bool = False,
) -> Handle:
    """Find the model's family, verify everything, then swap everything; see ``patch``."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch: model must be a torch.nn.Module; got {type(model).__name__}")
    for name, module in model.named_modules():
        where = f"its module {name!r}" if name else "it"
        if isinstance(module, Patched):
            raise PatchError(f"patch: {where} is patched already; call unpatch() on its handle")
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise PatchError(
                f"patch: {where} is compiled by Module.compile(), which keeps the old forward; "
                "patch first, compile afterwards"
            )
    family = next((f for f in families if f.recognise(model)), None)
    if family is None:
        looked_for = "; ".join(f"{f.name}: {f.sign}" for f in families)
        raise PatchError(
            f"patch: {type(model).__name__} is of no family that is supported. "
            f"Looked for {looked_for}"
        )
    family.verify(model)
    runtime = family.runtime(model)
    runtime.set_depth(depth, bridge)  # refused before anything is changed
    runtime.set_depth(None, None)
    swaps = family.swaps(model, runtime)
    before = family.probe(model)
    if all(swap.target is not model for swap in swaps):
        swaps = [*swaps, Swap(model, Patched)]  # so that the model itself knows
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


# Of the largest element: twenty times what rounding gives, a hundredth of what an edit gives.
_PROBE_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}


def _compare(family: str, before: list[Tensor], after: list[Tensor]) -> None:
    for index, (old, new) in enumerate(zip(before, after, strict=True)):
        limit = _PROBE_TOLERANCE.get(old.dtype, 0.05) * float(old.abs().max())
        apart = float((old - new).abs().max())
        require(
            family,
            old.shape == new.shape and apart <= limit,
            f"its layers must compute what that family's do (step {index} of a short run; has its "
            f"forward been edited?), within {limit:.2g}",
            f"{apart:.2g} of difference",
        )
