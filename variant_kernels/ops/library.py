"""The library of ``torch.library`` that every op is defined in, and the tensors that none takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from variant_kernels.ops import contract

NAMESPACE = "variant_kernels"
# Dispatch keys of tensors without strides.
_OTHER_LAYOUTS = (
    *("SparseCPU", "SparseCUDA", "SparseCsrCPU", "SparseCsrCUDA", "MkldnnCPU"),
    *("NestedTensorCPU", "NestedTensorCUDA", "AutogradNestedTensor"),
)
LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def _is_lazy(x: Tensor) -> bool:
    """A view of which torch computes the values later: ``torch._neg_view``, ``conj``."""
    return x.is_neg() or x.is_conj()


def written_arguments(overload: Any) -> list[int]:
    """Positions of the arguments that an op writes in place."""
    aliases = [argument.alias_info for argument in overload._schema.arguments]
    return [i for i, alias in enumerate(aliases) if alias is not None and alias.is_write]


def define(
    schema: str, run: Callable[..., Any], fake: Callable[..., Any], tags: tuple[torch.Tag, ...]
) -> Any:
    """The callable overload of a new op; ``run`` serves every device.

    The dispatcher brings sparse and nested tensors, views that are not computed yet and vmap to
    kernels of their own, so an ordinary call pays nothing for them.
    """
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=tags)
    overload = getattr(getattr(torch.ops, NAMESPACE), name).default
    names = [argument.name for argument in overload._schema.arguments]
    written = written_arguments(overload)

    def refuse_layout(*args: Any) -> None:
        for argument, x in zip(names, args):  # noqa: B905
            if isinstance(x, Tensor):
                contract.check_tensor(name, argument, x)

    def refuse_vmap(*args: Any) -> None:
        raise NotImplementedError(f"{name}: has no vmap; make the mapped axis part of the batch")

    def resolve_views(*args: Any) -> Any:
        for i in written:
            if i < len(args) and args[i] is not None and _is_lazy(args[i]):
                text = "must not be a negated or conjugate view, because it is written in place"
                raise ValueError(f"{name}: {names[i]} {text}. Call .resolve_neg()")
        # Contiguous: the strides of a copy may be in another order than those of the view.
        resolved = [
            x.resolve_neg().resolve_conj().contiguous() if isinstance(x, Tensor) and _is_lazy(x)
            else x
            for x in args
        ]  # fmt: skip
        return overload(*resolved)

    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    for key in ("Negative", "Conjugate"):
        LIBRARY.impl(name, resolve_views, key)
    for key in _OTHER_LAYOUTS:
        LIBRARY.impl(name, refuse_layout, key)
    if written or torch.Tag.nondeterministic_seeded in tags:
        # torch's own rule, a loop over the mapped axis, serves the other ops.
        LIBRARY.impl(name, refuse_vmap, "FuncTorchBatched")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    return overload
