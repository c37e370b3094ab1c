"""CoDe (czg1225/CoDe): a large VAR drafts the first scales, a small one refines the rest.

Both are the original VAR's classes with further generation functions. The refiner reads the draft
in one call, with the block-causal mask *while* its cache is on, and goes on scale by scale.
"""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn

from variant_kernels.integrations.var import PatchedAttention, VARFamily


class CoDeAttention(PatchedAttention):
    """``SelfAttention`` with CoDe's helpers for its beam search."""

    def update_cache_for_beams(self, num_beams: int) -> NoReturn:
        """Raises: RuntimeError; pages are planned for one sequence per row."""
        raise RuntimeError(
            "patch: CoDe's beam search repeats the cache inside a generation, which planned pages "
            "cannot; call unpatch() before it"
        )

    def reset_cache(self) -> None:
        """The pages are freed when caching ends; nothing is left to drop."""


class CoDeFamily(VARFamily):
    """czg1225/CoDe, drafter and refiner."""

    attention = CoDeAttention
    name = "CoDe"
    sign = "as VAR, and autoregressive_infer_cfg_draft and autoregressive_infer_cfg_refine"

    def recognise(self, model: nn.Module) -> bool:
        found: Any = model
        draft = hasattr(found, "autoregressive_infer_cfg_draft")
        refine = hasattr(found, "autoregressive_infer_cfg_refine")
        return draft and refine and super().recognise(model)
