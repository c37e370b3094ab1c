"""HART (mit-han-lab/hart): refused, because equality with it could not be shown."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from variant_kernels.integrations.refused import RefusedFamily, first_block


class HARTFamily(RefusedFamily):
    """Its attention has ``qkv_proj`` and ``context_token``."""

    name: ClassVar[str] = "HART"
    sign: ClassVar[str] = (
        "patch_nums and blocks with attn.qkv_proj and attn.context_token (refused)"
    )
    reason: ClassVar[str] = (
        "its rotations and norms are computed by its compiled CUDA extension (hart_backend), "
        "without which its code cannot even be imported, so that equal tokens could not be shown. "
        "The single ops (qk_norm, append_paged_kv, paged_attention) can be used in it"
    )

    def recognise(self, model: nn.Module) -> bool:
        attn = getattr(first_block(model), "attn", None)
        return hasattr(model, "patch_nums") and all(
            hasattr(attn, part) for part in ("qkv_proj", "context_token")
        )
