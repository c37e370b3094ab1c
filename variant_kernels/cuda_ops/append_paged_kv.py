"""CUDA launcher of append_paged_kv. B batch, T tokens, H heads, D head width, P pages, N slots."""

from __future__ import annotations

import ctypes
import struct
from functools import cache
from typing import Any

import torch

from variant_kernels.cuda_ops import common, library
from variant_kernels.cuda_ops.qk_norm_append_paged_kv import launch_rows
from variant_kernels.tensors import address_and_strides

# AppendPagedKvArgs
_ARGS = struct.Struct("@22qii0q")


@cache
def _function() -> Any:
    # The library takes the number of pages in the place of the structure's size.
    function = library.load().variant_cuda_append_paged_kv
    function.argtypes = [ctypes.c_char_p, ctypes.c_int64, ctypes.c_int, ctypes.c_void_p]
    function.restype = ctypes.c_int
    return function


def launch_append_paged_kv(
    *,
    k_BTHD: torch.Tensor,
    v_BTHD: torch.Tensor,
    k_pages_PNHD: torch.Tensor,
    v_pages_PNHD: torch.Tensor,
    slots_BT: torch.Tensor,
    k_scales_PNH: torch.Tensor | None = None,
    v_scales_PNH: torch.Tensor | None = None,
) -> None:
    """Write the keys and values of token (b, t) into slot slots_BT[b, t]; -1 skips the token.

    A slot is page * page_size + offset. Slots are not checked on a GPU: one past the last page is
    skipped as well. The caller must not give two tokens the same slot. With scales the pages
    are float8_e4m3fn; the rounded keys and values of a (token, head) and their scales are written.

    Raises:
        RuntimeError: the launch failed.
    """
    slots_BT = slots_BT.contiguous()
    if k_scales_PNH is not None:
        if k_BTHD.numel() > 0:
            # The fused kernel without a norm reads no query.
            launch_rows(
                op="append_paged_kv",
                q=(0, 0, 0, 0),
                k=address_and_strides(k_BTHD),
                v=address_and_strides(v_BTHD),
                like_BTHD=k_BTHD,
                scale_mul_address=0,
                out_address=0,
                k_pages_PNHD=k_pages_PNHD,
                v_pages_PNHD=v_pages_PNHD,
                slots_BT=slots_BT,
                k_scales_PNH=k_scales_PNH,
                v_scales_PNH=v_scales_PNH,
            )
        return
    packed = _ARGS.pack(
        *k_BTHD.shape,
        k_pages_PNHD.shape[1],
        *address_and_strides(k_BTHD),
        *address_and_strides(v_BTHD),
        k_pages_PNHD.data_ptr(),
        v_pages_PNHD.data_ptr(),
        *k_pages_PNHD.stride()[:3],
        *v_pages_PNHD.stride()[:3],
        slots_BT.data_ptr(),
        k_BTHD.element_size(),
        0,
    )
    status = _function()(packed, k_pages_PNHD.shape[0], *common.device_and_stream(k_BTHD))
    library.check("append_paged_kv", status)
