"""Switti (yandex-research/switti): refused, because it does not cache what ``patch`` would page."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from variant_kernels.integrations.refused import RefusedFamily, first_block


class SwittiFamily(RefusedFamily):
    """Its blocks have ``attn`` and ``cross_attn``; the model says ``use_ar``."""

    name: ClassVar[str] = "Switti"
    sign: ClassVar[str] = "use_ar, patch_nums and blocks with attn and cross_attn (refused)"
    reason: ClassVar[str] = (
        "by default (use_ar=False) its self-attention sees the current scale only and caches no "
        "keys and values, so that there is no cache to plan; with use_ar=True its pipeline also "
        "cuts the cache in the middle of an image, when guidance ends, which planned pages do not "
        "follow. The single ops (qk_norm, adaln_modulate) can be used in it"
    )

    def recognise(self, model: nn.Module) -> bool:
        block = first_block(model)
        parts = ("use_ar", "patch_nums")
        return all(hasattr(model, part) for part in parts) and all(
            hasattr(block, part) for part in ("attn", "cross_attn")
        )
