"""``qk_norm`` and ``append_paged_kv`` in one pass over the projection: ``qk_norm_append_paged_kv``.

Axes: B batch, T tokens of this call, H heads, D width of one head, P pages, N tokens in a page.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from variant_kernels.dispatch.request import Request
from variant_kernels.dispatch.select import Backend, Launcher
from variant_kernels.dispatch.support import (
    always,
    cuda_unsupported,
    triton_unsupported,
)
from variant_kernels.kv_quantization import KV8_DTYPE
from variant_kernels.ops import contract
from variant_kernels.ops.append_paged_kv import reference_append_paged_kv
from variant_kernels.ops.pages import check_memory, check_slot_values, check_target, cpu_unsupported
from variant_kernels.ops.qk_norm import check_scale_mul, reference_qk_norm_forward
from variant_kernels.ops.registry import Op

# --- the definition -----------------------------------------------------------------------------


def reference_qk_norm_append_paged_kv(
    *,
    qkv_BT3HD: Tensor,
    scale_mul_1H11: Tensor | None,
    k_pages_PNHD: Tensor,
    v_pages_PNHD: Tensor,
    slots_BT: Tensor,
    k_scales_PNH: Tensor | None = None,
    v_scales_PNH: Tensor | None = None,
) -> Tensor:
    q_BTHD, k_BTHD, v_BTHD = qkv_BT3HD.unbind(2)
    if scale_mul_1H11 is not None:
        q_BTHD, k_BTHD = reference_qk_norm_forward(
            q_BTHD=q_BTHD, k_BTHD=k_BTHD, scale_mul_1H11=scale_mul_1H11
        )
    reference_append_paged_kv(
        k_BTHD=k_BTHD,
        v_BTHD=v_BTHD,
        k_pages_PNHD=k_pages_PNHD,
        v_pages_PNHD=v_pages_PNHD,
        slots_BT=slots_BT,
        k_scales_PNH=k_scales_PNH,
        v_scales_PNH=v_scales_PNH,
    )
    return q_BTHD


# --- the declaration ----------------------------------------------------------------------------


def _check(
    qkv_BT3HD: Tensor,
    scale_mul_1H11: Tensor | None,
    k_pages_PNHD: Tensor,
    v_pages_PNHD: Tensor,
    slots_BT: Tensor,
    k_scales_PNH: Tensor | None = None,
    v_scales_PNH: Tensor | None = None,
) -> None:
    op = "qk_norm_append_paged_kv"
    contract.check_float(op, "qkv_BT3HD", qkv_BT3HD)
    contract.check_ndim(op, "qkv_BT3HD", qkv_BT3HD, "(B, T, 3, H, D)")
    if qkv_BT3HD.shape[2] != 3:
        raise ValueError(
            f"{op}: qkv_BT3HD must be (B, T, 3, H, D), queries, keys and values on its third axis; "
            f"got {tuple(qkv_BT3HD.shape)}"
        )
    contract.check_head_dim(op, "qkv_BT3HD", qkv_BT3HD.shape[-1])
    q_BTHD = qkv_BT3HD.select(2, 0)
    if scale_mul_1H11 is not None:
        check_scale_mul(op, scale_mul_1H11, "qkv_BT3HD", q_BTHD)
    scales = k_scales_PNH, v_scales_PNH
    check_target(op, k_pages_PNHD, v_pages_PNHD, slots_BT, "qkv_BT3HD", q_BTHD, *scales)


def _request(qkv: Tensor, scale_mul: Tensor | None, k_pages: Tensor, *_: Tensor | None) -> Request:
    dtypes = (qkv.dtype,) if scale_mul is None else (qkv.dtype, scale_mul.dtype)
    kv_dtype = KV8_DTYPE if k_pages.dtype == KV8_DTYPE else None
    return Request(qkv.device.type, dtypes, qkv.shape[-1], kv_dtype=kv_dtype)


def _launch(launcher: Launcher, arguments: dict[str, Any]) -> Tensor:
    q_BTHD = launcher(**arguments)
    # Without scale_mul launchers return a view of qkv, which saves direct callers a copy; the
    # result of a torch.library op must not be a view of an argument.
    if arguments["scale_mul_1H11"] is None:
        return q_BTHD.clone(memory_format=torch.contiguous_format)
    return q_BTHD


def _fake(qkv: Tensor, *rest: Any) -> Tensor:
    batch, tokens, _, heads, head_dim = qkv.shape
    return qkv.new_empty((batch, tokens, heads, head_dim))


_LAUNCHER = "qk_norm_append_paged_kv.launch_qk_norm_append_paged_kv"
qk_norm_append_paged_kv_op = Op(
    "qk_norm_append_paged_kv(Tensor qkv_BT3HD, Tensor? scale_mul_1H11, Tensor(a!) k_pages_PNHD,"
    " Tensor(b!) v_pages_PNHD, Tensor slots_BT, str backend, Tensor(c!)? k_scales_PNH=None,"
    " Tensor(d!)? v_scales_PNH=None) -> Tensor",
    check=_check,
    check_values=partial(check_slot_values, "qk_norm_append_paged_kv"),
    check_memory=partial(check_memory, "qk_norm_append_paged_kv"),
    request=_request,
    fake=_fake,
    launch=_launch,
    backends={
        "triton": Backend(triton_unsupported, f"triton_ops.{_LAUNCHER}"),
        "cuda": Backend(cuda_unsupported, f"cuda_ops.{_LAUNCHER}"),
        "cpu": Backend(cpu_unsupported, f"cpu_ops.{_LAUNCHER}"),
        "reference": Backend(always, reference_qk_norm_append_paged_kv),
    },
)


# --- public function ----------------------------------------------------------------------------


def qk_norm_append_paged_kv(
    qkv_BT3HD: Tensor,
    scale_mul_1H11: Tensor | None,
    k_pages_PNHD: Tensor,
    v_pages_PNHD: Tensor,
    slots_BT: Tensor,
    *,
    k_scales_PNH: Tensor | None = None,
    v_scales_PNH: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """``qk_norm``, then ``append_paged_kv``: the packed projection is read once.

        q' = q / max(|q|, 1e-12) * exp(min(scale_mul, log 100)),  k' = k / max(|k|, 1e-12)
        k_pages[slot // page_size, slot % page_size] = k';  the same for v

    Without ``scale_mul`` nothing is normalised: q' = q, k' = k. With scales the pool is 8 bits
    wide: k', rounded to qkv's dtype, and v go through ``kv_quantization.quantize_kv``.
    Source: VAR (arXiv 2404.02905), attention with L2 norm.

    Args:
        qkv_BT3HD: packed projection (B, T, 3, H, D); float32, float16 or bfloat16; strided views
            are taken as they are. D: a multiple of 8 from 16 to 256.
        scale_mul_1H11: logarithm of each head's scale, (1, H, 1, 1), float32 or qkv's dtype; or
            None.
        k_pages_PNHD, v_pages_PNHD: the pool, (P, page_size, H, D), same dtype and device; with
            scales float8_e4m3fn. Written in place.
        slots_BT: int64, page * page_size + offset; -1 skips the token's K and V; its query is
            still returned. Slots must differ.
        k_scales_PNH, v_scales_PNH: the pool's scales, (P, page_size, H) uint8 (E8M0: a byte e is
            2^(e - 127)), written in place; both or neither.
    Returns:
        q'_BTHD, a new contiguous tensor of qkv's dtype; also without ``scale_mul``, where it is a
        copy.
    Raises:
        ValueError: shapes or devices disagree, the pool overlaps itself or another argument, or
            (CPU) a slot lies outside the pool; nothing is written then.  TypeError: dtype not
            listed.  NotImplementedError: a derivative is wanted.
    Gradient: none.
    """
    pool = k_pages_PNHD, v_pages_PNHD
    scales = k_scales_PNH, v_scales_PNH
    return qk_norm_append_paged_kv_op(qkv_BT3HD, scale_mul_1H11, *pool, slots_BT, backend, *scales)


def sample_inputs(
    dtype: torch.dtype, generator: torch.Generator
) -> list[tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]]:
    """Shuffled slots, skipped tokens, strided projections and pages, with and without the norm."""
    cases = []
    for batch, tokens, heads, head_dim, page_size in (
        (1, 1, 1, 16, 1),
        (2, 5, 3, 24, 4),
        (3, 9, 2, 64, 16),
        (1, 3, 2, 256, 2),
    ):
        packed = torch.randn(
            batch, tokens + 1, 4, heads, head_dim, generator=generator, device="cpu"
        ).to(dtype)
        packed[0, 1:, 1, 0] = 0
        num_pages = -(-2 * batch * tokens // page_size)
        pages = torch.randn(
            num_pages, 2, page_size, heads, head_dim, generator=generator, device="cpu"
        )
        slots = torch.randperm(num_pages * page_size, generator=generator, device="cpu")[
            : batch * tokens
        ]
        slots = slots.view(batch, tokens)
        slots[-1, -1] = -1 if tokens > 1 else slots[-1, -1]
        scale_mul = torch.linspace(-1, 5, heads, device="cpu").view(1, heads, 1, 1)
        for scale in (scale_mul, scale_mul.to(dtype), None):
            k_pages, v_pages = pages.to(dtype, copy=True).unbind(1)
            cases.append((packed[:, 1:, 1:], scale, k_pages, v_pages, slots))
    return cases
