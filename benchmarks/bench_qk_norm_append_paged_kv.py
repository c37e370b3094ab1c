"""qk_norm_append_paged_kv: normalise q and k of a packed projection, store k and v in pages."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Case, Check, Comparison, backends, near, replay, split
from variant.bench.environment import cache_bytes
from variant.bench.interleaved import Call
from variant_kernels import append_paged_kv, qk_norm, qk_norm_append_paged_kv
from variant_kernels.dispatch.request import Request
from variant_kernels.kv_quantization import KV8_DTYPE, dequantize_kv, quantize_kv
from variant_kernels.ops.qk_norm_append_paged_kv import qk_norm_append_paged_kv_op

OP = "qk_norm_append_paged_kv"
HEAD_DIM, PAGE_SIZE = 64, 16
# exact: the op on pages in the dtype of the tokens; in cases with pages of 8 bits only.
IMPLEMENTATIONS = ("triton", "cuda", "cpu", "op", "exact", "two-ops", "reference", "eager")
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


@dataclass(frozen=True)
class Inputs:
    """The tensors of one case. Axes: P pages, N slots of a page, S slots of the pool.

    pages_2PNHD: the pool in the dtype of the tokens.  codes_2PNHD, scales_2PNH: the pool in 8 bits,
    empty in a case without it.  slots_BT: where each token is stored in a pool of S = P * N slots.
    """

    qkv_BT3HD: Tensor
    scale_mul_1H11: Tensor
    pages_2PNHD: Tensor
    codes_2PNHD: Tensor
    scales_2PNH: Tensor
    slots_BT: Tensor
    kv8: bool

    def arguments(self, kv8: bool) -> dict[str, Tensor]:
        """The op's arguments by name, for the pool in 8 bits or for the other one."""
        pool = self.codes_2PNHD.view(KV8_DTYPE) if kv8 else self.pages_2PNHD
        named = {
            "qkv_BT3HD": self.qkv_BT3HD,
            "scale_mul_1H11": self.scale_mul_1H11,
            "k_pages_PNHD": pool[0],
            "v_pages_PNHD": pool[1],
            "slots_BT": self.slots_BT,
        }
        if kv8:
            named |= {"k_scales_PNH": self.scales_2PNH[0], "v_scales_PNH": self.scales_2PNH[1]}
        return named


def build(case: Case, device: str, quick: bool) -> Comparison:
    """Each sequence's tokens fill pages that lie anywhere in the pool."""
    inputs = _inputs(case, device)
    on_backends = _backends(inputs, device)
    arguments = inputs.arguments(inputs.kv8)
    calls, missing = split({
        **on_backends,
        "op": _public(qk_norm_append_paged_kv, arguments),
        "two-ops": _public(_two_ops, arguments),
        "exact": _exact_call(inputs),
        "eager": _eager_call(inputs),
    })  # fmt: skip
    ours = (*on_backends.keys() - {"reference"}, "op", "exact", "two-ops")
    batch, tokens, _, heads, head_dim = inputs.qkv_BT3HD.shape
    return Comparison(
        shape={"batch": batch, "tokens": tokens, "heads": heads, "head_dim": head_dim},
        flop=0,
        moved=batch * tokens * _token_bytes(case) + inputs.slots_BT.nbytes,
        calls=calls,
        missing=missing,
        peer="eager",
        ours=ours,
        check=_check(inputs, ours),
    )


def _token_bytes(case: Case) -> int:
    """Bytes of one token: q, k and v are read, q is written; k and v are written."""
    heads, itemsize = case.settings["heads"], getattr(torch, case.dtype).itemsize
    stored = HEAD_DIM + 1 if case.settings["kv8"] else HEAD_DIM * itemsize
    return 4 * heads * HEAD_DIM * itemsize + 2 * heads * stored


def _inputs(case: Case, device: str) -> Inputs:
    heads, tokens, kv8 = (case.settings[name] for name in ("heads", "tokens", "kv8"))
    dtype, batch = getattr(torch, case.dtype), 2
    if tokens is None:
        batch = 16
        tokens = -(-4 * cache_bytes(device) // (batch * _token_bytes(case)))
    qkv_BT3HD = torch.randn(batch, tokens, 3, heads, HEAD_DIM, device=device).to(dtype)
    entries = -(-tokens // PAGE_SIZE)
    shape = (2, batch * entries, PAGE_SIZE, heads, HEAD_DIM)
    codes_2PNHD = torch.zeros(shape if kv8 else (2, 0, 1, heads, HEAD_DIM), dtype=torch.uint8)
    codes_2PNHD = codes_2PNHD.to(device)
    first_BM = torch.randperm(batch * entries, device=device).view(batch, entries) * PAGE_SIZE
    slots_BMN = first_BM.unsqueeze(-1) + torch.arange(PAGE_SIZE, device=device)
    return Inputs(
        qkv_BT3HD=qkv_BT3HD,
        scale_mul_1H11=torch.linspace(0, 5, heads, device=device).view(1, heads, 1, 1),
        pages_2PNHD=torch.zeros(shape, dtype=dtype, device=device),
        codes_2PNHD=codes_2PNHD,
        scales_2PNH=torch.zeros_like(codes_2PNHD[..., 0]),
        slots_BT=slots_BMN.flatten(1)[:, :tokens].contiguous(),
        kv8=kv8,
    )


def _check(inputs: Inputs, ours: Sequence[str]) -> Check:
    """q, and K and V as they are stored, of the last 16 tokens of the batch: all of them would
    take long in float64.
    """
    dtype = inputs.qkv_BT3HD.dtype
    last_N = inputs.slots_BT.flatten()[-16:]

    def normalised_in(dtype: torch.dtype, rounded: bool) -> list[Tensor]:
        last_1T3HD = inputs.qkv_BT3HD.flatten(0, 1)[-16:].unsqueeze(0).to(dtype)
        scale_mul = inputs.scale_mul_1H11.to(torch.promote_types(dtype, torch.float32))
        q, k, v = (x[0] for x in normalised(last_1T3HD, scale_mul))
        if rounded:
            k, v = (dequantize_kv(*quantize_kv(x), dtype) for x in (k, v))
        return [q, k, v]

    def pick(name: str, q_BTHD: Tensor) -> list[Tensor]:
        pools = inputs.pages_2PNHD, inputs.codes_2PNHD, inputs.scales_2PNH
        values_2SHD, codes_2SHD, scales_2SH = (pool.flatten(1, 2) for pool in pools)
        if inputs.kv8 and name != "exact":
            codes = codes_2SHD[:, last_N].view(KV8_DTYPE)
            stored = dequantize_kv(codes, scales_2SH[:, last_N], dtype).unbind(0)
        else:
            stored = values_2SHD[:, last_N].unbind(0)
        for pool in pools:
            pool.zero_()  # so that what the next implementation leaves out is noticed
        return [q_BTHD.flatten(0, 1)[-16:], *stored]

    return near(
        normalised_in(torch.float64, rounded=False),
        normalised_in(dtype, rounded=inputs.kv8),
        ours=ours,
        pick=pick,
    )


# --- one builder for each implementation: its call, or the reason why it is missing -------------


def _public(function: Callable[..., Tensor], arguments: dict[str, Tensor]) -> Call:
    """A public function names its parameters otherwise than the launchers: by position."""
    scales = {name: x for name, x in arguments.items() if name.endswith("scales_PNH")}
    others = [x for name, x in arguments.items() if name not in scales]
    return functools.partial(function, *others, **scales)


def _backends(inputs: Inputs, device: str) -> dict[str, Call | str]:
    request = Request(
        device,
        (inputs.qkv_BT3HD.dtype, torch.float32),
        HEAD_DIM,
        kv_dtype=KV8_DTYPE if inputs.kv8 else None,
    )
    return {
        name: functools.partial(impl.forward, **inputs.arguments(inputs.kv8))
        if reason is None
        else reason
        for name, impl, reason in backends(qk_norm_append_paged_kv_op.backends, request)
    }


def _exact_call(inputs: Inputs) -> Call | str:
    if not inputs.kv8:
        return "this case has no pages of 8 bits"
    return _public(qk_norm_append_paged_kv, inputs.arguments(kv8=False))


def _eager_call(inputs: Inputs) -> Call:
    slots_N = inputs.slots_BT.flatten()
    if inputs.kv8:
        pool = inputs.codes_2PNHD.flatten(1, 2), inputs.scales_2PNH.flatten(1, 2)
        return functools.partial(eager_kv8, inputs.qkv_BT3HD, inputs.scale_mul_1H11, *pool, slots_N)
    return functools.partial(
        eager,
        inputs.qkv_BT3HD,
        inputs.scale_mul_1H11,
        inputs.pages_2PNHD.flatten(1, 2),
        slots_N,
    )


def _two_ops(qkv_BT3HD, scale_mul_1H11, k_pages, v_pages, slots_BT, **scales):
    """The two public ops that the fused one replaces."""
    q_BTHD, k_BTHD, v_BTHD = qkv_BT3HD.unbind(2)
    q_BTHD, k_BTHD = qk_norm(q_BTHD, k_BTHD, scale_mul_1H11)
    append_paged_kv(k_BTHD, v_BTHD, k_pages, v_pages, slots_BT, **scales)
    return q_BTHD


@pytest.mark.benchmark(timer=replay)
def test_qk_norm_append_paged_kv(report_timing, device, case, implementation):
    report_timing(OP, case, device, implementation, build)
