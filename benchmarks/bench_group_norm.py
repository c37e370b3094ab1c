"""group_norm_silu: the norms of the VQ-VAE's decoder, channels last."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.nn import functional as F

from benchmarks.harness import Case, Comparison, backends, near, replay
from variant_kernels.dispatch.request import Request
from variant_kernels.ops.group_norm import group_norm_silu, group_norm_silu_op

GROUPS, EPS = 32, 1e-6
IMPLEMENTATIONS = ("triton", "cpu", "op", "reference", "eager")
# Side of the feature map, its channels, images: the last and the first level of the decoder.
SIZES = {"256x160-1": (256, 160, 1), "256x160-8": (256, 160, 8), "16x640-8": (16, 640, 8)}
CASES = [
    Case(f"{name}-{dtype}", dtype, {"size": size}, quick=name.startswith("16x"))
    for name, size in SIZES.items()
    for dtype in ("bfloat16", "float32")
]


def eager(x_BYXC, weight_C, bias_C):
    """The two modules of the decoder, on a channels-last view."""
    x_BCYX = x_BYXC.permute(0, 3, 1, 2)
    return F.silu(F.group_norm(x_BCYX, GROUPS, weight_C, bias_C, EPS)).permute(0, 2, 3, 1)


def _build(case: Case, device: str, quick: bool) -> Comparison:
    (side, channels, batch), dtype = case.settings["size"], getattr(torch, case.dtype)
    x_BYXC = torch.randn(batch, side, side, channels, device=device).to(dtype)
    weight_C, bias_C = torch.randn(2, channels, device=device).to(dtype).unbind(0)
    inputs = x_BYXC, weight_C, bias_C
    options = {"num_groups": GROUPS, "eps": EPS, "silu": True}
    keywords = dict(zip(("x_BYXC", "weight_C", "bias_C"), inputs, strict=True))
    calls, missing = {}, {}
    for name, impl, reason in backends(group_norm_silu_op.backends, Request(device, (dtype,))):
        if reason is None:
            calls[name] = functools.partial(impl.forward, **keywords, **options)
        else:
            missing[name] = reason
    ours = (*(name for name in calls if name != "reference"), "op")
    calls["op"] = functools.partial(group_norm_silu, *inputs, GROUPS, eps=EPS)
    calls["eager"] = functools.partial(eager, *inputs)

    def eager_in(kind):
        return [eager(*(x.to(kind or x.dtype) for x in inputs))]

    return Comparison(
        shape={"batch": batch, "side": side, "channels": channels},
        flop=0,
        moved=3 * x_BYXC.nbytes,  # read twice, written once
        calls=calls,
        missing=missing,
        peer="eager",
        ours=ours,
        check=near(
            eager_in(torch.float64), eager_in(None), ours=ours, pick=lambda name, result: [result]
        ),
    )


@pytest.mark.benchmark(timer=replay)
def test_group_norm_silu(report_timing, device, case, implementation):
    report_timing("group_norm_silu", case, device, implementation, _build)
