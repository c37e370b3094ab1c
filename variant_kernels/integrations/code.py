"""CoDe (czg1225/CoDe): a large VAR drafts the first scales, a small one refines the rest.

Both are the original VAR's classes with additional generation functions. The refiner processes the
draft in one call with the block-causal mask while caching, then continues scale by scale.
"""

from __future__ import annotations

from typing import NoReturn

from torch import nn

from variant_kernels.integrations.runtime import PatchError
from variant_kernels.integrations.var import PatchedAttention, VARFamily


class CoDeAttention(PatchedAttention):
    """``SelfAttention`` with CoDe's helpers for its beam search."""

    def update_cache_for_beams(self, num_beams: int) -> NoReturn:
        """Not supported, because pages are planned for one sequence per row.

        Raises:
            PatchError: always.
        """
        raise PatchError(
            "patch: CoDe's beam search repeats the cache within a generation, which planned pages "
            "do not support; call unpatch() before it"
        )

    def reset_cache(self) -> None:
        """Do nothing: the pages are freed when caching ends."""


class CoDeFamily(VARFamily):
    """czg1225/CoDe, drafter and refiner."""

    attention = CoDeAttention
    name = "CoDe"
    structure = (
        "that of VAR, with autoregressive_infer_cfg_draft and autoregressive_infer_cfg_refine"
    )

    def recognise(self, model: nn.Module) -> bool:
        draft = hasattr(model, "autoregressive_infer_cfg_draft")
        refine = hasattr(model, "autoregressive_infer_cfg_refine")
        return draft and refine and super().recognise(model)
