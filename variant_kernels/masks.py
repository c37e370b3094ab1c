"""Detect the block-causal mask of a layout in a dense attention bias.

Axes: L tokens of all scales.
"""

from __future__ import annotations

import weakref
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._C import (
    _are_functorch_transforms_active,
    _DisableFuncTorch,
    _len_torch_dispatch_stack,
)
from torch._C._functorch import is_functorch_wrapped_tensor, is_legacy_batchedtensor
from torch._guards import detect_fake_mode
from torch.autograd import forward_ad
from torch.compiler import is_exporting
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from variant_kernels.plans.scale_layout import ScaleLayout
from variant_kernels.untraced import untraced

# A model has one mask, or one for each stage of progressive training.
MAX_CACHED_LAYOUTS = 8


class _Verdict(NamedTuple):
    """What was found in a mask; bits: its content where a layout was found in a CPU tensor."""

    owner: weakref.ref[Tensor]
    version: int | None
    layout: ScaleLayout | None
    bits: np.ndarray | None


_cached_layouts: dict[tuple[Any, ...], _Verdict] = {}
# To compare contents bit by bit.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def layout_of(bias: Tensor) -> ScaleLayout | None:
    """The layout whose block-causal mask this bias is, or None.

    Token i attends to token j if and only if j's scale is not later than i's: the visible tokens of
    a row are a prefix that ends with the row's own scale. Additive masks consist of 0 and -inf,
    boolean masks of True and False. This reads every element and synchronises with a GPU.

    Args:
        bias: (..., L, L), the leading axes of size 1 or expanded.
    """
    while bias.ndim > 2:
        if bias.shape[0] == 0 or (bias.shape[0] > 1 and bias.stride(0) != 0):
            return None
        bias = bias[0]
    if bias.ndim != 2 or bias.shape[0] != bias.shape[1] or bias.shape[0] == 0:
        return None
    if bias.dtype != torch.bool and not bias.is_floating_point():
        return None  # no mask that torch's attention takes
    bias = bias.detach()
    visible_LL = bias if bias.dtype == torch.bool else bias == 0
    ends_L = visible_LL.sum(1)
    # Derive the scales from the row ends, then compare the whole mask with theirs.
    ends = sorted(set(ends_L.tolist()))
    if ends[0] < 1 or ends[-1] != bias.shape[0]:
        return None
    shapes = tuple((1, end - start) for start, end in pairwise([0, *ends]))
    own_end_L = torch.repeat_interleave(
        torch.tensor(ends, device="cpu"),
        torch.tensor([width for _, width in shapes], device="cpu"),
    ).to(bias.device)
    expected_LL = torch.arange(bias.shape[0], device=bias.device) < own_end_L.unsqueeze(1)
    if bias.dtype == torch.bool:
        same = torch.equal(bias, expected_LL)
    else:
        zero_LL = torch.zeros_like(bias)
        same = torch.equal(bias, zero_LL.masked_fill_(~expected_LL, -torch.inf))
    return ScaleLayout(shapes) if same else None


def block_causal_layout(bias: Tensor) -> ScaleLayout | None:
    """:func:`layout_of` with a cache: each mask is analysed once, not per layer and step.

    A cached result is valid for the same memory while the tensor that owns it exists unmodified. On
    the CPU the content is compared at every call (0.14 ms for 680 tokens in float32, 0.4 % of the
    attention of one sequence with 16 heads; AMD EPYC, one thread), because a write through
    ``.data`` or numpy does not change a tensor's version. A GPU would have to be waited for: there
    such writes are not noticed. A mask that is cast again at every step (as under autocast) is
    analysed once per step.

    Args:
        bias: the argument of attention. A bias that requires a gradient is learned, not a mask.
    Returns:
        A layout of scales (1, tokens), or None; None too for a mask without values, or
        from which derivatives are wanted.
    """
    if bias.requires_grad or is_exporting():  # what is exported is a graph for any mask
        return None
    return _cached_layout(bias)


def _has_values(bias: Tensor) -> bool:
    """Whether the content can be read: not on meta, of fake tensors, as in torch.export, where
    torch.jit traces, nor what torch.func's transforms take or make."""
    if torch._C._get_tracing_state() is not None:
        return False  # a trace holds for any mask
    if bias.is_meta or is_functorch_wrapped_tensor(bias) or is_legacy_batchedtensor(bias):
        return False
    if type(bias) in (Tensor, torch.nn.Parameter) and _len_torch_dispatch_stack() == 0:
        return True
    # What make_fx traces is a graph for any mask.
    modes = {type(mode).__name__ for mode in _get_current_dispatch_mode_stack()}
    return "ProxyTorchDispatchMode" not in modes and detect_fake_mode([bias]) is None


def _has_tangent(bias: Tensor) -> bool:
    """Whether a forward-mode derivative by the mask is wanted."""
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(bias).tangent is not None


# The result depends on values.
@untraced
def _cached_layout(bias: Tensor) -> ScaleLayout | None:
    # A lazily negated view has the address of the mask, and the other sign.
    if not _has_values(bias) or bias.is_neg() or _has_tangent(bias):
        return None  # torch's attention is right for any content
    if _are_functorch_transforms_active():
        with _DisableFuncTorch():  # else what is computed here has no memory
            return _looked_up(bias)
    return _looked_up(bias)


def _looked_up(bias: Tensor) -> ScaleLayout | None:
    owner = bias if bias._base is None else bias._base
    key = bias.data_ptr(), bias.shape, bias.stride(), bias.dtype, bias.device
    version = None if bias.is_inference() else bias._version
    known = _cached_layouts.get(key)
    if known is not None and known.owner() is owner and known.version == version:
        if known.bits is not None:
            if np.array_equal(known.bits, _bits(bias)):
                return known.layout
        elif version is not None:
            # Torch's attention, which serves a bias without a layout, is right for any content.
            return known.layout
    layout = layout_of(bias)
    bits = None if layout is None or bias.device.type != "cpu" else _bits(bias).copy()
    _cached_layouts[key] = _Verdict(weakref.ref(owner), version, layout, bits)
    # A list at once: an iterator would notice what another thread adds meanwhile.
    for oldest in list(_cached_layouts.keys())[:-MAX_CACHED_LAYOUTS]:
        _cached_layouts.pop(oldest, None)
    return layout


def _bits(bias: Tensor) -> np.ndarray:
    """The (L, L) content of a CPU tensor as integers, without a copy."""
    while bias.ndim > 2:
        bias = bias[0]
    return bias.detach().view(_BITS[bias.element_size()]).numpy()
