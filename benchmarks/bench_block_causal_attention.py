"""block_causal_attention: a whole multi-scale sequence, forward, and forward with backward."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.nn import functional as F

from benchmarks.harness import Case, Contest, backends, missing_module, near, replay
from variant.presets import PATCH_NUMS_256, PATCH_NUMS_512
from variant_kernels import ScaleLayout, block_causal_attention
from variant_kernels.backends import Request
from variant_kernels.ops.block_causal_attention import BLOCK_CAUSAL_IMPLS, dense_mask

OP = "block_causal_attention"
HEADS, HEAD_DIM = 16, 64
SHORT = (1, 2, 3, 4, 5, 6)
PEERS = ("triton", "cuda", "cpu", "op", "reference", "sdpa-dense-mask", "flex-compiled")
CASES = [
    Case(
        f"L{length}-batch{batch}-{dtype}-{direction}",
        dtype,
        {"patch_nums": patch_nums, "batch": batch, "backward": direction != "forward"},
        quick=length == 91,
    )
    for length, batch, patch_nums in (
        (91, 1, SHORT),
        (680, 4, PATCH_NUMS_256),
        (2240, 1, PATCH_NUMS_512),
    )
    for dtype in ("float32", "bfloat16")
    for direction in ("forward", "forward+backward")
]


def build(case: Case, device: str, quick: bool) -> Contest:
    """Packed projections for us; SDPA gets contiguous heads and the mask that VAR adds."""
    layout = ScaleLayout.from_patch_nums(case.settings["patch_nums"])
    batch, backward = case.settings["batch"], case.settings["backward"]
    dtype, length = getattr(torch, case.dtype), layout.total
    packed_BL3HD = torch.randn(batch, length, 3, HEADS, HEAD_DIM, device=device).to(dtype)
    grad_BLHD = torch.randn(batch, length, HEADS, HEAD_DIM, device=device).to(dtype)
    visible_LL = dense_mask(layout.tokens, device)
    bias_LL = torch.zeros(length, length, dtype=dtype, device=device)
    bias_LL = bias_LL.masked_fill(~visible_LL, -torch.inf)

    qkv_BLHD = [x.detach().requires_grad_(backward) for x in packed_BL3HD.unbind(2)]
    qkv_BHLD = [x.detach().transpose(1, 2).contiguous().requires_grad_(backward) for x in qkv_BLHD]
    grad_BHLD = grad_BLHD.transpose(1, 2).contiguous()

    def whole(attend, qkv, grad):
        """The output, and with backward the three gradients."""
        out = attend(*qkv)
        return (out, *torch.autograd.grad(out, qkv, grad)) if backward else (out,)

    masked = functools.partial(F.scaled_dot_product_attention, attn_mask=bias_LL)
    calls, missing = {}, {}
    for name, impl, reason in backends(BLOCK_CAUSAL_IMPLS, Request(device, (dtype,), HEAD_DIM)):
        if reason is not None:
            missing[name] = reason
        elif backward:
            attend = functools.partial(block_causal_attention, layout=layout, backend=name)
            calls[name] = functools.partial(whole, attend, qkv_BLHD, grad_BLHD)
        else:
            calls[name] = functools.partial(_launch, impl, qkv_BLHD, layout)
    ours = (*(name for name in calls if name != "reference"), "op")
    attend = functools.partial(block_causal_attention, layout=layout)
    calls["op"] = functools.partial(whole, attend, qkv_BLHD, grad_BLHD)
    calls["sdpa-dense-mask"] = functools.partial(whole, masked, qkv_BHLD, grad_BHLD)
    missing["flex-compiled"] = _no_flex(device, backward, quick)
    if missing["flex-compiled"] is None:
        attend = _flex(layout, length, device)
        calls["flex-compiled"] = functools.partial(whole, attend, qkv_BHLD, grad_BHLD)

    # The first and the last sequence are checked.
    some = [0, -1] if batch > 1 else [0]

    def alone(kind):
        given = [x[some].detach().to(kind).requires_grad_(backward) for x in qkv_BHLD]
        mask = functools.partial(F.scaled_dot_product_attention, attn_mask=bias_LL.to(kind))
        return [x.detach() for x in whole(mask, given, grad_BHLD[some].to(kind))]

    def pick(name, answer):
        heads_second = name in ("sdpa-dense-mask", "flex-compiled")
        return [x[some] if heads_second else x[some].transpose(1, 2) for x in answer]

    pairs = sum(n * layout.visible(k) for k, n in enumerate(layout.tokens))
    one = grad_BLHD.nbytes
    return Contest(
        shape={"batch": batch, "tokens": length, "heads": HEADS, "head_dim": HEAD_DIM,
               "visible": round(pairs / length**2, 3)},
        # Two products forward, five backward (the scores once more).
        flop=(14 if backward else 4) * batch * HEADS * HEAD_DIM * pairs,
        # Forward: q, k, v, out.  Backward: these again, grad_out, three gradients.
        moved=(12 if backward else 4) * one,
        calls=calls,
        missing=missing,
        peer="sdpa-dense-mask",
        ours=ours,
        check=near(
            alone(torch.float64), alone(dtype), ours=ours,
            times=(2.0, 3.0, 3.0, 3.0) if backward else (2.0,), pick=pick,
        ),
        gradient=backward,
    )  # fmt: skip


def _launch(impl, qkv_BLHD, layout):
    q_BLHD, k_BLHD, v_BLHD = qkv_BLHD
    out_BLHD, _ = impl.forward(
        q_BLHD=q_BLHD,
        k_BLHD=k_BLHD,
        v_BLHD=v_BLHD,
        scale_lengths=layout.tokens,
        softmax_scale=HEAD_DIM**-0.5,
    )
    return (out_BLHD,)


def _no_flex(device: str, backward: bool, quick: bool) -> str | None:
    """Why compiled FlexAttention has no part."""
    if quick:
        return "compiling FlexAttention takes longer than a quick run"
    if device == "cpu" and backward:
        return "FlexAttention has no backward on a CPU"
    return missing_module("triton") if device == "cuda" else None


def _flex(layout: ScaleLayout, length: int, device: str):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    scales = [k for k, count in enumerate(layout.tokens) for _ in range(count)]
    scale_L = torch.tensor(scales, device=device)
    mask = create_block_mask(
        lambda b, h, q, kv: scale_L[q] >= scale_L[kv], None, None, length, length, device=device
    )
    return functools.partial(torch.compile(flex_attention, dynamic=False), block_mask=mask)


@pytest.mark.benchmark(timer=replay)
def test_block_causal_attention(compete, device, case, contender):
    compete(OP, case, device, contender, build)
