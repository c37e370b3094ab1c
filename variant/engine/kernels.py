"""The launchers that an engine calls, one per op."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from variant.models.var import VAR
from variant_kernels.dispatch.request import Request
from variant_kernels.dispatch.select import choose_name
from variant_kernels.ops import tables


class Kernels:
    """The launchers of one backend choice, called without the checks of the public functions.

    One choice for all scales and batches.
    dtype: of activations; pages_dtype: of K and V, ``dtype`` unless ``kv_dtype`` names 8 bits.
    """

    def __init__(
        self,
        backend: str,
        device: str,
        dtype: torch.dtype,
        var: VAR,
        page_size: int,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        found, self.names = tables(), {}
        config = var.config
        head_dim, width = config.head_dim, config.embed_dim

        def pick(op: str, request: Request) -> Callable[..., Tensor]:
            self.names[op] = choose_name(op, found[op], backend, request)
            return found[op][self.names[op]].forward

        # The residual stream is float32, whatever the engine's dtype.
        stream = Request(device, (torch.float32, dtype), row_width=width)
        self.adaln = pick("adaln_modulate", stream)
        self.gated_adaln = pick("gated_residual_adaln", stream)
        fused = Request(device, (dtype, torch.float32), head_dim, None, page_size, kv_dtype)
        self.norm_append = pick("qk_norm_append_paged_kv", fused)
        paged = Request(device, (dtype,), head_dim, None, page_size, kv_dtype)
        self.attention = pick("paged_attention", paged)
        self.sample = pick("sample_tokens", Request(device, (dtype,), row_width=config.vocab_size))
        self.pages_dtype = kv_dtype or dtype

    @property
    def gathers_pages(self) -> bool:
        """Whether attention copies all visible K and V before it starts."""
        return self.names["paged_attention"] == "reference"

    @property
    def can_be_captured(self) -> bool:
        """Plain torch is for looking into: it may wait for the device, which no graph can."""
        return "reference" not in self.names.values()
