"""paged_attention by flash-attn: version 3 where installed (sm_90), else version 2.

Both read pages of ``(P, page_size, H, D)`` through an int32 table, as our pool has them.
B batch, T queries, H heads, D head width, P pages, N slots of a page, M page-table entries.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from variant_kernels.library_ops.installed import find_flash


def launch_paged_attention_forward(
    *,
    q_BTHD: torch.Tensor,
    k_pages_PNHD: torch.Tensor,
    v_pages_PNHD: torch.Tensor,
    page_table_BM: torch.Tensor,
    kv_lens_B: torch.Tensor,
    softmax_scale: float,
    consecutive: bool = False,
) -> torch.Tensor:
    """softmax(softmax_scale * q k^T) v over the first kv_lens_B[b] tokens of sequence b.

    consecutive changes nothing here: pages are always found in the table.

    Returns:
        out_BTHD, q's dtype.
    Raises:
        ImportError: flash-attn is not installed.
    """
    flash = find_flash(q_BTHD.device)
    if flash is None:
        raise ImportError("paged_attention: flash-attn is not installed")
    attend: Callable[..., Any] = importlib.import_module(flash.module).flash_attn_with_kvcache
    out_BTHD = attend(
        q_BTHD,
        k_pages_PNHD,
        v_pages_PNHD,
        cache_seqlens=kv_lens_B,
        softmax_scale=softmax_scale,
        causal=False,
        **{flash.table_argument: page_table_BM},
    )
    return out_BTHD[0] if isinstance(out_BTHD, tuple) else out_BTHD
