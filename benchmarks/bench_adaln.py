"""adaln_modulate and gated_residual_adaln: the residual stream's passes over memory."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.nn import functional as F

from benchmarks.harness import Case, Contest, backends, near, replay
from variant.bench.environment import cache_bytes
from variant_kernels import adaln_modulate, gated_residual_adaln
from variant_kernels.dispatch.request import Request
from variant_kernels.ops.adaln import adaln_op, gated_op

EPS = 1e-6
PEERS = ("triton", "cuda", "cpu", "op", "reference", "eager", "compiled")
WIDTHS = {"d16": 1024, "d30": 1920}
# The engine's own sizes lie in the cache; "large" is at least four times the last one.
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
    """As the original model composes it."""
    normed_BTC = F.layer_norm(x_BTC, x_BTC.shape[-1:], eps=EPS)
    y_BTC = normed_BTC.mul(scale_BC.add(1).unsqueeze(1)).add_(shift_BC.unsqueeze(1))
    return y_BTC.to(scale_BC.dtype)


def eager_gated(x_BTC, y_BTC, gate_BC, scale_BC, shift_BC):
    """The same, after the gated branch has been added."""
    x_BTC = x_BTC + y_BTC.mul(gate_BC.unsqueeze(1))
    return x_BTC, eager_adaln(x_BTC, scale_BC, shift_BC)


def _build(case: Case, device: str, quick: bool, *, gated: bool) -> Contest:
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
    rows = (scale_BC, shift_BC)
    if gated:
        given = (x_BTC, y_BTC, gate_BC, *rows)
        names = ("x_BTC", "y_BTC", "gate_BC", "scale_BC", "shift_BC")
        impls, op, eager = gated_op.backends, gated_residual_adaln, eager_gated
    else:
        given, names = (x_BTC, *rows), ("x_BTC", "scale_BC", "shift_BC")
        impls, op, eager = adaln_op.backends, adaln_modulate, eager_adaln
    keywords = dict(zip(names, given, strict=True))
    calls, missing = {}, {}
    for name, impl, reason in backends(impls, Request(device, (stream, dtype))):
        if reason is None:
            calls[name] = functools.partial(impl.forward, **keywords, eps=EPS)
        else:
            missing[name] = reason
    ours = (*(name for name in calls if name != "reference"), "op")
    calls["op"] = functools.partial(op, *given, eps=EPS)
    calls["eager"] = functools.partial(eager, *given)
    if quick:
        missing["compiled"] = "compiling takes longer than a quick run"
    else:
        calls["compiled"] = functools.partial(torch.compile(eager, dynamic=False), *given)

    # The whole would take long in float64: the first and the last 8 tokens are checked.
    def ends(x_BTC):
        return torch.cat((x_BTC[:, :8], x_BTC[:, -8:]), dim=1)

    def alone(kind):
        wide = [(ends(x) if x.dim() == 3 else x).to(kind or x.dtype) for x in given]
        answer = eager(*wide)
        return list(answer) if gated else [answer]

    def pick(name, answer):
        if not gated and name in ("op", "eager", "compiled"):
            return [ends(answer)]
        return [ends(x) for x in answer[: 2 if gated else 1]]  # launchers add statistics

    return Contest(
        shape={"batch": batch, "tokens": tokens, "width": width, "stream": case.settings["stream"],
               "rows": case.dtype},
        flop=0,
        moved=batch * tokens * token_bytes + sum(row.nbytes for row in given if row.dim() == 2),
        calls=calls,
        missing=missing,
        peer="eager",
        ours=ours,
        check=near(alone(torch.float64), alone(None), ours=ours, pick=pick),
    )  # fmt: skip


@pytest.mark.benchmark(timer=replay)
def test_adaln_modulate(compete, device, case, contender):
    build = functools.partial(_build, gated=False)
    compete("adaln_modulate", case, device, contender, build)


@pytest.mark.benchmark(timer=replay)
def test_gated_residual_adaln(compete, device, case, contender):
    build = functools.partial(_build, gated=True)
    compete("gated_residual_adaln", case, device, contender, build)
