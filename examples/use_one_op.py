"""Use single kernels in your own model: block-causal attention, and a paged cache.

    python examples/use_one_op.py

Axes: B sequences, L tokens of all scales, H heads, D width of one head.
"""

from __future__ import annotations

import torch

from variant_kernels import (
    CachePlan,
    DepthSchedule,
    PagedKVCache,
    ScaleLayout,
    append_paged_kv,
    block_causal_attention,
    explain,
    paged_attention,
)


def all_scales_at_once(qkv_BL3HD: torch.Tensor, layout: ScaleLayout) -> torch.Tensor:
    """Training: every token attends to its own scale and all earlier ones. Has a gradient."""
    return block_causal_attention(*qkv_BL3HD.unbind(2), layout)


@torch.no_grad()
def scale_by_scale(qkv_BL3HD: torch.Tensor, layout: ScaleLayout) -> torch.Tensor:
    """Generation: the same result, one scale at a time, through a planned cache."""
    batch, _, _, heads, head_dim = qkv_BL3HD.shape
    # One layer here; a real model has more, and may have fewer at its late scales.
    plan = CachePlan(layout, DepthSchedule.full(1, layout.num_scales))
    cache = PagedKVCache(plan, batch, heads, head_dim, qkv_BL3HD.dtype)
    outputs = []
    for scale in range(layout.num_scales):
        q, k, v = qkv_BL3HD[:, layout.slice(scale)].unbind(2)
        step = cache.open(0, scale)
        append_paged_kv(k, v, cache.k_pages, cache.v_pages, step.slots_BT)
        outputs.append(
            paged_attention(q, cache.k_pages, cache.v_pages, step.page_table_BM, step.kv_lens_B)
        )
        cache.close(0, scale)
    return torch.cat(outputs, dim=1)


def main() -> None:
    """Compare both ways on random input."""
    layout = ScaleLayout.from_patch_nums((1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
    qkv_BL3HD = torch.randn(2, layout.total, 3, 4, 64, requires_grad=True)
    out_BLHD = all_scales_at_once(qkv_BL3HD, layout)
    out_BLHD.sum().backward()
    difference = (scale_by_scale(qkv_BL3HD.detach(), layout) - out_BLHD).abs().max()
    print(f"backend: {explain('block_causal_attention')}")
    print(f"largest difference between one pass and scale by scale: {difference:.2g}")


if __name__ == "__main__":
    main()
