"""Features of the Triton attention kernels alone: bounds checks, block sizes."""

import pytest
import torch
from compare import DEVICE, DTYPES, Tally, moved, name_of, random_cases, wide
from test_block_causal_attention import gradients, plain_attention
from test_paged_attention import plain_attention as plain_paged
from test_paged_attention import random_case
from test_qk_norm import plain_qk_norm

from variant_kernels import ScaleLayout, block_causal_attention
from variant_kernels.dispatch.request import Request
from variant_kernels.dispatch.support import triton_unsupported
from variant_kernels.ops.qk_norm_append_paged_kv import sample_inputs as fused_inputs

reason = triton_unsupported(Request(DEVICE, (torch.float32,), 64))
if reason is not None:
    pytest.skip(f"{reason} (TRITON_INTERPRET=1 interprets)", allow_module_level=True)

from variant_kernels.triton_ops import block_causal_attention_configs as configs  # noqa: E402
from variant_kernels.triton_ops import paged_attention as paged  # noqa: E402
from variant_kernels.triton_ops import qk_norm_append_paged_kv as fused  # noqa: E402
from variant_kernels.triton_ops.tuning import Config  # noqa: E402

SERVED = [d for d in DTYPES if triton_unsupported(Request(DEVICE, (d,), 64)) is None]


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


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("dtype", SERVED, ids=name_of)
def test_queries_are_normalised_as_they_are_loaded(dtype, splits, monkeypatch):
    monkeypatch.setattr(paged, "num_splits", lambda *, tiles, **_: min(tiles, splits))
    tally, generator = Tally(), torch.Generator().manual_seed(8)
    for _ in random_cases(6):
        (q, k_pages, *rest), scale = random_case(dtype, generator)
        # Of any length, one of zero; keys are normalised when they are stored.
        q = q * torch.logspace(-2, 2, q.shape[1])[:, None, None].to(dtype)
        q[0, 0] = 0
        k_pages = torch.nn.functional.normalize(k_pages.float(), dim=-1).to(dtype)
        # The last is above the limit of log 100.
        scale_mul = torch.linspace(-1, 5, q.shape[2]).view(1, -1, 1, 1)

        def attend(q, k_pages, v_pages, *rest, scale_mul=scale_mul, scale=scale):
            wider = torch.promote_types(q.dtype, torch.float32)
            q, _ = plain_qk_norm(q, q, scale_mul.to(wider))
            return plain_paged(q, k_pages, v_pages, *rest, scale)

        v_pages, table, lengths = rest
        exact = attend(*wide(q, k_pages, v_pages), table, lengths)
        plain = attend(q, k_pages, v_pages, table, lengths)
        args = moved(q, k_pages, v_pages, table, lengths, scale_mul)
        names = "q_BTHD", "k_pages_PNHD", "v_pages_PNHD", "page_table_BM", "kv_lens_B"
        ours = paged.launch_paged_attention_forward(
            **dict(zip(names, args[:5], strict=True)), softmax_scale=scale, scale_mul_1H11=args[5]
        )
        # Together: a single case is decided by the luck of its largest score, up to 100.
        tally.add("all cases", ours.cpu(), plain, exact)
    tally.check()


@pytest.mark.parametrize("dtype", SERVED, ids=name_of)
def test_an_append_without_queries_stores_the_same_keys_and_values(dtype):
    for qkv, scale_mul, k_pages, v_pages, slots in fused_inputs(
        dtype, torch.Generator().manual_seed(9)
    ):
        stored = []
        for norm_queries in (True, False):
            args = moved(qkv, k_pages.clone(), v_pages.clone(), slots)
            q = fused.launch_qk_norm_append_paged_kv(
                qkv_BT3HD=args[0],
                scale_mul_1H11=None if scale_mul is None else moved(scale_mul)[0],
                k_pages_PNHD=args[1],
                v_pages_PNHD=args[2],
                slots_BT=args[3],
                norm_queries=norm_queries,
            )
            stored.append(args[1:3])
        assert q.data_ptr() == args[0].data_ptr()
        assert torch.equal(q.cpu(), qkv[:, :, 0])
        for ours, expected in zip(*stored, strict=True):
            assert torch.equal(ours, expected)


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
