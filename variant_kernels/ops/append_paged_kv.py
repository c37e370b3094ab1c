"""Writing new K and V into pages: ``append_paged_kv``.

Axes: B batch, T tokens of this call, H heads, D width of one head, P pages, N tokens in a page.

Pages are of the tokens' dtype, or 8 bits wide with a scale beside them: see ``kv_quantization``.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from variant_kernels.dispatch.request import Request
from variant_kernels.dispatch.select import Backend
from variant_kernels.dispatch.support import (
    always,
    cuda_unsupported,
    triton_unsupported,
)
from variant_kernels.kv_quantization import KV8_DTYPE, quantize_kv
from variant_kernels.ops import contract
from variant_kernels.ops.pages import check_memory, check_slot_values, check_target, cpu_unsupported
from variant_kernels.ops.registry import Op


def reference_append_paged_kv(
    *,
    k_BTHD: Tensor,
    v_BTHD: Tensor,
    k_pages_PNHD: Tensor,
    v_pages_PNHD: Tensor,
    slots_BT: Tensor,
    k_scales_PNH: Tensor | None = None,
    v_scales_PNH: Tensor | None = None,
) -> None:
    page_size = k_pages_PNHD.shape[1]
    kept_BT = slots_BT >= 0
    slots_S = slots_BT[kept_BT]
    index = slots_S // page_size, slots_S % page_size
    for new_BTHD, pages_PNHD, scales_PNH in (
        (k_BTHD, k_pages_PNHD, k_scales_PNH),
        (v_BTHD, v_pages_PNHD, v_scales_PNH),
    ):
        if scales_PNH is None:
            pages_PNHD[index] = new_BTHD[kept_BT]
        else:
            values_SHD, scales_PNH[index] = quantize_kv(new_BTHD[kept_BT])
            # torch has no indexed assignment of 8-bit floats.
            pages_PNHD.view(torch.uint8)[index] = values_SHD.view(torch.uint8)


def _check(
    k_BTHD: Tensor,
    v_BTHD: Tensor,
    k_pages_PNHD: Tensor,
    v_pages_PNHD: Tensor,
    slots_BT: Tensor,
    k_scales_PNH: Tensor | None = None,
    v_scales_PNH: Tensor | None = None,
) -> None:
    op = "append_paged_kv"
    scales = k_scales_PNH, v_scales_PNH
    contract.check_float(op, "k_BTHD", k_BTHD)
    contract.check_ndim(op, "k_BTHD", k_BTHD, "(B, T, H, D)")
    contract.check_float(op, "v_BTHD", v_BTHD)
    contract.check_shape(op, "v_BTHD", v_BTHD, tuple(k_BTHD.shape), "to match k_BTHD")
    contract.check_same(op, "v_BTHD", v_BTHD, "k_BTHD", k_BTHD)
    check_target(op, k_pages_PNHD, v_pages_PNHD, slots_BT, "k_BTHD", k_BTHD, *scales)


def _request(k: Tensor, v: Tensor, k_pages: Tensor, *_: Tensor | None) -> Request:
    kv_dtype = KV8_DTYPE if k_pages.dtype == KV8_DTYPE else None
    return Request(k.device.type, (k.dtype,), k.shape[-1], kv_dtype=kv_dtype)


append_paged_kv_op = Op(
    "append_paged_kv(Tensor k_BTHD, Tensor v_BTHD, Tensor(a!) k_pages_PNHD,"
    " Tensor(b!) v_pages_PNHD, Tensor slots_BT, str backend, Tensor(c!)? k_scales_PNH=None,"
    " Tensor(d!)? v_scales_PNH=None) -> ()",
    check=_check,
    check_values=partial(check_slot_values, "append_paged_kv"),
    check_memory=partial(check_memory, "append_paged_kv"),
    request=_request,
    fake=lambda *_: None,
    backends={
        "triton": Backend(triton_unsupported, "triton_ops.append_paged_kv.launch_append_paged_kv"),
        "cuda": Backend(cuda_unsupported, "cuda_ops.append_paged_kv.launch_append_paged_kv"),
        "cpu": Backend(cpu_unsupported, "cpu_ops.append_paged_kv.launch_append_paged_kv"),
        "reference": Backend(always, reference_append_paged_kv),
    },
)


def append_paged_kv(
    k_BTHD: Tensor,
    v_BTHD: Tensor,
    k_pages_PNHD: Tensor,
    v_pages_PNHD: Tensor,
    slots_BT: Tensor,
    *,
    k_scales_PNH: Tensor | None = None,
    v_scales_PNH: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Write each token's K and V into its slot of the page pool, in place.

        k_pages[slot // page_size, slot % page_size] = k;  the same for v

    With scales the pool is 8 bits wide: each head of each token is divided by the power of two
    that its largest magnitude needs, and rounded to e4m3 (``kv_quantization.quantize_kv``).

    Args:
        k_BTHD, v_BTHD: new tokens; float32, float16 or bfloat16; strided views are taken as they
            are.
        k_pages_PNHD, v_pages_PNHD: the pool, (P, page_size, H, D), same dtype and device; with
            scales float8_e4m3fn.
        slots_BT: int64, page * page_size + offset; -1 skips the token. Slots must differ.
        k_scales_PNH, v_scales_PNH: the pool's scales, (P, page_size, H) uint8 (E8M0: a byte e is
            2^(e - 127)), written in place; both or neither.
    Raises:
        ValueError: shapes or devices disagree, the pool overlaps itself or another argument, or
            (CPU) a slot lies outside the pool; nothing is written then.  TypeError: dtype not
            listed.  NotImplementedError: a derivative is wanted.
    Gradient: none.
    """
    pool = k_pages_PNHD, v_pages_PNHD
    scales = k_scales_PNH, v_scales_PNH
    append_paged_kv_op(k_BTHD, v_BTHD, *pool, slots_BT, backend, *scales)


def sample_inputs(dtype: torch.dtype, generator: torch.Generator) -> list[tuple[Tensor, ...]]:
    """Packed projections, shuffled slots, skipped tokens."""
    cases = []
    for batch, tokens, heads, head_dim, page_size in (
        (1, 1, 1, 16, 1),
        (2, 5, 3, 24, 4),
        (3, 9, 2, 64, 16),
    ):
        packed = torch.randn(
            batch, tokens, 3, heads, head_dim, generator=generator, device="cpu"
        ).to(dtype)
        num_pages = -(-2 * batch * tokens // page_size)
        pages = torch.randn(
            2, num_pages, page_size, heads, head_dim, generator=generator, device="cpu"
        )
        slots = torch.randperm(num_pages * page_size, generator=generator, device="cpu")[
            : batch * tokens
        ]
        slots = slots.view(batch, tokens)
        slots[-1, -1] = -1 if tokens > 1 else slots[-1, -1]
        k_pages, v_pages = pages.to(dtype).unbind(0)
        cases.append((packed[:, :, 1], packed[:, :, 2], k_pages, v_pages, slots))
    return cases
