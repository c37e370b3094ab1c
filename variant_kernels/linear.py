"""Linear layers in training on a CPU: ``linear``, whose float32 products oneDNN computes.

torch takes MKL for float32. One thread of an AMD EPYC (Zen 4), 2720 rows, in GFLOP/s with MKL and
with oneDNN: 256 x 1024 weights 82 and 95, the gradient of its input 80 and 100; 1024 x 256: 82 and
102, 83 and 98. For the gradients of weights MKL is as fast (87 and 83). In 16 bits torch itself
takes oneDNN.

Axes: I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C import (
    _are_functorch_transforms_active,
    _get_tracing_state,
    _len_torch_dispatch_stack,
)
from torch._C._functorch import is_functorch_wrapped_tensor, is_legacy_batchedtensor
from torch.autograd import Function, forward_ad
from torch.compiler import is_compiling
from torch.nn import functional as F

_PLAIN = (Tensor, torch.nn.Parameter)


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether a kernel may take tensors by their addresses: they have values, as memory does.

    A lazily negated view has other values than its memory.
    """
    return has_values(*tensors) and not any(x is not None and x.is_neg() for x in tensors)


def has_values(*tensors: Tensor | None) -> bool:
    """Whether the values can be read now: of plain tensors on the CPU that are not empty.

    Not in a graph, also one that ``torch.jit`` traces, which has torch's own operators, nor where a
    dispatch mode watches them, such as torch's counter of FLOP. Those of ``vmap`` and of batched
    gradients have no address.
    """
    return (
        not is_compiling()
        and _get_tracing_state() is None
        and _len_torch_dispatch_stack() == 0
        and all(
            x is None
            or (
                type(x) in _PLAIN
                and x.is_cpu
                and x.numel() > 0
                and not is_functorch_wrapped_tensor(x)
                and not is_legacy_batchedtensor(x)
            )
            for x in tensors
        )
    )


def _is_for_onednn(*tensors: Tensor | None) -> bool:
    """Whether oneDNN computes a product: plain float32 tensors on the CPU, outside of autocast."""
    return (
        is_plain(*tensors)
        and all(x is None or x.dtype == torch.float32 for x in tensors)
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled("cpu")
    )


def product(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """:func:`linear` where no gradient is wanted: in the forward or backward pass of an op."""
    if not _is_for_onednn(x, weight_OI, bias_O):
        return F.linear(x, weight_OI, bias_O)
    bias_O = None if bias_O is None else bias_O.contiguous()  # its stride is not looked at
    return torch.ops.mkldnn._linear_pointwise(x, weight_OI, bias_O, "none", [], "")


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        return product(x, weight_OI, bias_O)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, weight_OI = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        grad = grad.contiguous()
        grad_RO = grad.reshape(-1, grad.shape[-1])  # flatten has no rule for is_grads_batched
        return (
            linear(grad, weight_OI.t()) if wants_x else None,
            grad_RO.t() @ x.flatten(0, -2) if wants_weight else None,
            grad_RO.sum(0) if wants_bias else None,
        )


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """``F.linear(x, weight, bias)`` with the faster library for float32 on a CPU.

    Args:
        x: (..., I), two axes or more for oneDNN.
        weight_OI: of any strides.  bias_O: or None.
    Returns:
        (..., O), a new tensor.
    Gradient: all three, also the second one.
    """
    if (
        not _is_for_onednn(x, weight_OI, bias_O)
        or x.ndim < 2
        or _are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    ):
        return F.linear(x, weight_OI, bias_O)
    return _Linear.apply(x, weight_OI, bias_O)  # type: ignore[return-value]
