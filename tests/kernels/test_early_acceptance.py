"""What an op accepts at first sight, its checks accept too; and what is usual is accepted there."""

from __future__ import annotations

import functools
import itertools
import sys

import pytest
import torch

from variant_kernels.kv_quantization import KV8_DTYPE
from variant_kernels.ops import (
    adaln,
    append_paged_kv,
    paged_attention,
    qk_norm,
    qk_norm_append_paged_kv,
)


def changed(x):
    """Tensors that differ from x in one thing, and things that are no tensors."""
    yield from (None, 3.0, [1.0])
    if x is None:
        return
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.int32, torch.int64):
        yield x.to(dtype)
    yield torch.empty_like(x, device="meta")
    yield from (x[None], x[..., 0], x.reshape(-1), x[:0])
    for axis in range(x.ndim):
        yield torch.cat((x, x), axis)
        yield x.narrow(axis, 0, 0)
        yield x.narrow(axis, 0, 1).expand(x.shape)
        yield x.transpose(0, axis)
        yield torch.stack((x, x), axis + 1).flatten(axis, axis + 1).narrow(axis, 0, x.shape[axis])


def in_8_bits(op, pages, count=7):
    """An entry of OPS over 8-bit pages: the scales stand behind the arguments by position."""
    function, fits, sample_inputs, _ = op

    @functools.wraps(function)
    def call(*given):
        return function(*given[:5], k_scales_PNH=given[5], v_scales_PNH=given[6])

    def samples(dtype, generator):
        for given in sample_inputs(dtype, generator):
            narrow = [given[i].to(KV8_DTYPE) for i in pages]
            scales = [torch.ones(x.shape[:3], dtype=torch.uint8) for x in narrow]
            yield (*given[: pages[0]], *narrow, *given[pages[1] + 1 :], *scales)

    return call, fits, samples, count


OPS = {
    "paged_attention": (
        paged_attention.paged_attention,
        paged_attention._fits,
        paged_attention.sample_inputs,
        5,
    ),
    "append_paged_kv": (
        append_paged_kv.append_paged_kv,
        append_paged_kv._fits,
        append_paged_kv.sample_inputs,
        5,
    ),
    "qk_norm": (qk_norm.qk_norm, qk_norm._fits, qk_norm.sample_inputs, 3),
    "qk_norm_append_paged_kv": (
        qk_norm_append_paged_kv.qk_norm_append_paged_kv,
        qk_norm_append_paged_kv._fits,
        qk_norm_append_paged_kv.sample_inputs,
        5,
    ),
    "gated_residual_adaln": (adaln.gated_residual_adaln, adaln.fits_gated, adaln.sample_inputs, 5),
    "adaln_modulate": (
        adaln.adaln_modulate,
        adaln.fits_adaln,
        lambda dtype, generator: [
            (x, scale, shift) for x, _, _, scale, shift in adaln.sample_inputs(dtype, generator)
        ],
        3,
    ),
}
OPS |= {
    f"{name}, 8 bits": in_8_bits(OPS[name], pages)
    for name, pages in (
        ("paged_attention", (1, 2)),
        ("append_paged_kv", (2, 3)),
        ("qk_norm_append_paged_kv", (2, 3)),
    )
}


@pytest.mark.parametrize("op", OPS)
def test_what_is_accepted_at_first_sight_passes_every_check(op, monkeypatch):
    function, fits, sample_inputs, count = OPS[op]
    accepted = refused = 0
    for given in sample_inputs(torch.float32, torch.Generator().manual_seed(5)):
        assert fits(*given)
        for index, other in itertools.product(range(count), range(2)):
            for value in changed(given[index]):
                arguments = list(given)
                arguments[index] = value
                if other and isinstance(value, torch.Tensor):
                    # Two arguments that agree with each other and not with the rest.
                    arguments[(index + 1) % count] = value
                if not fits(*arguments):
                    refused += 1
                    continue
                accepted += 1
                module = sys.modules[function.__module__]
                with monkeypatch.context() as patch:
                    for name in ("_fits", "fits_gated", "fits_adaln"):
                        if hasattr(module, name):
                            patch.setattr(module, name, lambda *args: False)
                    # The op itself, which looks at values, is left out.
                    for name in vars(module):
                        if name.endswith("_op"):
                            patch.setattr(module, name, lambda *args: (None,) * 4)
                    function(*arguments)
    assert accepted > 5
    assert refused > 50
