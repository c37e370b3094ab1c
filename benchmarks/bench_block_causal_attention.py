"""block_causal_attention: a whole multi-scale sequence, forward, and forward with backward."""

from __future__ import annotations

import functools
import importlib
import sys

import pytest
import torch
from torch.nn import functional as F

from benchmarks.harness import REPOSITORIES, Case, Contest, backends, missing_module, near, replay
from variant.models.presets import PATCH_NUMS_256, PATCH_NUMS_512
from variant_kernels import ScaleLayout, block_causal_attention, qk_norm
from variant_kernels.dispatch.request import Request
from variant_kernels.ops.block_causal_attention import (
    BLOCK_CAUSAL_IMPLS,
    BLOCK_CAUSAL_QK_NORM_IMPLS,
    dense_mask,
)
from variant_kernels.ops.qk_norm import MAX_LOG_SCALE

OP = "block_causal_attention"
HEADS = 16
SHORT = (1, 2, 3, 4, 5, 6)
# Scales of a 1024x1024 image, as HMAR (arXiv 2506.04421) measures its kernel: 9451 tokens.
PATCH_NUMS_1024 = (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)
# The plain-torch definition holds every score in float32, several times.
MOST_SCORE_BYTES = 2**30
# two-ops: qk_norm and then the op, where the case has qk_norm.
PEERS = (
    "triton", "cuda", "flex", "cpu", "op", "two-ops", "reference", "sdpa-dense-mask",
    "flex-compiled", "hmar",
)  # fmt: skip
CASES = [
    Case(
        f"L{length}-batch{batch}-{norm}{dtype}-{direction}",
        dtype,
        {
            "patch_nums": patch_nums,
            "batch": batch,
            "backward": direction != "forward",
            "qk_norm": bool(norm),
        },
        quick=length == 91,
    )
    for norm in ("", "qk_norm-")
    for length, batch, patch_nums in (
        (91, 1, SHORT),
        (680, 4, PATCH_NUMS_256),
        (2240, 1, PATCH_NUMS_512),
    )
    for dtype in ("float32", "bfloat16")
    for direction in ("forward", "forward+backward")
]
# Sizes that fill a GPU, first where time is short; float16 is what HMAR's kernel takes.
CASES[:0] = [
    Case(
        f"L{length}-batch{batch}-head_dim{head_dim}-{norm}{dtype}-{direction}",
        dtype,
        {
            "patch_nums": patch_nums,
            "batch": batch,
            "head_dim": head_dim,
            "backward": direction != "forward",
            "qk_norm": bool(norm),
        },
        devices=("cuda",),
    )
    for length, batch, patch_nums, head_dim, dtypes, norm in (
        (680, 64, PATCH_NUMS_256, 64, ("bfloat16", "float16"), ""),
        (680, 64, PATCH_NUMS_256, 64, ("bfloat16",), "qk_norm-"),
        (680, 32, PATCH_NUMS_256, 128, ("bfloat16",), ""),
        (2240, 16, PATCH_NUMS_512, 64, ("bfloat16", "float16"), ""),
        (2240, 16, PATCH_NUMS_512, 64, ("bfloat16",), "qk_norm-"),
        (2240, 8, PATCH_NUMS_512, 128, ("bfloat16",), ""),
        (9451, 2, PATCH_NUMS_1024, 64, ("float16",), ""),
    )
    for dtype in dtypes
    for direction in ("forward", "forward+backward")
]


def build(case: Case, device: str, quick: bool) -> Contest:
    """Packed projections for us; SDPA gets contiguous heads and the mask that VAR adds."""
    layout = ScaleLayout.from_patch_nums(case.settings["patch_nums"])
    batch, backward = case.settings["batch"], case.settings["backward"]
    normed = case.settings["qk_norm"]
    dtype, length = getattr(torch, case.dtype), layout.total
    head_dim = case.settings.get("head_dim", 64)
    packed_BL3HD = torch.randn(batch, length, 3, HEADS, head_dim, device=device).to(dtype)
    grad_BLHD = torch.randn(batch, length, HEADS, head_dim, device=device).to(dtype)
    visible_LL = dense_mask(layout.tokens, device)
    bias_LL = torch.zeros(length, length, dtype=dtype, device=device)
    bias_LL = bias_LL.masked_fill(~visible_LL, -torch.inf)
    scale_mul_1H11 = torch.linspace(0, 3, HEADS, device=device).view(1, HEADS, 1, 1)
    more = [scale_mul_1H11.requires_grad_(backward)] if normed else []

    qkv_BLHD = [x.detach().requires_grad_(backward) for x in packed_BL3HD.unbind(2)]
    qkv_BHLD = [x.detach().transpose(1, 2).contiguous().requires_grad_(backward) for x in qkv_BLHD]
    grad_BHLD = grad_BLHD.transpose(1, 2).contiguous()

    def whole(attend, inputs, grad):
        """The output, and with backward the gradients."""
        out = attend(*inputs)
        return (out, *torch.autograd.grad(out, inputs, grad)) if backward else (out,)

    calls, missing = {}, {}
    impls = BLOCK_CAUSAL_QK_NORM_IMPLS if normed else BLOCK_CAUSAL_IMPLS
    for name, impl, reason in backends(impls, Request(device, (dtype,), head_dim)):
        scores = 4 * batch * HEADS * length**2
        if name == "reference" and device == "cuda" and scores > MOST_SCORE_BYTES:
            reason = f"plain torch would hold {scores / 2**20:.0f} MiB of scores"
        if name == "flex" and quick:
            reason = "compiling FlexAttention takes longer than a quick run"
        if reason is not None:
            missing[name] = reason
        elif backward:
            attend = functools.partial(_attend, layout=layout, backend=name)
            calls[name] = functools.partial(whole, attend, qkv_BLHD + more, grad_BLHD)
        else:
            calls[name] = functools.partial(_launch, impl, qkv_BLHD, more, layout)
    ours = (*(name for name in calls if name != "reference"), "op", "two-ops")
    attend = functools.partial(_attend, layout=layout)
    calls["op"] = functools.partial(whole, attend, qkv_BLHD + more, grad_BLHD)
    masked = functools.partial(_dense, bias_LL=bias_LL)
    calls["sdpa-dense-mask"] = functools.partial(whole, masked, qkv_BHLD + more, grad_BHLD)
    if normed:
        attend = functools.partial(_two_ops, layout=layout)
        calls["two-ops"] = functools.partial(whole, attend, qkv_BLHD + more, grad_BLHD)
    missing["flex-compiled"] = _no_flex(device, backward, quick, normed)
    if missing["flex-compiled"] is None:
        attend = _flex(layout, length, device)
        calls["flex-compiled"] = functools.partial(whole, attend, qkv_BHLD, grad_BHLD)

    missing["hmar"] = _no_hmar(device, dtype, head_dim, normed)
    if missing["hmar"] is None:
        attend = _hmar(layout, head_dim)
        calls["hmar"] = functools.partial(whole, attend, qkv_BHLD, grad_BHLD)

    # The first and the last sequence are checked; of a long one the scores take 11 GB in float64.
    some = [0, -1] if batch > 1 and length < 4096 else [0]

    def alone(kind):
        given = [x[some].detach().to(kind).requires_grad_(backward) for x in qkv_BHLD]
        dense = functools.partial(_dense, bias_LL=bias_LL.to(kind))
        answer = whole(dense, given + more, grad_BHLD[some].to(kind))
        return [x.detach() for x in answer[:4]]

    def pick(name, answer):
        # Not the gradient of scale_mul, a sum over all sequences.
        heads_second = name in ("sdpa-dense-mask", "flex-compiled", "hmar")
        return [x[some] if heads_second else x[some].transpose(1, 2) for x in answer[:4]]

    pairs = sum(n * layout.visible(k) for k, n in enumerate(layout.tokens))
    one = grad_BLHD.nbytes
    return Contest(
        shape={"batch": batch, "tokens": length, "heads": HEADS, "head_dim": head_dim,
               "visible": round(pairs / length**2, 3)},
        # Two products forward, five backward (the scores once more).
        flop=(14 if backward else 4) * batch * HEADS * head_dim * pairs,
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


def _attend(q_BLHD, k_BLHD, v_BLHD, scale_mul_1H11=None, **given):
    return block_causal_attention(q_BLHD, k_BLHD, v_BLHD, scale_mul_1H11=scale_mul_1H11, **given)


def _two_ops(q_BLHD, k_BLHD, v_BLHD, scale_mul_1H11, layout):
    q_BLHD, k_BLHD = qk_norm(q_BLHD, k_BLHD, scale_mul_1H11)
    return block_causal_attention(q_BLHD, k_BLHD, v_BLHD, layout, softmax_scale=1)


def _dense(q_BHLD, k_BHLD, v_BHLD, scale_mul_1H11=None, *, bias_LL):
    """Torch's attention, with qk_norm as VAR composes it: norms in float32 or wider."""
    scale = None
    if scale_mul_1H11 is not None:
        wide = torch.promote_types(q_BHLD.dtype, torch.float32)
        factor = scale_mul_1H11.clamp_max(MAX_LOG_SCALE).exp()
        q_BHLD = (F.normalize(q_BHLD.to(wide), dim=-1) * factor).to(v_BHLD.dtype)
        k_BHLD = F.normalize(k_BHLD.to(wide), dim=-1).to(v_BHLD.dtype)
        scale = 1.0
    return F.scaled_dot_product_attention(q_BHLD, k_BHLD, v_BHLD, attn_mask=bias_LL, scale=scale)


def _launch(impl, qkv_BLHD, more, layout):
    q_BLHD, k_BLHD, v_BLHD = qkv_BLHD
    normed = {"scale_mul_1H11": more[0]} if more else {}
    out_BLHD, _ = impl.forward(
        q_BLHD=q_BLHD,
        k_BLHD=k_BLHD,
        v_BLHD=v_BLHD,
        scale_lengths=layout.tokens,
        softmax_scale=1.0 if more else q_BLHD.shape[-1] ** -0.5,
        **normed,
    )
    return (out_BLHD,)


def _no_flex(device: str, backward: bool, quick: bool, normed: bool) -> str | None:
    """Why compiled FlexAttention has no part."""
    if normed:
        return "it has no qk_norm"
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


def _no_hmar(device: str, dtype: torch.dtype, head_dim: int, normed: bool) -> str | None:
    """Why HMAR's Triton kernel has no part."""
    if normed:
        return "it has no qk_norm"
    if "hmar" not in REPOSITORIES:
        return "no --hmar-repo (a clone of NVlabs/HMAR)"
    if device != "cuda" or dtype != torch.float16 or head_dim != 64:
        return "HMAR measures its kernel on a GPU, in float16, with heads of 64"
    return None


def _hmar(layout: ScaleLayout, head_dim: int):
    if str(REPOSITORIES["hmar"]) not in sys.path:
        sys.path.append(str(REPOSITORIES["hmar"]))
    module = importlib.import_module("attn.block_sparse_attn_interface")
    attend = module.BlockSparseAttention(list(layout.tokens), "cuda", "block_causal")
    return lambda q, k, v: attend(q, k, v, head_dim**-0.5)


@pytest.mark.benchmark(timer=replay)
def test_block_causal_attention(compete, device, case, contender):
    compete(OP, case, device, contender, build)
