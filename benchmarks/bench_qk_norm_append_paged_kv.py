"""qk_norm_append_paged_kv: the packed projection is read once, K and V land in their pages."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch.nn import functional as F

from benchmarks.harness import Case, Contest, backends, near, replay
from variant.bench.environment import cache_bytes
from variant_kernels import append_paged_kv, qk_norm, qk_norm_append_paged_kv
from variant_kernels.dispatch.request import Request
from variant_kernels.kv_quantization import KV8_DTYPE, dequantize_kv, quantize_kv
from variant_kernels.ops.qk_norm_append_paged_kv import qk_norm_append_paged_kv_op

OP = "qk_norm_append_paged_kv"
HEAD_DIM, PAGE_SIZE = 64, 16
# exact: the op on pages of the tokens' dtype, where the case has pages of 8 bits.
PEERS = ("triton", "cuda", "cpu", "op", "exact", "two-ops", "reference", "eager")
SIZES = {"tokens1": 1, "tokens256": 256, "large": None}
CASES = [
    Case(
        f"{model}-{size}-{'kv8-' if kv8 else ''}{dtype}",
        dtype,
        {"heads": heads, "tokens": tokens, "kv8": kv8},
        quick=model == "d16" and tokens == 1 and not kv8,
    )
    for kv8 in (False, True)
    for model, heads in (("d16", 16), ("d30", 30))
    for size, tokens in SIZES.items()
    for dtype in ("float32", "bfloat16")
]


def normalised(qkv_BT3HD, scale_mul_1H11):
    """q', k' and v, as the original model composes them."""
    q_BTHD, k_BTHD, v_BTHD = qkv_BT3HD.unbind(2)
    scale_11H1 = scale_mul_1H11.transpose(1, 2).clamp_max(math.log(100)).exp()
    q_BTHD = F.normalize(q_BTHD, dim=-1).mul(scale_11H1).to(q_BTHD.dtype)
    return q_BTHD, F.normalize(k_BTHD, dim=-1), v_BTHD


def eager(qkv_BT3HD, scale_mul_1H11, rows_2SHD, slots_N):
    """One indexed write for each of K and V."""
    q_BTHD, *new = normalised(qkv_BT3HD, scale_mul_1H11)
    for new_BTHD, rows_SHD in zip(new, rows_2SHD, strict=True):
        rows_SHD.index_copy_(0, slots_N, new_BTHD.flatten(0, 1))
    return q_BTHD


def eager_kv8(qkv_BT3HD, scale_mul_1H11, codes_2SHD, scales_2SH, slots_N):
    """The same, rounded to 8 bits in plain torch; codes are bytes."""
    q_BTHD, *new = normalised(qkv_BT3HD, scale_mul_1H11)
    for new_BTHD, codes_SHD, scales_SH in zip(new, codes_2SHD, scales_2SH, strict=True):
        values_NHD, scales_NH = quantize_kv(new_BTHD.flatten(0, 1))
        codes_SHD.index_copy_(0, slots_N, values_NHD.view(torch.uint8))
        scales_SH.index_copy_(0, slots_N, scales_NH)
    return q_BTHD


def build(case: Case, device: str, quick: bool) -> Contest:
    """Each sequence's tokens fill pages that lie anywhere in the pool."""
    heads, tokens, kv8 = (case.settings[name] for name in ("heads", "tokens", "kv8"))
    dtype, batch = getattr(torch, case.dtype), 2
    # Bytes of one token: q, k and v in, q out; k and v out.
    token_bytes = 4 * heads * HEAD_DIM * dtype.itemsize
    token_bytes += 2 * heads * (HEAD_DIM + 1 if kv8 else HEAD_DIM * dtype.itemsize)
    if tokens is None:
        batch = 16
        tokens = -(-4 * cache_bytes(device) // (batch * token_bytes))
    qkv_BT3HD = torch.randn(batch, tokens, 3, heads, HEAD_DIM, device=device).to(dtype)
    scale_mul_1H11 = torch.linspace(0, 5, heads, device=device).view(1, heads, 1, 1)
    entries = -(-tokens // PAGE_SIZE)
    shape = (2, batch * entries, PAGE_SIZE, heads, HEAD_DIM)
    pages = torch.zeros(shape, dtype=dtype, device=device)
    codes = torch.zeros(shape if kv8 else (2, 0, 1, heads, HEAD_DIM), dtype=torch.uint8)
    codes = codes.to(device)
    scales = torch.zeros_like(codes[..., 0])
    first_BM = torch.randperm(batch * entries, device=device).view(batch, entries) * PAGE_SIZE
    slots_BMN = first_BM.unsqueeze(-1) + torch.arange(PAGE_SIZE, device=device)
    slots_BT = slots_BMN.flatten(1)[:, :tokens].contiguous()
    exact = (qkv_BT3HD, scale_mul_1H11, *pages.unbind(0), slots_BT)
    given, extra = exact, {}
    if kv8:
        given = (qkv_BT3HD, scale_mul_1H11, *codes.view(KV8_DTYPE).unbind(0), slots_BT)
        extra = {"k_scales_PNH": scales[0], "v_scales_PNH": scales[1]}
    names = ("qkv_BT3HD", "scale_mul_1H11", "k_pages_PNHD", "v_pages_PNHD", "slots_BT")
    keywords = {**dict(zip(names, given, strict=True)), **extra}
    calls, missing = {}, {}
    request = Request(device, (dtype, torch.float32), HEAD_DIM, kv_dtype=KV8_DTYPE if kv8 else None)
    for name, impl, reason in backends(qk_norm_append_paged_kv_op.backends, request):
        if reason is None:
            calls[name] = functools.partial(impl.forward, **keywords)
        else:
            missing[name] = reason
    ours = (*(name for name in calls if name != "reference"), "op", "exact", "two-ops")
    calls["op"] = functools.partial(qk_norm_append_paged_kv, *given, **extra)
    calls["two-ops"] = functools.partial(_two_ops, *given, **extra)
    slots_N = slots_BT.flatten()
    rows_2SHD, codes_2SHD, scales_2SH = (x.flatten(1, 2) for x in (pages, codes, scales))
    if kv8:
        calls["exact"] = functools.partial(qk_norm_append_paged_kv, *exact)
        calls["eager"] = functools.partial(
            eager_kv8, qkv_BT3HD, scale_mul_1H11, codes_2SHD, scales_2SH, slots_N
        )
    else:
        calls["eager"] = functools.partial(eager, qkv_BT3HD, scale_mul_1H11, rows_2SHD, slots_N)

    # The whole would take long in float64: the last 16 tokens of the batch are checked.
    some = slots_N[-16:]

    def alone(kind, rounded):
        last = qkv_BT3HD.flatten(0, 1)[-16:].unsqueeze(0).to(kind)
        scale_mul = scale_mul_1H11.to(torch.promote_types(kind, torch.float32))
        found = [x[0] for x in normalised(last, scale_mul)]
        if rounded:
            found[1:] = [dequantize_kv(*quantize_kv(x), kind) for x in found[1:]]
        return found

    def pick(name, q_BTHD):
        if kv8 and name != "exact":
            found = dequantize_kv(
                codes_2SHD[:, some].view(KV8_DTYPE), scales_2SH[:, some], dtype
            ).unbind(0)
        else:
            found = rows_2SHD[:, some].unbind(0)
        for pool in (pages, codes, scales):
            pool.zero_()  # the next contender has to write them itself
        return [q_BTHD.flatten(0, 1)[-16:], *found]

    return Contest(
        shape={"batch": batch, "tokens": tokens, "heads": heads, "head_dim": HEAD_DIM},
        flop=0,
        moved=batch * tokens * token_bytes + slots_BT.nbytes,
        calls=calls,
        missing=missing,
        peer="eager",
        ours=ours,
        check=near(alone(torch.float64, False), alone(dtype, kv8), ours=ours, pick=pick),
    )


def _two_ops(qkv_BT3HD, scale_mul_1H11, k_pages, v_pages, slots_BT, **scales):
    """The two public ops that the fused one replaces."""
    q_BTHD, k_BTHD, v_BTHD = qkv_BT3HD.unbind(2)
    q_BTHD, k_BTHD = qk_norm(q_BTHD, k_BTHD, scale_mul_1H11)
    append_paged_kv(k_BTHD, v_BTHD, k_pages, v_pages, slots_BT, **scales)
    return q_BTHD


@pytest.mark.benchmark(timer=replay)
def test_qk_norm_append_paged_kv(compete, device, case, contender):
    compete(OP, case, device, contender, build)
