"""Patch models of other codebases in place; models are recognised by their structure."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from variant_kernels.integrations.base import Handle, ModelFamily, PatchError, apply_patch
from variant_kernels.integrations.code import CoDeFamily
from variant_kernels.integrations.hart import HARTFamily
from variant_kernels.integrations.infinity import InfinityFamily
from variant_kernels.integrations.switti import SwittiFamily
from variant_kernels.integrations.var import VARFamily
from variant_kernels.plans.depth_schedule import DepthSchedule

# In order of precedence: the first family that recognises a model is used.
FAMILIES: tuple[ModelFamily, ...] = (
    InfinityFamily(),
    HARTFamily(),
    SwittiFamily(),
    CoDeFamily(),
    VARFamily(),
)


def patch(
    model: nn.Module,
    *,
    depth: int | Sequence[int] | DepthSchedule | None = None,
    bridge: int | None = None,
    keep_copies: bool = False,
) -> Handle:
    """Make a model of another codebase faster in place.

    The model keeps its parameters, their names, its checkpoint and its own generation function;
    at full depth it generates the same tokens. Everything is verified before any change.

    Args:
        model: the transformer itself (inside DDP: ``model.module``).
        depth: layers in the flexible zone, as a number or a list, or a :class:`DepthSchedule`
            (``variant.load_schedule`` reads one); None is every layer.
        bridge: first scales that run every layer; None is 6 of 10, in proportion.
        keep_copies: under autocast weights are cast once per generation and the copies are freed at
            its end. True keeps them, which is faster but takes that memory; a weight that is then
            changed through ``.data``, or by an optimizer's step in the replay of a CUDA graph, is
            not cast again, because torch does not record the change.
    Returns:
        :class:`Handle`; also a context manager.
    Raises:
        PatchError: a ValueError; the model is unknown, patched already, or changed in a way that
            the patch would undo: a method of a block replaced, a module compiled, wrapped or used
            twice, parameters distributed or on meta. The message names the module and the
            requirement that is not met; the model is unchanged.
        TypeError: an argument of another type.  ValueError: depth or bridge out of range.

    Threads may call it, ``unpatch`` and ``accelerate`` at the same time; no other thread may run
    the model meanwhile.
    """
    return apply_patch(FAMILIES, model, depth, bridge, keep_copies)


__all__ = ["FAMILIES", "Handle", "ModelFamily", "PatchError", "patch"]
