"""What an op answers to derivatives: a gradient, or a refusal that names the op.

The ``Autograd`` kernel is ours, not that of ``torch.library.register_autograd``, which drops
forward-mode tangents without a word, fails under ``torch.func.grad`` and ``jacrev``, and takes
longer: a call that records a gradient took 50.4 us with it and takes 39.9 us with this one
(``adaln_modulate`` of 16 floats, torch 2.13, one thread of an AMD EPYC).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import (
    _after_autograd_keyset,
    _any_requires_grad,
    _are_functorch_transforms_active,
    _AutoDispatchBelowAutograd,
    _is_fwd_grad_enabled,
)
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import Function, forward_ad
from torch.compiler import is_compiling

from variant_kernels.ops.library import LIBRARY, NAMESPACE, define


def _below_autograd(overload: Any, keyset: Any, args: tuple[Any, ...]) -> Any:
    with _AutoDispatchBelowAutograd():
        return overload.redispatch(keyset & _after_autograd_keyset, *args)


def differentiate(
    overload: Any, title: str, backward: Callable[..., Any], setup_context: Callable[..., None]
) -> None:
    """Give an op a gradient, and the refusal of forward-mode derivatives."""

    class Derivative(Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, *args: Any) -> Any:
            if _are_functorch_transforms_active():
                # apply turns both modes off for its own level; those below still need them.
                with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                    output = _below_autograd(overload, keyset, args)
            else:
                output = _below_autograd(overload, keyset, args)
            setup_context(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return None, *backward(ctx, *grads)

    one_level: Any = super(Function, Derivative)

    def kernel(keyset: Any, *args: Any) -> Any:
        if forward_ad._current_level >= 0:
            _refuse_tangents(title, args)
        if not (torch.is_grad_enabled() and _any_requires_grad(*args)):
            return _below_autograd(overload, keyset, args)
        if not _are_functorch_transforms_active():
            return Derivative.apply(keyset, *args)
        # The dispatcher calls this kernel once for each level of torch.func's transforms; apply
        # itself would begin with the first level again.
        with enable_single_level_autograd_function():
            return one_level.apply(keyset, *args)

    LIBRARY.impl(overload._schema.name.split("::")[1], kernel, "Autograd", with_keyset=True)


def _refuse_tangents(op: str, values: tuple[Any, ...]) -> None:
    for x in values:
        # An autograd.Function disables forward mode inside its own forward.
        if not (isinstance(x, Tensor) and _is_fwd_grad_enabled()):
            continue
        if forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(
                f"{op}: has no forward-mode derivative; use reverse mode (torch.autograd.grad, "
                "torch.func.vjp), or detach the argument"
            )


def _refuse_gradient(op: str) -> None:
    raise NotImplementedError(
        f"{op}: has no gradient, but an argument requires one; call it under "
        "torch.no_grad() or torch.inference_mode()"
    )


def refuse_derivatives(op: str, *values: Any) -> None:
    """Raise where an argument of an inference-only op requires a gradient or carries a tangent."""
    if is_compiling() or forward_ad._current_level >= 0 or _are_functorch_transforms_active():
        for x in values:
            if isinstance(x, Tensor):
                _derivative_free(x, op)
    elif torch.is_grad_enabled() and _any_requires_grad(*values):
        _refuse_gradient(op)


def _refuse_at_one_level(keyset: Any, x: Tensor, op: str) -> None:
    _refuse_tangents(op, (x,))
    if torch.is_grad_enabled() and x.requires_grad:
        _refuse_gradient(op)
    _below_autograd(_derivative_free, keyset, (x, op))


# torch.func's transforms nest, and a tensor shows its outermost level only. The dispatcher takes
# this op through all of them. An Autograd kernel of each inference-only op would do so too, but
# costs every call 3 us.
_derivative_free = define(
    "derivative_free(Tensor x, str op) -> ()", lambda x, op: None, lambda x, op: None, ()
)
LIBRARY.impl("derivative_free", _refuse_at_one_level, "Autograd", with_keyset=True)
torch.library.register_vmap(
    f"{NAMESPACE}::derivative_free",
    lambda info, in_dims, x, op: (_derivative_free(x, op), None),
    lib=LIBRARY,
)
