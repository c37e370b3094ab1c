"""Switti (yandex-research/switti): not supported, because it has no K/V cache to page."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from variant_kernels.integrations.refused import RefusedFamily, first_block


class SwittiFamily(RefusedFamily):
    """Switti is recognised by ``use_ar``, and ``attn`` and ``cross_attn`` of its blocks."""

    name: ClassVar[str] = "Switti"
    structure: ClassVar[str] = "use_ar, patch_nums and blocks with attn and cross_attn (refused)"
    reason: ClassVar[str] = (
        "by default (use_ar=False) its self-attention attends to the current scale only and caches "
        "no keys and values, so there is no cache to plan; with use_ar=True its pipeline also "
        "truncates the cache within an image, when guidance ends, which planned pages do not "
        "support. The single ops (qk_norm, adaln_modulate) can be used in it"
    )

    def recognise(self, model: nn.Module) -> bool:
        block = first_block(model)
        parts = ("use_ar", "patch_nums")
        return all(hasattr(model, part) for part in parts) and all(
            hasattr(block, part) for part in ("attn", "cross_attn")
        )
