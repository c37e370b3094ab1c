"""Checks of pages and slots, for the three ops that write or read them.

Axes: B batch, T tokens of this call, H heads, D width of one head, P pages, N tokens in a page.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from variant_kernels.cpu_ops.values import fits_slots
from variant_kernels.dispatch import support
from variant_kernels.dispatch.request import Request, dtype_name
from variant_kernels.kv_quantization import KV8_DTYPE
from variant_kernels.ops import contract
from variant_kernels.tensors import overlaps_itself, share_memory

# Combinations of addresses for each signature. An allocator hands out the same ones again.
MAX_REMEMBERED = 1024
# What append_paged_kv and qk_norm_append_paged_kv write.
WRITTEN = ("k_pages_PNHD", "v_pages_PNHD", "k_scales_PNH", "v_scales_PNH")


def cpu_unsupported(request: Request) -> str | None:
    """Why the C++ backend cannot serve one of these ops: it takes float16 too.

    Not beside 8-bit pages: an engine gives these its products' dtype, which is not float16.
    """
    if request.kv_dtype is not None:
        return support.cpu_unsupported(request)
    return support.cpu_unsupported(request, contract.FLOAT_DTYPES)


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
        contract.check_float(op, pages_name, pages, (*contract.REFERENCE_DTYPES, KV8_DTYPE))
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
    """Pages that can be written, a slot for every token of ``name``; values are not checked."""
    check_pages(op, k_pages_PNHD, v_pages_PNHD, name, like_BTHD, k_scales_PNH, v_scales_PNH)
    pools = k_pages_PNHD, v_pages_PNHD, k_scales_PNH, v_scales_PNH
    for pool_name, pool in zip(WRITTEN, pools, strict=True):
        if pool is not None and overlaps_itself(pool):
            raise ValueError(
                f"{op}: {pool_name} must not overlap itself: several slots would share an address; "
                f"got shape {tuple(pool.shape)} and strides {pool.stride()}"
            )
    contract.check_tensor(op, "slots_BT", slots_BT)
    contract.check_shape(op, "slots_BT", slots_BT, tuple(like_BTHD.shape[:2]), f"to match {name}")
    if slots_BT.dtype != torch.int64:
        raise TypeError(f"{op}: slots_BT must be int64; got {slots_BT.dtype}")
    contract.check_device(op, "slots_BT", slots_BT, name, like_BTHD)


def check_memory(op: str, arguments: dict[str, Any], apart: set[tuple[int, ...]]) -> None:
    """The pool may be written, and shares no memory with another argument.

    K and V that lie interleaved in one tensor are apart. As in torch, a tensor of inference mode is
    written under inference mode only; any other one gets a new version, so that autograd sees the
    change.

    Args:
        apart: addresses that passed before with tensors of this signature; gains these.
    """
    pools = [x for x in map(arguments.get, WRITTEN) if x is not None]
    if not torch.is_inference_mode_enabled():
        for name, pool in zip(WRITTEN, pools):  # noqa: B905
            if pool.is_inference():
                raise ValueError(
                    f"{op}: {name} was made under torch.inference_mode() and must be written "
                    "there; got a call outside. Pass a clone"
                )
        increment_version(pools)
    # The arguments of both ops are tensors or None.
    addresses = tuple([x.data_ptr() for x in arguments.values() if x is not None])
    if addresses in apart:
        return
    for position, (name, pool) in enumerate(zip(WRITTEN, pools)):  # noqa: B905
        others = {n: x for n, x in arguments.items() if x is not None and n not in WRITTEN}
        others.update(zip(WRITTEN[position + 1 :], pools[position + 1 :]))  # noqa: B905
        for other, x in others.items():
            if share_memory(pool, x):
                raise ValueError(
                    f"{op}: {name} and {other} must not share memory, because {name} is written "
                    "in place; got tensors that overlap. Pass a clone"
                )
    if len(apart) >= MAX_REMEMBERED:
        apart.clear()
    apart.add(addresses)


def check_slots(op: str, slots_BT: Tensor, num_slots: int) -> None:
    """Slots are -1 or in [0, num_slots); for CPU tensors."""
    if slots_BT.numel() == 0:
        return
    if not fits_slots(slots_BT, num_slots):
        wrong_BT = (slots_BT < -1) | (slots_BT >= num_slots)
        row, token = (int(i) for i in wrong_BT.nonzero()[0])
        raise ValueError(
            f"{op}: slots_BT[{row}, {token}] must be -1 or in [0, {num_slots}); got "
            f"{int(slots_BT[row, token])}. A slot is page * page_size + offset; -1 skips the token"
        )


def check_slot_values(op: str, arguments: dict[str, Tensor]) -> None:
    """:func:`check_slots` of a launcher's arguments."""
    pool = arguments["k_pages_PNHD"].shape
    check_slots(op, arguments["slots_BT"], pool[0] * pool[1])
