"""Recognising the block-causal mask of a layout in a dense attention bias.

Axes: L tokens of all scales.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor

from variant_kernels.plans.scale_layout import ScaleLayout

# A model has one mask, or one for each stage of progressive training.
MAX_VERDICTS = 8

_verdicts: dict[tuple[Any, ...], tuple[weakref.ref[Tensor], ScaleLayout | None]] = {}


def layout_of(bias: Tensor) -> ScaleLayout | None:
    """The layout whose block-causal mask this bias is, or None.

    Token i sees token j iff j's scale is not later than i's: a row's visible tokens are a prefix,
    which ends where the row's own scale ends. Additive masks hold 0 and -inf, boolean ones True
    and False. Reads every element; on a GPU it waits for the device.

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
    # Scales from the ends alone; whether the mask is theirs is checked next, in full.
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
    """:func:`layout_of`, computed once for each mask and not once for each layer and step.

    A verdict holds for the same memory while the tensor that owns it lives and is unchanged. A mask
    that is cast anew at every step (as under autocast) is read once a step.

    Args:
        bias: argument of attention. A bias that requires a gradient is learned, so it is no mask.
    Returns:
        A layout of scales (1, tokens), or None.
    """
    if bias.requires_grad:
        return None
    return _outside_graphs(bias)


def _outside_graphs(bias: Tensor) -> ScaleLayout | None:
    # The answer depends on values, which no compiled graph knows. torch.compiler.disable imports
    # torch._dynamo (2 s of CPU), so the wrapper is created at the first mask, not at import.
    global _disabled
    if _disabled is None:
        _disabled = cast(Callable[[Tensor], ScaleLayout | None], torch.compiler.disable(_look_up))
    return _disabled(bias)


_disabled: Callable[[Tensor], ScaleLayout | None] | None = None


def _look_up(bias: Tensor) -> ScaleLayout | None:
    if bias.is_inference():  # has no version counter: a change could not be detected
        return layout_of(bias)
    owner = bias if bias._base is None else bias._base
    key = bias.data_ptr(), bias.shape, bias.stride(), bias.dtype, bias.device, bias._version
    entry = _verdicts.get(key)
    if entry is not None and entry[0]() is owner:
        return entry[1]
    verdict = layout_of(bias)
    _verdicts[key] = weakref.ref(owner), verdict
    while len(_verdicts) > MAX_VERDICTS:
        _verdicts.pop(next(iter(_verdicts)), None)
    return verdict
