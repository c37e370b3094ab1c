"""Detect the block-causal mask of a layout in a dense attention bias.

Axes: L tokens of all scales.
"""

from __future__ import annotations

import weakref
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from variant_kernels.plans.scale_layout import ScaleLayout

# A model has one mask, or one for each stage of progressive training.
MAX_CACHED_LAYOUTS = 8

_cached_layouts: dict[tuple[Any, ...], tuple[weakref.ref[Tensor], ScaleLayout | None]] = {}


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
    bias = bias.detach()
    visible_LL = bias if bias.dtype == torch.bool else bias == 0
    ends_L = visible_LL.sum(1)
    # Derive the scales from the row ends, then compare the whole mask with theirs.
    ends = sorted(set(ends_L.tolist()))
    if ends[0] < 1 or ends[-1] != bias.shape[0]:
        return None
    shapes = tuple((1, end - start) for start, end in pairwise([0, *ends]))
    own_end_L = torch.repeat_interleave(
        torch.tensor(ends), torch.tensor([width for _, width in shapes])
    ).to(bias.device)
    expected_LL = torch.arange(bias.shape[0], device=bias.device) < own_end_L.unsqueeze(1)
    if bias.dtype == torch.bool:
        same = torch.equal(bias, expected_LL)
    else:
        zero_LL = torch.zeros_like(bias)
        same = torch.equal(bias, zero_LL.masked_fill_(~expected_LL, -torch.inf))
    return ScaleLayout(shapes) if same else None


def block_causal_layout(bias: Tensor) -> ScaleLayout | None:
    """:func:`layout_of` with a cache, so that each mask is read once and not per layer and step.

    A cached result is valid for the same memory while the tensor that owns it exists unmodified. A
    mask that is cast again at every step (as under autocast) is read once per step.

    Args:
        bias: the argument of attention. A bias that requires a gradient is learned, not a mask.
    Returns:
        A layout of scales (1, tokens), or None.
    """
    if bias.requires_grad:
        return None
    return _cached_layout(bias)


# The result depends on values, so torch.compile must not trace it. torch.compiler.disable would
# import torch._dynamo (2 s of CPU) with this module.
@_disable_dynamo
def _cached_layout(bias: Tensor) -> ScaleLayout | None:
    if bias.is_inference():  # without a version, so a change could not be detected
        return layout_of(bias)
    owner = bias if bias._base is None else bias._base
    key = bias.data_ptr(), bias.shape, bias.stride(), bias.dtype, bias.device, bias._version
    entry = _cached_layouts.get(key)
    if entry is not None and entry[0]() is owner:
        return entry[1]
    layout = layout_of(bias)
    _cached_layouts[key] = weakref.ref(owner), layout
    while len(_cached_layouts) > MAX_CACHED_LAYOUTS:
        _cached_layouts.pop(next(iter(_cached_layouts)), None)
    return layout
