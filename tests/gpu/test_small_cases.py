"""Every op once, at its smallest awkward size: for compute-sanitizer."""

import pytest
import torch

from variant_kernels import (
    ScaleLayout,
    adaln_modulate,
    block_causal_attention,
    gated_residual_adaln,
    paged_attention,
    qk_norm,
    qk_norm_append_paged_kv,
    sample_tokens,
)

DTYPES = [torch.float32, torch.bfloat16]


def randn(*shape, dtype):
    return torch.randn(shape, device="cuda").to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_block_causal_attention_both_ways(dtype):
    layout = ScaleLayout.from_patch_nums((1, 2, 3, 5))
    qkv = randn(2, layout.total, 3, 2, 40, dtype=dtype).requires_grad_()
    scale_mul = torch.zeros(1, 2, 1, 1, device="cuda", requires_grad=True)
    for scales in ({}, {"scale_mul_1H11": scale_mul}):
        block_causal_attention(*qkv.unbind(2), layout, **scales).float().sum().backward()
    assert torch.isfinite(qkv.grad).all()
    assert torch.isfinite(scale_mul.grad).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_append_and_paged_attention(dtype):
    pages = torch.full((2, 6, 5, 2, 24), torch.nan, device="cuda", dtype=dtype)
    table = torch.tensor([[4, 1], [0, 3]], device="cuda", dtype=torch.int32)
    slots = (table.long()[:, torch.arange(7) // 5] * 5) + torch.arange(7, device="cuda") % 5
    lens = torch.tensor([7, 7], device="cuda", dtype=torch.int32)
    qkv = randn(2, 7, 3, 2, 24, dtype=dtype)
    scale = torch.zeros(1, 2, 1, 1, device="cuda")
    q = qk_norm_append_paged_kv(qkv, scale, pages[0], pages[1], slots)
    out = paged_attention(q, pages[0], pages[1], table, lens)
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_append_and_paged_attention_in_8_bits(dtype):
    codes = torch.full((2, 6, 5, 3, 24), 0x7F, device="cuda", dtype=torch.uint8)
    k_pages, v_pages = codes.view(torch.float8_e4m3fn)
    k_scales, v_scales = torch.full((2, 6, 5, 3), 255, device="cuda", dtype=torch.uint8)
    table = torch.tensor([[4, 1], [0, 5]], device="cuda", dtype=torch.int32)
    slots = (table.long()[:, torch.arange(10) // 5] * 5) + torch.arange(10, device="cuda") % 5
    qkv = randn(2, 10, 3, 3, 24, dtype=dtype)
    scale = torch.zeros(1, 3, 1, 1, device="cuda")
    scales = {"k_scales_PNH": k_scales, "v_scales_PNH": v_scales}
    for scale_mul in (scale, None):
        for length in (7, 10):
            lens = torch.tensor([length, length], device="cuda", dtype=torch.int32)
            q = qk_norm_append_paged_kv(qkv, scale_mul, k_pages, v_pages, slots, **scales)
            assert torch.isfinite(paged_attention(q, k_pages, v_pages, table, lens, **scales)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_both_ways(dtype):
    x, y = (randn(2, 7, 72, dtype=dtype).requires_grad_() for _ in range(2))
    gate, scale, shift = (randn(2, 72, dtype=dtype).requires_grad_() for _ in range(3))
    out, h = gated_residual_adaln(x, y, gate, scale, shift)
    (adaln_modulate(out, scale, shift) + h).float().sum().backward()
    q, k = (randn(2, 7, 3, 24, dtype=dtype).requires_grad_() for _ in range(2))
    scale_mul = torch.zeros(1, 3, 1, 1, device="cuda", requires_grad=True)
    sum(t.float().sum() for t in qk_norm(q, k, scale_mul)).backward()
    assert all(torch.isfinite(t.grad).all() for t in (x, y, gate, scale, shift, q, k, scale_mul))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("entries", [3, 100, 4096])
def test_sampling(entries, dtype):
    logits = randn(4, 5, entries, dtype=dtype)
    tokens = sample_tokens(logits, guidance=1.5, top_k=900, top_p=0.9, seed=1)
    assert tokens.shape == (2, 5)
    assert 0 <= int(tokens.min()) <= int(tokens.max()) < entries
