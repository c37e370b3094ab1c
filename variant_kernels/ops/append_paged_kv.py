"""Writing new K and V into pages: ``append_paged_kv``.

Axes: B batch, T tokens of this call, H heads, D width of one head, P pages, N tokens in a page.

Pages are of the tokens' dtype, or 8 bits wide with a scale beside them: see ``kv_quantization``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from variant_kernels.cpu_ops.values import fits_slots
from variant_kernels.dispatch.request import dtype_name
from variant_kernels.dispatch.select import Impl, Lazy, choose
from variant_kernels.dispatch.support import cpu_unsupported, cuda_unsupported, triton_unsupported
from variant_kernels.kv_quantization import KV8_DTYPE, quantize_kv
from variant_kernels.ops import contract
from variant_kernels.ops.registry import refuse_gradient, register


def check_slots(op: str, slots_BT: Tensor, num_slots: int) -> None:
    """Slots are -1 or in [0, num_slots); checked on the CPU, where looking costs no sync."""
    if slots_BT.device.type != "cpu" or slots_BT.numel() == 0:
        return
    if not fits_slots(slots_BT, num_slots):
        wrong_BT = (slots_BT < -1) | (slots_BT >= num_slots)
        row, token = (int(i) for i in wrong_BT.nonzero()[0])
        raise ValueError(
            f"{op}: slots_BT[{row}, {token}] must be -1 or in [0, {num_slots}); got "
            f"{int(slots_BT[row, token])}. A slot is page * page_size + offset; -1 skips the token"
        )


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
    place = slots_S // page_size, slots_S % page_size
    for new_BTHD, pages_PNHD, scales_PNH in (
        (k_BTHD, k_pages_PNHD, k_scales_PNH),
        (v_BTHD, v_pages_PNHD, v_scales_PNH),
    ):
        if scales_PNH is None:
            pages_PNHD[place] = new_BTHD[kept_BT]
        else:
            values_SHD, scales_PNH[place] = quantize_kv(new_BTHD[kept_BT])
            # torch has no indexed assignment of 8-bit floats.
            pages_PNHD.view(torch.uint8)[place] = values_SHD.view(torch.uint8)


APPEND_IMPLS = {
    "reference": Impl(reference_append_paged_kv),
    "cpu": Impl(
        Lazy("variant_kernels.cpu_ops.append_paged_kv", "launch_append_paged_kv"),
        unsupported=cpu_unsupported,
    ),
    "triton": Impl(
        Lazy("variant_kernels.triton_ops.append_paged_kv", "launch_append_paged_kv"),
        unsupported=triton_unsupported,
    ),
    "cuda": Impl(
        Lazy("variant_kernels.cuda_ops.append_paged_kv", "launch_append_paged_kv"),
        unsupported=cuda_unsupported,
    ),
}

IMPLS = {"append_paged_kv": APPEND_IMPLS}


def given_scales(k_scales: Tensor | None, v_scales: Tensor | None) -> dict[str, Tensor]:
    """A launcher's arguments; none without scales, which not every backend takes."""
    if k_scales is None or v_scales is None:
        return {}
    return {"k_scales_PNH": k_scales, "v_scales_PNH": v_scales}


def _append(k, v, k_pages, v_pages, slots, backend, k_scales=None, v_scales=None):
    check_slots("append_paged_kv", slots, k_pages.shape[0] * k_pages.shape[1])
    batch, tokens, heads, head_dim = k.shape
    kv_dtype = None if k_scales is None else KV8_DTYPE
    request = contract.request(
        k.device.type, (k.dtype,), head_dim, None, None, kv_dtype, batch * tokens * heads
    )
    choose("append_paged_kv", APPEND_IMPLS, backend, request).forward(
        k_BTHD=k,
        v_BTHD=v,
        k_pages_PNHD=k_pages,
        v_pages_PNHD=v_pages,
        slots_BT=slots,
        **given_scales(k_scales, v_scales),
    )


append_paged_kv_op = register(
    "append_paged_kv(Tensor k, Tensor v, Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor slots,"
    " str backend, Tensor(c!)? k_scales=None, Tensor(d!)? v_scales=None) -> ()",
    implementation=_append,
    fake=lambda k, v, k_pages, v_pages, slots, backend, k_scales=None, v_scales=None: None,
)


def fits_pages(
    k_pages_PNHD: Tensor,
    v_pages_PNHD: Tensor,
    like_BTHD: Tensor,
    k_scales_PNH: Tensor | None,
    v_scales_PNH: Tensor | None,
) -> bool:
    """Whether :func:`check_pages` has nothing to say, nor ``check_float`` of ``like_BTHD``."""
    if k_scales_PNH is None and v_scales_PNH is None:
        pages_dtype = like_BTHD.dtype
    elif _fit_scales(k_pages_PNHD, k_scales_PNH) and _fit_scales(v_pages_PNHD, v_scales_PNH):
        pages_dtype = KV8_DTYPE
    else:
        return False
    pool, heads = k_pages_PNHD.shape, like_BTHD.shape[2:]
    dtype, device = like_BTHD.dtype, like_BTHD.device
    k_strides, v_strides = k_pages_PNHD.stride(), v_pages_PNHD.stride()
    return (
        len(pool) == 4
        and v_pages_PNHD.shape == pool
        and pool[2:] == heads
        and pool[1] >= 1
        and dtype in contract.FLOAT_DTYPES
        and k_pages_PNHD.dtype == v_pages_PNHD.dtype == pages_dtype
        and k_pages_PNHD.device == v_pages_PNHD.device == device
        and k_strides[3] == v_strides[3] == like_BTHD.stride()[-1] == 1
        and 0 not in k_strides
        and 0 not in v_strides
    )


def _fit_scales(pages_PNHD: Tensor, scales_PNH: object) -> bool:
    return (
        isinstance(scales_PNH, Tensor)
        and scales_PNH.dtype == torch.uint8
        and scales_PNH.shape == pages_PNHD.shape[:3]
        and scales_PNH.device == pages_PNHD.device
        and scales_PNH.stride()[2] == 1
        and 0 not in scales_PNH.stride()
    )


def fits_target(
    k_pages_PNHD: Tensor,
    v_pages_PNHD: Tensor,
    slots_BT: Tensor,
    like_BTHD: Tensor,
    k_scales_PNH: Tensor | None,
    v_scales_PNH: Tensor | None,
) -> bool:
    """Whether :func:`check_target` has nothing to say, nor ``check_float`` of ``like_BTHD``."""
    return (
        fits_pages(k_pages_PNHD, v_pages_PNHD, like_BTHD, k_scales_PNH, v_scales_PNH)
        and k_pages_PNHD is not v_pages_PNHD
        and (k_scales_PNH is None or k_scales_PNH is not v_scales_PNH)
        and slots_BT.shape == like_BTHD.shape[:2]
        and slots_BT.dtype == torch.int64
        and slots_BT.device == like_BTHD.device
    )


def _fits(
    k_BTHD: Tensor,
    v_BTHD: Tensor,
    k_pages_PNHD: Tensor,
    v_pages_PNHD: Tensor,
    slots_BT: Tensor,
    k_scales_PNH: Tensor | None = None,
    v_scales_PNH: Tensor | None = None,
) -> bool:
    """Whether no check of :func:`append_paged_kv` has anything to say."""
    return (
        contract.all_tensors(k_BTHD, v_BTHD, k_pages_PNHD, v_pages_PNHD, slots_BT)
        and k_BTHD.ndim == 4
        and v_BTHD.shape == k_BTHD.shape
        and v_BTHD.dtype == k_BTHD.dtype
        and v_BTHD.device == k_BTHD.device
        and v_BTHD.stride()[3] == 1
        and fits_target(k_pages_PNHD, v_pages_PNHD, slots_BT, k_BTHD, k_scales_PNH, v_scales_PNH)
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
        ValueError: shapes or devices disagree, or (CPU) a slot outside the pool; nothing is
            written then.  TypeError: dtype not listed.
    Gradient: none; raises RuntimeError where one is wanted.
    """
    op = "append_paged_kv"
    scales = k_scales_PNH, v_scales_PNH
    if not _fits(k_BTHD, v_BTHD, k_pages_PNHD, v_pages_PNHD, slots_BT, *scales):
        contract.check_float(op, "k_BTHD", k_BTHD)
        contract.check_ndim(op, "k_BTHD", k_BTHD, "(B, T, H, D)")
        contract.check_float(op, "v_BTHD", v_BTHD)
        contract.check_shape(op, "v_BTHD", v_BTHD, tuple(k_BTHD.shape), "to match k_BTHD")
        contract.check_same(op, "v_BTHD", v_BTHD, "k_BTHD", k_BTHD)
        check_target(op, k_pages_PNHD, v_pages_PNHD, slots_BT, "k_BTHD", k_BTHD, *scales)
    refuse_gradient(op, k_BTHD, v_BTHD, k_pages_PNHD, v_pages_PNHD)
    append_paged_kv_op(k_BTHD, v_BTHD, k_pages_PNHD, v_pages_PNHD, slots_BT, backend, *scales)


def check_target(
    op: str,
    k_pages_PNHD: Tensor,
    v_pages_PNHD: Tensor,
    slots_BT: Tensor,
    name: str,
    like_BTHD: Tensor,
    k_scales_PNH: Tensor | None,
    v_scales_PNH: Tensor | None,
) -> None:
    """Pages that can be written, a slot for every token of ``name``; values are not looked at."""
    check_pages(op, k_pages_PNHD, v_pages_PNHD, name, like_BTHD, k_scales_PNH, v_scales_PNH)
    if k_pages_PNHD is v_pages_PNHD:
        raise ValueError(f"{op}: k_pages_PNHD and v_pages_PNHD must be two tensors; got one twice")
    if k_scales_PNH is not None and k_scales_PNH is v_scales_PNH:
        raise ValueError(f"{op}: k_scales_PNH and v_scales_PNH must be two tensors; got one twice")
    contract.check_tensor(op, "slots_BT", slots_BT)
    contract.check_shape(op, "slots_BT", slots_BT, tuple(like_BTHD.shape[:2]), f"to match {name}")
    if slots_BT.dtype != torch.int64:
        raise TypeError(f"{op}: slots_BT must be int64; got {slots_BT.dtype}")
    contract.check_device(op, "slots_BT", slots_BT, name, like_BTHD)


def check_pages(
    op: str,
    k_pages_PNHD: Tensor,
    v_pages_PNHD: Tensor,
    name: str,
    like_BTHD: Tensor,
    k_scales_PNH: Tensor | None,
    v_scales_PNH: Tensor | None,
) -> None:
    """Pages are two tensors (P, page_size, H, D) of the heads, dtype and device of ``name``.

    With scales, (P, page_size, H) uint8, they are float8_e4m3fn.
    """
    if (k_scales_PNH is None) != (v_scales_PNH is None):
        missing = "k_scales_PNH" if k_scales_PNH is None else "v_scales_PNH"
        raise ValueError(f"{op}: {missing} must be given where the other scales are; got None")
    eight_bits = k_scales_PNH is not None
    for pages_name, pages in (("k_pages_PNHD", k_pages_PNHD), ("v_pages_PNHD", v_pages_PNHD)):
        contract.check_float(op, pages_name, pages, (*contract.FLOAT_DTYPES, KV8_DTYPE))
        contract.check_ndim(op, pages_name, pages, "(P, page_size, H, D)")
        if eight_bits != (pages.dtype == KV8_DTYPE):
            raise TypeError(
                f"{op}: {pages_name} must be float8_e4m3fn where k_scales_PNH and v_scales_PNH "
                f"are given, and only there; got {dtype_name(pages.dtype)} "
                f"{'with' if eight_bits else 'without'} scales"
            )
        if eight_bits:
            contract.check_device(op, pages_name, pages, name, like_BTHD)
        else:
            contract.check_same(op, pages_name, pages, name, like_BTHD)
        if pages.shape[2:] != like_BTHD.shape[2:]:
            raise ValueError(
                f"{op}: {pages_name} must end in (H, D) = {tuple(like_BTHD.shape[2:])} to match "
                f"{name}; got {tuple(pages.shape)}"
            )
        if pages.shape[1] < 1:
            raise ValueError(
                f"{op}: {pages_name} must have page_size >= 1; got {tuple(pages.shape)}"
            )
        _check_not_expanded(op, pages_name, pages)
    contract.check_shape(
        op, "v_pages_PNHD", v_pages_PNHD, tuple(k_pages_PNHD.shape), "to match k_pages_PNHD"
    )
    for scales_name, scales in (("k_scales_PNH", k_scales_PNH), ("v_scales_PNH", v_scales_PNH)):
        if scales is None:
            continue
        contract.check_tensor(op, scales_name, scales)
        shape = tuple(k_pages_PNHD.shape[:3])
        contract.check_shape(op, scales_name, scales, shape, "to match k_pages_PNHD")
        if scales.dtype != torch.uint8:
            raise TypeError(f"{op}: {scales_name} must be uint8; got {dtype_name(scales.dtype)}")
        contract.check_device(op, scales_name, scales, name, like_BTHD)
        contract.check_last_contiguous(op, scales_name, scales)
        _check_not_expanded(op, scales_name, scales)


def _check_not_expanded(op: str, name: str, pool: Tensor) -> None:
    if any(n > 1 and step == 0 for n, step in zip(pool.shape, pool.stride(), strict=True)):
        raise ValueError(
            f"{op}: {name} must not be expanded: several slots would share one address; "
            f"got strides {pool.stride()}"
        )


def sample_inputs(dtype: torch.dtype, generator: torch.Generator) -> list[tuple[Tensor, ...]]:
    """Packed projections, shuffled slots, skipped tokens."""
    cases = []
    for batch, tokens, heads, head_dim, page_size in (
        (1, 1, 1, 16, 1),
        (2, 5, 3, 24, 4),
        (3, 9, 2, 64, 16),
    ):
        packed = torch.randn(batch, tokens, 3, heads, head_dim, generator=generator).to(dtype)
        num_pages = -(-2 * batch * tokens // page_size)
        pages = torch.randn(2, num_pages, page_size, heads, head_dim, generator=generator)
        slots = torch.randperm(num_pages * page_size, generator=generator)[: batch * tokens]
        slots = slots.view(batch, tokens)
        slots[-1, -1] = -1 if tokens > 1 else slots[-1, -1]
        k_pages, v_pages = pages.to(dtype).unbind(0)
        cases.append((packed[:, :, 1], packed[:, :, 2], k_pages, v_pages, slots))
    return cases
