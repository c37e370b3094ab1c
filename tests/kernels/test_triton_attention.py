"""Features of the Triton attention kernels alone: bounds checks, block sizes."""

import pytest
import torch
from compare import DEVICE, Tally, moved, wide
from test_block_causal_attention import gradients, plain_attention

from variant_kernels import ScaleLayout, block_causal_attention
from variant_kernels.dispatch.request import Request
from variant_kernels.dispatch.support import triton_unsupported

reason = triton_unsupported(Request(DEVICE, (torch.float32,), 64))
if reason is not None:
    pytest.skip(f"{reason} (TRITON_INTERPRET=1 interprets)", allow_module_level=True)

from variant_kernels.triton_ops import block_causal_attention_configs as configs  # noqa: E402
from variant_kernels.triton_ops import paged_attention as paged  # noqa: E402
from variant_kernels.triton_ops.tuning import Config  # noqa: E402


def test_wrong_pages_and_lengths_stay_inside_the_pool():
    # The op checks values on the CPU only; on a GPU the kernel must stay inside the pool.
    q, pages = moved(torch.randn(2, 3, 2, 16), torch.randn(4, 4, 2, 16))
    table, lengths = moved(
        torch.tensor([[0, 10**9], [-(10**9), 2]], dtype=torch.int32),
        torch.tensor([10**9, -5], dtype=torch.int32),
    )
    clamped, whole = moved(
        torch.tensor([[0, 3], [0, 2]], dtype=torch.int32), torch.tensor([8, 0], dtype=torch.int32)
    )
    launch = paged.launch_paged_attention_forward
    given = {"q_BTHD": q, "k_pages_PNHD": pages, "v_pages_PNHD": pages, "softmax_scale": 0.25}
    ours = launch(page_table_BM=table, kv_lens_B=lengths, **given)
    expected = launch(page_table_BM=clamped, kv_lens_B=whole, **given)
    assert torch.equal(ours, expected)
    assert not ours[1].any()
    # Consecutive from the clamped first page on, to the end of the pool.
    for first, whole_table, length in ((-9, [[0, 1]], 8), (3, [[3, 0]], 4), (10**9, [[3, 0]], 4)):
        args = moved(*(torch.tensor(x, dtype=torch.int32) for x in ([[first, 7]], [10**9])))
        good = moved(*(torch.tensor(x, dtype=torch.int32) for x in (whole_table, [length])))
        given["q_BTHD"] = q[:1]
        ours = launch(page_table_BM=args[0], kv_lens_B=args[1], consecutive=True, **given)
        assert torch.equal(ours, launch(page_table_BM=good[0], kv_lens_B=good[1], **given))


@pytest.mark.parametrize("sides", [(4, 8), (1, 5, 6), (8,)])
@pytest.mark.parametrize("blocks", [(16, 32), (32, 16), (64, 64)])
def test_every_order_of_tiles_and_scales_matches_float64(sides, blocks, monkeypatch):
    # Boundaries on, inside and beyond tiles; tiles wider than the whole sequence.
    given = (Config(*blocks, 4, 1),)
    monkeypatch.setattr(configs, "configs_for", lambda table, x: given)
    layout = ScaleLayout.from_patch_nums(sides)
    generator = torch.Generator().manual_seed(7)
    packed = torch.randn(1, layout.total, 3, 2, 16, generator=generator)
    weight = torch.randn(1, layout.total, 2, 16, generator=generator)
    inputs, tally = packed.unbind(2), Tally()

    def ours(*leaves):
        return block_causal_attention(*leaves, layout, backend="triton")

    def plain(*leaves):
        return plain_attention(*leaves, layout)

    tally.add("out", ours(*moved(*inputs)).cpu(), plain(*inputs), plain(*wide(*inputs)))
    exact = gradients(plain, wide(*inputs), weight.double())
    expected = gradients(plain, inputs, weight)
    grads = gradients(ours, moved(*inputs), *moved(weight))
    for name, a, b, c in zip(("dq", "dk", "dv"), grads, expected, exact, strict=True):
        tally.add(name, a.cpu(), b, c, 3)
    tally.check()
