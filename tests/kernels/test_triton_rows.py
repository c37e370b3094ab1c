"""What only the Triton row kernels have: blocks of rows, parts of sums, guards, long rows."""

import pytest
import torch
from compare import DEVICE, DTYPES, Tally, moved, name_of
from test_adaln import compare as compare_adaln
from test_adaln import plain_gated

from variant_kernels import gated_residual_adaln
from variant_kernels.backends import TRITON_ROW, Request, triton_unsupported
from variant_kernels.ops import adaln

reason = triton_unsupported(Request(DEVICE, (torch.float32,), 64))
if reason is not None:
    pytest.skip(f"{reason} (TRITON_INTERPRET=1 interprets)", allow_module_level=True)

from variant_kernels.triton_ops import common, rows  # noqa: E402

SERVED = [d for d in DTYPES if triton_unsupported(Request(DEVICE, (d,), 64)) is None]


def test_rows_too_long_for_a_program_are_refused_by_length():
    dtypes = (torch.float32,)
    assert triton_unsupported(Request(DEVICE, dtypes, row=TRITON_ROW)) is None
    too_long = triton_unsupported(Request(DEVICE, dtypes, row=TRITON_ROW + 1))
    assert too_long == "rows of 65537 entries are longer than the 65536 that it can hold"


@pytest.mark.parametrize(
    ("count", "groups", "processors", "least", "expected"),
    [(680, 128, 132, 8, 136), (680, 2, 132, 8, 8), (680, 1000, 132, 8, 680), (1, 1, 1, 8, 8)],
)
def test_parts_fill_the_chip_and_are_whole_blocks(count, groups, processors, least, expected):
    assert rows.cut(count, groups, processors, least) == expected


@pytest.mark.parametrize("processors", [1, 3, 1000])
@pytest.mark.parametrize("dtype", SERVED, ids=name_of)
def test_sums_over_many_parts_match_float64(processors, dtype, monkeypatch):
    monkeypatch.setattr(common, "num_processors", lambda device: processors)
    tally, generator = Tally(), torch.Generator().manual_seed(6)
    for tokens, width in ((67, 40), (300, 16), (130, 300)):
        x, y = torch.randn(2, 2, tokens, width, generator=generator).to(dtype)
        given = (0.5 * torch.randn(3, 2, width, generator=generator)).to(dtype)

        def op(*leaves):
            return gated_residual_adaln(*leaves, backend="triton")

        compare_adaln(tally, f"{tokens} x {width}", op, plain_gated, (x, y, *given), generator)
    tally.check()


@pytest.mark.parametrize("shape", [(0, 3, 16), (2, 0, 16), (2, 3, 0)])
def test_empty_tokens_give_empty_tokens_and_sums_of_zero(shape):
    x, y = moved(torch.ones(shape), torch.ones(shape))
    given = [t.requires_grad_() for t in moved(*torch.ones(3, shape[0], shape[2]))]
    out, h = gated_residual_adaln(x, y, *given, backend="triton")
    assert out.shape == h.shape == shape
    for grad in torch.autograd.grad(out.sum() + h.sum(), given):
        assert not grad.any()


def test_gradients_have_the_same_bits_every_time():
    generator = torch.Generator().manual_seed(7)
    x, y = moved(*torch.randn(2, 3, 100, 33, generator=generator))
    rows_BC = moved(*torch.randn(4, 3, 33, generator=generator))
    _, h, mean, rstd = adaln.GATED_IMPLS["triton"].forward(
        x_BTC=x, y_BTC=y, gate_BC=rows_BC[0], scale_BC=rows_BC[1], shift_BC=rows_BC[2], eps=1e-6
    )
    first, second = (
        adaln.GATED_IMPLS["triton"].backward(
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
