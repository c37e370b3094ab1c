"""8-bit pages in the CUDA kernels give the results of 16-bit pages with the same values."""

import pytest
import torch
from compare import backends_for, moved, name_of

from variant_kernels import append_paged_kv, paged_attention
from variant_kernels.kv_quantization import KV8_DTYPE, dequantize_kv
from variant_kernels.ops import paged_attention as paged

pytestmark = pytest.mark.skipif(
    "cuda" not in backends_for(paged.paged_attention_op.backends, torch.bfloat16, KV8_DTYPE),
    reason="needs the CUDA kernels on the device under test (VARIANT_CUDA_EMULATION, or a GPU)",
)


def written_pool(
    dtype: torch.dtype, head_dim: int, offset: int, size: float
) -> tuple[torch.Tensor, ...]:
    """Pages and scales with 45 tokens, and the slots past them NaN; rows ``offset`` bytes off."""
    generator = torch.Generator().manual_seed(7)
    heads, page_size, pages = 3, 8, 6
    shape = (2, pages, page_size, heads, head_dim)
    memory = torch.full((offset + torch.Size(shape).numel(),), 0x7F, dtype=torch.uint8)
    pool = memory[offset:].view(shape).view(KV8_DTYPE)
    # Heads that do not start at a multiple of four bytes.
    scales = torch.full((2, pages, page_size, heads + 2), 255, dtype=torch.uint8)[..., 1:-1]
    k, v = torch.randn(2, 1, 45, heads, head_dim, generator=generator).to(dtype) * size
    slots = torch.arange(45).view(1, 45)
    append_paged_kv(
        k, v, *pool, slots, k_scales_PNH=scales[0], v_scales_PNH=scales[1], backend="reference"
    )
    return (*pool, *scales)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize(
    ("head_dim", "offset"), [(64, 0), (24, 0), (64, 8), (48, 1), (256, 0)], ids=str
)
@pytest.mark.parametrize("tokens", [3, 20])
def test_result_is_that_of_the_same_numbers_in_wide_pages(dtype, head_dim, offset, tokens):
    # The last: near the end of float16's range.
    for size in (1.0, 1e-3, 1e4):
        k, v, k_scales, v_scales = written_pool(dtype, head_dim, offset, size)
        wide = [dequantize_kv(k, k_scales, dtype), dequantize_kv(v, v_scales, dtype)]
        generator = torch.Generator().manual_seed(8)
        q = torch.randn(1, tokens, 3, head_dim, generator=generator).to(dtype) / size
        table = torch.arange(6, dtype=torch.int32).view(1, 6)
        lengths = torch.tensor([45], dtype=torch.int32)
        q, table, lengths, *pages = moved(q, table, lengths, k, v, k_scales, v_scales, *wide)
        ours = paged_attention(
            q,
            *pages[:2],
            table,
            lengths,
            k_scales_PNH=pages[2],
            v_scales_PNH=pages[3],
            backend="cuda",
        )
        expected = paged_attention(q, *pages[4:], table, lengths, backend="cuda")
        assert torch.isfinite(expected).all()
        if offset % 8 == 0 or dtype == torch.float32:
            assert torch.equal(ours, expected)
        else:
            # Plain products, beside tensor cores that round probabilities to 16 bits.
            error = (ours.double() - expected.double()).abs().max()
            assert error <= 2 * torch.finfo(dtype).eps * expected.double().abs().max()
