"""adaln_modulate and gated_residual_adaln: memory passes over the residual stream."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.nn import functional as F

from benchmarks.harness import Case, Comparison, backends, near, replay
from variant.bench.environment import cache_bytes
from variant_kernels import adaln_modulate, gated_residual_adaln
from variant_kernels.dispatch.request import Request
from variant_kernels.ops.adaln import adaln_op, gated_op

EPS = 1e-6
IMPLEMENTATIONS = ("triton", "cuda", "cpu", "op", "reference", "eager", "compiled")
WIDTHS = {"d16": 1024, "d30": 1920}
# The sizes of the engine fit into the cache; "large" is at least four times the last-level cache.
SIZES = {"tokens1": 1, "tokens256": 256, "large": None}
CASES = [
    Case(
        f"{model}-{size}-stream-{stream}-rows-{rows}",
        rows,
        {"width": width, "tokens": tokens, "stream": stream},
        quick=model == "d16" and tokens == 1,
    )
    for model, width in WIDTHS.items()
    for size, tokens in SIZES.items()
    for stream, rows in (("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16"))
]


def eager_adaln(x_BTC, scale_BC, shift_BC):
    """Adaptive layer norm as the original model composes it."""
    normed_BTC = F.layer_norm(x_BTC, x_BTC.shape[-1:], eps=EPS)
    y_BTC = normed_BTC.mul(scale_BC.add(1).unsqueeze(1)).add_(shift_BC.unsqueeze(1))
    return y_BTC.to(scale_BC.dtype)


def eager_gated(x_BTC, y_BTC, gate_BC, scale_BC, shift_BC):
    """Add the gated branch, then the same."""
    x_BTC = x_BTC + y_BTC.mul(gate_BC.unsqueeze(1))
    return x_BTC, eager_adaln(x_BTC, scale_BC, shift_BC)


def _build(case: Case, device: str, quick: bool, *, gated: bool) -> Comparison:
    width, tokens = case.settings["width"], case.settings["tokens"]
    stream, dtype = getattr(torch, case.settings["stream"]), getattr(torch, case.dtype)
    # Bytes of one token: x in, y out; gated: x and y in, x' and h out.
    token_bytes = width * (stream.itemsize + dtype.itemsize) * (2 if gated else 1)
    batch = 2
    if tokens is None:
        batch = 16
        tokens = -(-4 * cache_bytes(device) // (batch * token_bytes))
    x_BTC = torch.randn(batch, tokens, width, device=device).to(stream)
    y_BTC = torch.randn(batch, tokens, width, device=device).to(dtype)
    gate_BC, scale_BC, shift_BC = (
        0.5 * torch.randn(3, batch, width, device=device).to(dtype)
    ).unbind(0)
    modulation = (scale_BC, shift_BC)
    if gated:
        inputs = (x_BTC, y_BTC, gate_BC, *modulation)
        names = ("x_BTC", "y_BTC", "gate_BC", "scale_BC", "shift_BC")
        impls, op, eager = gated_op.backends, gated_residual_adaln, eager_gated
    else:
        inputs, names = (x_BTC, *modulation), ("x_BTC", "scale_BC", "shift_BC")
        impls, op, eager = adaln_op.backends, adaln_modulate, eager_adaln
    keywords = dict(zip(names, inputs, strict=True))
    calls, missing = {}, {}
    for name, impl, reason in backends(impls, Request(device, (stream, dtype))):
        if reason is None:
            calls[name] = functools.partial(impl.forward, **keywords, eps=EPS)
        else:
            missing[name] = reason
    ours = (*(name for name in calls if name != "reference"), "op")
    calls["op"] = functools.partial(op, *inputs, eps=EPS)
    calls["eager"] = functools.partial(eager, *inputs)
    if quick:
        missing["compiled"] = "compiling takes longer than a quick run"
    else:
        calls["compiled"] = functools.partial(torch.compile(eager, dynamic=False), *inputs)

    # Only the first and the last 8 tokens are checked: all of them would take long in float64.
    def ends(x_BTC):
        return torch.cat((x_BTC[:, :8], x_BTC[:, -8:]), dim=1)

    def eager_in(kind):
        """Eager results in one dtype; None: in the dtype of each input."""
        cast = [(ends(x) if x.dim() == 3 else x).to(kind or x.dtype) for x in inputs]
        result = eager(*cast)
        return list(result) if gated else [result]

    def pick(name, result):
        if not gated and name in ("op", "eager", "compiled"):
            return [ends(result)]
        return [ends(x) for x in result[: 2 if gated else 1]]  # launchers return statistics too

    return Comparison(
        shape={"batch": batch, "tokens": tokens, "width": width, "stream": case.settings["stream"],
               "rows": case.dtype},
        flop=0,
        moved=batch * tokens * token_bytes + sum(row.nbytes for row in inputs if row.dim() == 2),
        calls=calls,
        missing=missing,
        peer="eager",
        ours=ours,
        check=near(eager_in(torch.float64), eager_in(None), ours=ours, pick=pick),
    )  # fmt: skip


@pytest.mark.benchmark(timer=replay)
def test_adaln_modulate(report_timing, device, case, implementation):
    build = functools.partial(_build, gated=False)
    report_timing("adaln_modulate", case, device, implementation, build)


@pytest.mark.benchmark(timer=replay)
def test_gated_residual_adaln(report_timing, device, case, implementation):
    build = functools.partial(_build, gated=True)
    report_timing("gated_residual_adaln", case, device, implementation, build)
