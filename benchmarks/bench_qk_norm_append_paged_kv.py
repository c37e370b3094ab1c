"""qk_norm_append_paged_kv: the packed projection is read once, K and V land in their pages."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch.nn import functional as F

from benchmarks.harness import Case, Contest, backends, near, replay
from variant.bench.environment import last_level_bytes
from variant_kernels import append_paged_kv, qk_norm, qk_norm_append_paged_kv
from variant_kernels.backends import Request
from variant_kernels.ops.qk_norm_append_paged_kv import FUSED_IMPLS

OP = "qk_norm_append_paged_kv"
HEAD_DIM, PAGE_SIZE = 64, 16
PEERS = ("triton", "cuda", "cpu", "op", "two-ops", "reference", "eager")
SIZES = {"tokens1": 1, "tokens256": 256, "large": None}
CASES = [
    Case(
        f"{model}-{size}-{dtype}",
        dtype,
        {"heads": heads, "tokens": tokens},
        quick=model == "d16" and tokens == 1,
    )
    for model, heads in (("d16", 16), ("d30", 30))
    for size, tokens in SIZES.items()
    for dtype in ("float32", "bfloat16")
]


def eager(qkv_BT3HD, scale_mul_1H11, k_rows_SHD, v_rows_SHD, slots_N):
    """As the original model composes it, with one indexed write for each of K and V."""
    q_BTHD, k_BTHD, v_BTHD = qkv_BT3HD.unbind(2)
    scale_11H1 = scale_mul_1H11.transpose(1, 2).clamp_max(math.log(100)).exp()
    q_BTHD = F.normalize(q_BTHD, dim=-1).mul(scale_11H1).to(q_BTHD.dtype)
    k_rows_SHD.index_copy_(0, slots_N, F.normalize(k_BTHD, dim=-1).flatten(0, 1))
    v_rows_SHD.index_copy_(0, slots_N, v_BTHD.flatten(0, 1))
    return q_BTHD


def build(case: Case, device: str, quick: bool) -> Contest:
    """Each sequence's tokens fill pages that lie anywhere in the pool."""
    heads, tokens = case.settings["heads"], case.settings["tokens"]
    dtype, batch = getattr(torch, case.dtype), 2
    # Bytes of one token: q, k and v in, q, k and v out.
    token_bytes = 6 * heads * HEAD_DIM * dtype.itemsize
    if tokens is None:
        batch = 16
        tokens = -(-4 * last_level_bytes() // (batch * token_bytes))
    qkv_BT3HD = torch.randn(batch, tokens, 3, heads, HEAD_DIM, device=device).to(dtype)
    scale_mul_1H11 = torch.linspace(0, 5, heads, device=device).view(1, heads, 1, 1)
    entries = -(-tokens // PAGE_SIZE)
    shape = (2, batch * entries, PAGE_SIZE, heads, HEAD_DIM)
    pages = torch.zeros(shape, dtype=dtype, device=device)
    k_pages, v_pages = pages.unbind(0)
    first_BM = torch.randperm(batch * entries, device=device).view(batch, entries) * PAGE_SIZE
    slots_BMN = first_BM.unsqueeze(-1) + torch.arange(PAGE_SIZE, device=device)
    slots_BT = slots_BMN.flatten(1)[:, :tokens].contiguous()
    given = (qkv_BT3HD, scale_mul_1H11, k_pages, v_pages, slots_BT)
    names = ("qkv_BT3HD", "scale_mul_1H11", "k_pages_PNHD", "v_pages_PNHD", "slots_BT")
    keywords = dict(zip(names, given, strict=True))
    calls, missing = {}, {}
    request = Request(device, (dtype, torch.float32), HEAD_DIM)
    for name, impl, reason in backends(FUSED_IMPLS, request):
        if reason is None:
            calls[name] = functools.partial(impl.forward, **keywords)
        else:
            missing[name] = reason
    ours = (*(name for name in calls if name != "reference"), "op", "two-ops")
    calls["op"] = functools.partial(qk_norm_append_paged_kv, *given)
    calls["two-ops"] = functools.partial(_two_ops, *given)
    k_rows_SHD, v_rows_SHD = k_pages.flatten(0, 1), v_pages.flatten(0, 1)
    slots_N = slots_BT.flatten()
    calls["eager"] = functools.partial(
        eager, qkv_BT3HD, scale_mul_1H11, k_rows_SHD, v_rows_SHD, slots_N
    )

    # The whole would take long in float64: the last 16 tokens of the batch are checked.
    some = slots_N[-16:]

    def alone(kind):
        last = qkv_BT3HD.flatten(0, 1)[-16:].unsqueeze(0).to(kind)
        rows = torch.zeros(2, 16, heads, HEAD_DIM, dtype=kind, device=device)
        order = torch.arange(last.shape[1], device=device)
        q_BTHD = eager(last, scale_mul_1H11.to(torch.promote_types(kind, torch.float32)),
                       *rows.unbind(0), order)  # fmt: skip
        return [q_BTHD[0], *(x[: len(order)] for x in rows)]

    def pick(name, q_BTHD):
        found = [q_BTHD.flatten(0, 1)[-16:], *(x[some].clone() for x in (k_rows_SHD, v_rows_SHD))]
        pages.zero_()  # the next contender has to write them itself
        return found

    return Contest(
        shape={"batch": batch, "tokens": tokens, "heads": heads, "head_dim": HEAD_DIM},
        flop=0,
        moved=batch * tokens * token_bytes + slots_BT.nbytes,
        calls=calls,
        missing=missing,
        peer="eager",
        ours=ours,
        check=near(alone(torch.float64), alone(dtype), ours=ours, pick=pick),
    )


def _two_ops(qkv_BT3HD, scale_mul_1H11, k_pages, v_pages, slots_BT):
    """The two public ops that the fused one replaces."""
    q_BTHD, k_BTHD, v_BTHD = qkv_BT3HD.unbind(2)
    q_BTHD, k_BTHD = qk_norm(q_BTHD, k_BTHD, scale_mul_1H11)
    append_paged_kv(k_BTHD, v_BTHD, k_pages, v_pages, slots_BT)
    return q_BTHD


@pytest.mark.benchmark(timer=replay)
def test_qk_norm_append_paged_kv(compete, device, case, contender):
    compete(OP, case, device, contender, build)
