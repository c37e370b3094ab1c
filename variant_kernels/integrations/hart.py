"""HART (mit-han-lab/hart): not supported, because equal outputs could not be verified."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from variant_kernels.integrations.refused import RefusedFamily, first_block


class HARTFamily(RefusedFamily):
    """HART is recognised by ``qkv_proj`` and ``context_token`` of its attention."""

    name: ClassVar[str] = "HART"
    structure: ClassVar[str] = (
        "patch_nums and blocks with attn.qkv_proj and attn.context_token (refused)"
    )
    reason: ClassVar[str] = (
        "its compiled CUDA extension (hart_backend) computes its rotations and norms, and its code "
        "cannot be imported without it, so equal tokens could not be verified. "
        "The single ops (qk_norm, append_paged_kv, paged_attention) can be used in it"
    )

    def recognise(self, model: nn.Module) -> bool:
        attn = getattr(first_block(model), "attn", None)
        return hasattr(model, "patch_nums") and all(
            hasattr(attn, part) for part in ("qkv_proj", "context_token")
        )
