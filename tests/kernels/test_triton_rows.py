"""Features of the Triton row kernels alone: blocks of rows, partial sums, bounds, long rows."""

import pytest
import torch
from compare import DEVICE, DTYPES, Tally, left_to_nightly, moved, name_of, wide
from test_adaln import compare as compare_adaln
from test_adaln import plain_gated
from test_qk_norm import gradients, plain_qk_norm
from test_qk_norm_append_paged_kv import written

from variant_kernels import gated_residual_adaln, qk_norm, sample_tokens
from variant_kernels.dispatch.request import Request
from variant_kernels.dispatch.support import MAX_ROW_WIDTH, triton_unsupported
from variant_kernels.ops import adaln

reason = triton_unsupported(Request(DEVICE, (torch.float32,), 64))
if reason is not None:
    pytest.skip(f"{reason} (TRITON_INTERPRET=1 interprets)", allow_module_level=True)

from variant_kernels.triton_ops import adaln as adaln_launchers  # noqa: E402
from variant_kernels.triton_ops import append_paged_kv as append  # noqa: E402
from variant_kernels.triton_ops import common, rows  # noqa: E402
from variant_kernels.triton_ops import qk_norm_append_paged_kv as fused  # noqa: E402
from variant_kernels.triton_ops.sample_tokens import launch_sample_tokens  # noqa: E402

SERVED = [
    dtype
    for dtype in DTYPES
    if triton_unsupported(Request(DEVICE, (dtype,), 64)) is None and not left_to_nightly(dtype)
]


def test_rows_too_long_for_a_program_are_refused_by_length():
    dtypes = (torch.float32,)
    assert triton_unsupported(Request(DEVICE, dtypes, row_width=MAX_ROW_WIDTH)) is None
    too_long = triton_unsupported(Request(DEVICE, dtypes, row_width=MAX_ROW_WIDTH + 1))
    assert too_long == "rows of 65,537 entries are longer than the 65,536 that it takes"


@pytest.mark.parametrize(
    ("count", "groups", "num_warps", "expected"),
    [(680, 128, 8, 136), (680, 128, 4, 80), (680, 2, 8, 8), (680, 3000, 1, 680), (1, 1, 32, 8)],
)
def test_parts_fill_the_chip_and_are_whole_blocks(count, groups, num_warps, expected):
    assert rows.rows_per_part(count, groups, 132, num_warps, 8) == expected


@pytest.mark.parametrize("processors", [1, 3, 1000])
@pytest.mark.parametrize("dtype", SERVED, ids=name_of)
def test_sums_over_many_parts_match_float64(processors, dtype, monkeypatch):
    monkeypatch.setattr(common, "num_processors", lambda device: processors)
    tally, generator = Tally(), torch.Generator().manual_seed(6)
    for tokens, width in ((67, 40), (300, 16), (130, 300)):
        x, y = torch.randn(2, 2, tokens, width, generator=generator).to(dtype)
        modulation = (0.5 * torch.randn(3, 2, width, generator=generator)).to(dtype)

        def op(*leaves):
            return gated_residual_adaln(*leaves, backend="triton")

        compare_adaln(tally, f"{tokens} x {width}", op, plain_gated, (x, y, *modulation), generator)
    tally.check()


@pytest.mark.parametrize("shape", [(0, 3, 16), (2, 0, 16), (2, 3, 0)])
def test_empty_tokens_give_empty_tokens_and_sums_of_zero(shape):
    x, y = moved(torch.ones(shape), torch.ones(shape))
    modulation = [t.requires_grad_() for t in moved(*torch.ones(3, shape[0], shape[2]))]
    out, h = gated_residual_adaln(x, y, *modulation, backend="triton")
    assert out.shape == h.shape == shape
    for grad in torch.autograd.grad(out.sum() + h.sum(), modulation):
        assert not grad.any()


def test_gradients_have_the_same_bits_every_time():
    generator = torch.Generator().manual_seed(7)
    x, y = moved(*torch.randn(2, 3, 100, 33, generator=generator))
    rows_BC = moved(*torch.randn(4, 3, 33, generator=generator))
    _, h, mean, rstd = adaln.gated_op.backends["triton"].forward(
        x_BTC=x, y_BTC=y, gate_BC=rows_BC[0], scale_BC=rows_BC[1], shift_BC=rows_BC[2], eps=1e-6
    )
    first, second = (
        adaln.gated_op.backends["triton"].backward(
            grad_x_out_BTC=h,
            grad_h_BTC=y,
            x_out_BTC=x,
            y_BTC=y,
            gate_BC=rows_BC[0],
            scale_BC=rows_BC[1],
            mean_BT=mean,
            rstd_BT=rstd,
        )
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("processors", [1, 1000])
@pytest.mark.parametrize("dtype", SERVED, ids=name_of)
def test_heads_over_several_programs_and_sums_over_many_parts_match_float64(
    processors, dtype, monkeypatch
):
    monkeypatch.setattr(common, "num_processors", lambda device: processors)
    monkeypatch.setattr(rows, "BLOCK_ENTRIES", 128)
    tally, generator = Tally(), torch.Generator().manual_seed(8)
    for heads, head_dim in ((5, 40), (9, 16), (3, 256)):
        packed = torch.randn(2, 17, 3, heads, head_dim, generator=generator).to(dtype)
        scale_mul = torch.linspace(-1, 5, heads).view(1, heads, 1, 1)
        inputs = packed[:, :, 0], packed[:, :, 1], scale_mul
        weights = [torch.randn(inputs[0].shape, generator=generator).to(dtype) for _ in range(2)]
        exact = gradients(plain_qk_norm, wide(*inputs), wide(*weights))
        plain = gradients(plain_qk_norm, inputs, weights)

        def op(*leaves):
            return qk_norm(*leaves, backend="triton")

        ours = gradients(op, moved(*inputs), moved(*weights))
        outputs = zip("qk", op(*moved(*inputs)), plain_qk_norm(*inputs), strict=True)
        for (name, a, b), c in zip(outputs, plain_qk_norm(*wide(*inputs)), strict=True):
            tally.add(f"{heads} x {head_dim} {name}", a.cpu(), b, c)
        for name, a, b, c in zip(("dq", "dk", "dscale"), ours, plain, exact, strict=True):
            tally.add(f"{heads} x {head_dim} {name}", a.cpu(), b, c, times=3)
    tally.check()


@pytest.mark.parametrize("value", [-torch.inf, -1e4, torch.nan])
def test_an_extreme_scale_gives_what_torch_gives(value):
    q, scale = moved(torch.ones(1, 1, 1, 16), torch.full((1, 1, 1, 1), value))
    ours, _ = qk_norm(q, q, scale, backend="triton")
    expected, _ = qk_norm(q, q, scale, backend="reference")
    assert torch.equal(ours.isnan(), expected.isnan())
    assert torch.equal(ours.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("norm", [True, False, None])
def test_slots_outside_the_pool_are_skipped(norm):
    # The ops check values on the CPU only; on a GPU the kernel must stay inside the pool.
    qkv = torch.randn(2, 3, 3, 2, 16, generator=torch.Generator().manual_seed(9))
    pages = torch.full((2, 3, 4, 2, 16), torch.nan)
    slots = torch.tensor([[12, 5, -2], [2**40, -(2**62), 0]])
    inside = torch.where((slots >= 0) & (slots < 12), slots, -1)
    names = ("k_pages_PNHD", "v_pages_PNHD", "slots_BT")
    target = dict(zip(names, moved(*pages.clone(), slots), strict=True))
    (moved_qkv,) = moved(qkv)
    if norm is None:
        append.launch_append_paged_kv(
            k_BTHD=moved_qkv[:, :, 1], v_BTHD=moved_qkv[:, :, 2], **target
        )
    else:
        scale = moved(torch.zeros(1, 2, 1, 1))[0] if norm else None
        fused.launch_qk_norm_append_paged_kv(qkv_BT3HD=moved_qkv, scale_mul_1H11=scale, **target)
    k = torch.nn.functional.normalize(qkv[:, :, 1], dim=-1) if norm else qkv[:, :, 1]
    for name, tokens in zip(names[:2], (k, qkv[:, :, 2]), strict=True):
        expected, ours = written(pages[0], inside, tokens), target[name].cpu()
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6, equal_nan=True)


def draw(logits_2BTV, **changes):
    """Launched directly, because the op refuses such rows on the CPU."""
    arguments = {
        "guidance": 1.5,
        "top_k": 40,
        "top_p": 0.9,
        "seed": 7,
        "position": 3,
        "exponential_RV": None,
    }
    (ids,) = moved(torch.arange(logits_2BTV.shape[0] // 2))
    (moved_logits,) = moved(logits_2BTV)
    arguments |= {"logits_2BTV": moved_logits, "image_ids_B": ids}
    return launch_sample_tokens(**{**arguments, **changes}).cpu()


@pytest.mark.parametrize("exponential", [False, True])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_nothing_can_be_drawn_from_gives_token_0_and_spoils_no_other(
    poison, exponential
):
    logits = torch.randn(4, 3, 50, generator=torch.Generator().manual_seed(10))
    numbers = torch.rand(6, 50, generator=torch.Generator().manual_seed(11)) + 0.1
    changes = {"exponential_RV": moved(numbers)[0]} if exponential else {}
    expected = draw(logits, **changes)
    logits[1, 2, 5 if poison == poison and poison > 0 else slice(None)] = poison
    expected[1, 2] = 0
    assert torch.equal(draw(logits, **changes), expected)


def test_guidance_and_seed_may_lie_in_memory():
    logits = torch.randn(4, 3, 50, generator=torch.Generator().manual_seed(12))
    for guidance, seed in ((1.3, 2**61 + 5), (0.0, 3)):
        if guidance == 0:
            logits[2:] = torch.nan
        in_memory = moved(torch.tensor(guidance, dtype=torch.float64), torch.tensor(seed))
        ours = draw(logits, guidance=in_memory[0], seed=in_memory[1])
        assert torch.equal(ours, draw(logits, guidance=guidance, seed=seed))


def test_the_last_place_of_a_sequence_and_the_longest_row_are_drawn():
    logits = torch.randn(2, 2, MAX_ROW_WIDTH, generator=torch.Generator().manual_seed(13))
    options = {"guidance": 1.5, "top_k": 1000, "top_p": 0.9, "seed": 5, "position": 2**32 - 2}
    ours = sample_tokens(*moved(logits), backend="triton", **options).cpu()
    assert torch.equal(ours, sample_tokens(logits, backend="reference", **options))


@pytest.mark.parametrize("shape", [(2, 3, 40), (1, 1, 33), (3, 5, 129)])
@pytest.mark.parametrize("dtype", SERVED, ids=name_of)
def test_a_sum_that_was_left_out_is_added_by_the_next_launch_bit_for_bit(dtype, shape):
    """The two launches of a layer, with and without the sum between them in memory."""
    batch, _, width = shape
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(shape, generator=generator).to(DEVICE, dtype)
    # Strided, as views of larger tensors are.
    pair = torch.randn(batch, shape[1], 2, width, generator=generator).to(DEVICE, dtype)
    first, second = pair.unbind(2)
    gates, scales, shifts = torch.randn(3, 2, batch, width, generator=generator).to(DEVICE, dtype)

    def call(x, y, index, **more):
        return adaln_launchers.launch_gated_adaln_forward(
            x_BTC=x, y_BTC=y, gate_BC=gates[index], scale_BC=scales[index],
            shift_BC=shifts[index], eps=1e-6, **more,
        )  # fmt: skip

    after_first, h_first, *_ = call(x, first, 0)
    expected = call(after_first, second, 1)
    kept, h, *_ = call(x, first, 0, store_sum=False)
    assert kept is x
    assert torch.equal(h, h_first)
    got = call(x, second, 1, earlier=(first, gates[0]))
    assert all(map(torch.equal, got, expected))
    assert not torch.equal(call(x, second, 1)[0], expected[0])
