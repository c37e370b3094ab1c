"""The kernel launchers of an engine, one per op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from variant.models.var import VAR
from variant_kernels.dispatch.request import Request
from variant_kernels.dispatch.select import choose_name
from variant_kernels.ops import tables


class Launchers:
    """One launcher per op, called without the argument checks of the public functions.

    One choice for all scales and batches.

    Args:
        backend: a name, or "auto".
        device: type of the device.
        dtype: of the engine: of K and V unless ``kv_dtype`` is given.
        product_dtype: of activations; that of the engine, or float32.
        kv_dtype: of K and V; None is ``dtype``.
    Attributes:
        names: the backend of each op.
        pages_dtype: of K and V.
        attention_dtype: of q, k, v and the output of attention.
    Raises:
        ValueError: the backend is unknown or cannot run these dtypes.
    """

    def __init__(
        self,
        backend: str,
        device: str,
        dtype: torch.dtype,
        product_dtype: torch.dtype,
        var: VAR,
        page_size: int,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        op_tables, self.names = tables(), {}
        config = var.config
        head_dim, width = config.head_dim, config.embed_dim

        def pick(op: str, request: Request) -> Callable[..., Tensor]:
            self.names[op] = choose_name(op, op_tables[op], backend, request)
            return op_tables[op][self.names[op]].forward

        self.pages_dtype = kv_dtype or dtype
        # 8-bit pages take K and V of any dtype; others store what comes.
        dtype = dtype if kv_dtype is None else product_dtype
        self.attention_dtype = dtype
        # The residual stream is float32 in engines of every dtype.
        stream = Request(device, (torch.float32, product_dtype), row_width=width)
        self.adaln = pick("adaln_modulate", stream)
        self.gated_adaln = pick("gated_residual_adaln", stream)
        fused = Request(device, (dtype, torch.float32), head_dim, None, page_size, kv_dtype)
        self.norm_append = pick("qk_norm_append_paged_kv", fused)
        paged = Request(device, (dtype,), head_dim, None, page_size, kv_dtype)
        self.attention = pick("paged_attention", paged)
        vocab = config.vocab_size
        # Of logits that were divided by a temperature, which makes them float32.
        self.sample_float32 = pick(
            "sample_tokens", Request(device, (torch.float32,), row_width=vocab)
        )
        self.sample = pick("sample_tokens", Request(device, (product_dtype,), row_width=vocab))

    def query_norm(self, scale_mul_1H11: Tensor | None) -> tuple[dict[str, Any], dict[str, Any]]:
        """What ``norm_append`` and ``attention`` are told, apart from their tensors, of the norm.

        Where both are Triton's, attention normalises the queries as it loads them, and the append
        writes K and V only: at 64 images of VAR-d30 20 GB less for each generation.
        """
        names = {self.names[op] for op in ("qk_norm_append_paged_kv", "paged_attention")}
        if scale_mul_1H11 is None or names != {"triton"}:
            return {}, {}
        return {"norm_queries": False}, {"scale_mul_1H11": scale_mul_1H11}

    def left_sum(self, y_RTC: Tensor, gate_RC: Tensor) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the two ``gated_adaln`` of a layer are told, apart from their tensors, of a sum.

        Triton's first one need not write the stream after attention: the second adds the branch
        again as it adds that of the MLP, with the same rounding. At 64 images of VAR-d30 10 GB
        less for each generation.

        Args:
            y_RTC, gate_RC: of the first one.
        """
        if self.names["gated_residual_adaln"] != "triton":
            return {}, {}
        return {"store_sum": False}, {"earlier": (y_RTC, gate_RC)}

    @property
    def stores_scores(self) -> bool:
        """Whether attention gathers all visible K and V, and stores every score, in float32."""
        return self.names["paged_attention"] == "reference"

    @property
    def can_be_captured(self) -> bool:
        """Whether a graph can be captured: plain torch may synchronise, which a capture forbids."""
        return "reference" not in self.names.values()
