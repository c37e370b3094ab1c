"""Writing new K and V into pages: ``append_paged_kv``.

Axes: B batch, T tokens of this call, H heads, D width of one head, P pages, N tokens in a page.
"""

from __future__ import annotations

import torch
from torch import Tensor

from variant_kernels import contract
from variant_kernels.backends import (
    Impl,
    Lazy,
    choose,
    cpu_unsupported,
    cuda_unsupported,
    triton_unsupported,
)
from variant_kernels.cpu_ops.values import fits_slots
from variant_kernels.registry import refuse_gradient, register


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
) -> None:
    page_size = k_pages_PNHD.shape[1]
    kept_BT = slots_BT >= 0
    slots_S = slots_BT[kept_BT]
    page_S, offset_S = slots_S // page_size, slots_S % page_size
    k_pages_PNHD[page_S, offset_S] = k_BTHD[kept_BT]
    v_pages_PNHD[page_S, offset_S] = v_BTHD[kept_BT]


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


def _append(k, v, k_pages, v_pages, slots, backend):
    check_slots("append_paged_kv", slots, k_pages.shape[0] * k_pages.shape[1])
    request = contract.request(k.device.type, (k.dtype,), k.shape[-1])
    choose("append_paged_kv", APPEND_IMPLS, backend, request).forward(
        k_BTHD=k, v_BTHD=v, k_pages_PNHD=k_pages, v_pages_PNHD=v_pages, slots_BT=slots
    )


append_paged_kv_op = register(
    "append_paged_kv(Tensor k, Tensor v, Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor slots,"
    " str backend) -> ()",
    implementation=_append,
    fake=lambda k, v, k_pages, v_pages, slots, backend: None,
)


def fits_pages(k_pages_PNHD: Tensor, v_pages_PNHD: Tensor, like_BTHD: Tensor) -> bool:
    """Whether :func:`check_pages` has nothing to say, nor ``check_float`` of ``like_BTHD``."""
    pool, heads = k_pages_PNHD.shape, like_BTHD.shape[2:]
    dtype, device = like_BTHD.dtype, like_BTHD.device
    k_strides, v_strides = k_pages_PNHD.stride(), v_pages_PNHD.stride()
    return (
        len(pool) == 4
        and v_pages_PNHD.shape == pool
        and pool[2:] == heads
        and pool[1] >= 1
        and dtype in contract.FLOAT_DTYPES
        and k_pages_PNHD.dtype == v_pages_PNHD.dtype == dtype
        and k_pages_PNHD.device == v_pages_PNHD.device == device
        and k_strides[3] == v_strides[3] == like_BTHD.stride()[-1] == 1
        and 0 not in k_strides
        and 0 not in v_strides
    )


def fits_target(
    k_pages_PNHD: Tensor, v_pages_PNHD: Tensor, slots_BT: Tensor, like_BTHD: Tensor
) -> bool:
    """Whether :func:`check_target` has nothing to say, nor ``check_float`` of ``like_BTHD``."""
    return (
        fits_pages(k_pages_PNHD, v_pages_PNHD, like_BTHD)
        and k_pages_PNHD is not v_pages_PNHD
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
) -> bool:
    """Whether no check of :func:`append_paged_kv` has anything to say."""
    return (
        contract.all_tensors(k_BTHD, v_BTHD, k_pages_PNHD, v_pages_PNHD, slots_BT)
        and k_BTHD.ndim == 4
        and v_BTHD.shape == k_BTHD.shape
        and v_BTHD.dtype == k_BTHD.dtype
        and v_BTHD.device == k_BTHD.device
        and v_BTHD.stride()[3] == 1
        and fits_target(k_pages_PNHD, v_pages_PNHD, slots_BT, k_BTHD)
    )


def append_paged_kv(
    k_BTHD: Tensor,
    v_BTHD: Tensor,
    k_pages_PNHD: Tensor,
    v_pages_PNHD: Tensor,
    slots_BT: Tensor,
    *,
    backend: str = "auto",
) -> None:
    """Write each token's K and V into its slot of the page pool, in place.

        k_pages[slot // page_size, slot % page_size] = k;  the same for v

    Args:
        k_BTHD, v_BTHD: new tokens; float32, float16 or bfloat16; strided views are taken as they
            are.
        k_pages_PNHD, v_pages_PNHD: the pool, (P, page_size, H, D), same dtype and device.
        slots_BT: int64, page * page_size + offset; -1 skips the token. Slots must differ.
    Raises:
        ValueError: shapes or devices disagree, or (CPU) a slot outside the pool; nothing is
            written then.  TypeError: dtype not listed.
    Gradient: none; raises RuntimeError where one is wanted.
    """
    op = "append_paged_kv"
    if not _fits(k_BTHD, v_BTHD, k_pages_PNHD, v_pages_PNHD, slots_BT):
        contract.check_float(op, "k_BTHD", k_BTHD)
        contract.check_ndim(op, "k_BTHD", k_BTHD, "(B, T, H, D)")
        contract.check_float(op, "v_BTHD", v_BTHD)
        contract.check_shape(op, "v_BTHD", v_BTHD, tuple(k_BTHD.shape), "to match k_BTHD")
        contract.check_same(op, "v_BTHD", v_BTHD, "k_BTHD", k_BTHD)
        check_target(op, k_pages_PNHD, v_pages_PNHD, slots_BT, "k_BTHD", k_BTHD)
    refuse_gradient(op, k_BTHD, v_BTHD, k_pages_PNHD, v_pages_PNHD)
    append_paged_kv_op(k_BTHD, v_BTHD, k_pages_PNHD, v_pages_PNHD, slots_BT, backend)


def check_target(
    op: str,
    k_pages_PNHD: Tensor,
    v_pages_PNHD: Tensor,
    slots_BT: Tensor,
    name: str,
    like_BTHD: Tensor,
) -> None:
    """Pages that can be written, a slot for every token of ``name``; values are not looked at."""
    check_pages(op, k_pages_PNHD, v_pages_PNHD, name, like_BTHD)
    if k_pages_PNHD is v_pages_PNHD:
        raise ValueError(f"{op}: k_pages_PNHD and v_pages_PNHD must be two tensors; got one twice")
    contract.check_tensor(op, "slots_BT", slots_BT)
    contract.check_shape(op, "slots_BT", slots_BT, tuple(like_BTHD.shape[:2]), f"to match {name}")
    if slots_BT.dtype != torch.int64:
        raise TypeError(f"{op}: slots_BT must be int64; got {slots_BT.dtype}")
    contract.check_device(op, "slots_BT", slots_BT, name, like_BTHD)


def check_pages(
    op: str, k_pages_PNHD: Tensor, v_pages_PNHD: Tensor, name: str, like_BTHD: Tensor
) -> None:
    """Pages are two tensors (P, page_size, H, D) of the heads, dtype and device of ``name``."""
    for pages_name, pages in (("k_pages_PNHD", k_pages_PNHD), ("v_pages_PNHD", v_pages_PNHD)):
        contract.check_float(op, pages_name, pages)
        contract.check_ndim(op, pages_name, pages, "(P, page_size, H, D)")
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
        if any(n > 1 and step == 0 for n, step in zip(pages.shape, pages.stride(), strict=True)):
            raise ValueError(
                f"{op}: {pages_name} must not be expanded: several slots would share one address; "
                f"got strides {pages.stride()}"
            )
    contract.check_shape(
        op, "v_pages_PNHD", v_pages_PNHD, tuple(k_pages_PNHD.shape), "to match k_pages_PNHD"
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
