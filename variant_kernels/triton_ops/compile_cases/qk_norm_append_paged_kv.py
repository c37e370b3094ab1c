"""Compile-report cases of ``triton_ops/qk_norm_append_paged_kv.py``."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from variant_kernels.triton_ops.common import padded
from variant_kernels.triton_ops.compile_cases.case import (
    CompileCase,
    argument_types,
    warps_by_target,
)
from variant_kernels.triton_ops.e4m3 import NO_SCALES
from variant_kernels.triton_ops.qk_norm_append_paged_kv import qk_norm_append_paged_kv_kernel
from variant_kernels.triton_ops.rows import HEADS_PER_THREAD, heads_per_block


def _cases() -> Iterator[CompileCase]:
    shapes = ((16, 64, "qk"), (30, 64, "qk"), (30, 64, "k"), (30, 64, ""), (3, 24, "qk"))
    for (heads, head_dim, norm), kv8 in product(shapes, (False, True)):
        without = ("scale_ptr", "q_out_ptr") if not norm else ("q_out_ptr",) if norm == "k" else ()
        block_h, d_padded = heads_per_block(heads, head_dim), padded(head_dim)
        constants = {
            **({} if kv8 else NO_SCALES),
            **dict.fromkeys(without),
            "scale_stride": 1,
            "slots_stride_t": 1,
            "NORM": norm != "",
            "KV8": kv8,
            "PAGE_SIZE": 16,
            "H": heads,
            "D": head_dim,
            "BLOCK_H": block_h,
            "D_PADDED": d_padded,
        }
        types = {
            "?_scales_ptr": "*u8:16",
            "?_scales_stride_?": "i32",
            "slots_ptr": "*i64:16",
            "scale_ptr": "*fp32:16",
            "?_pages_ptr": "*u8:16" if kv8 else "*T:16",
            "*_ptr": "*T:16",
            "slots_stride_b": "i32",
            "*_stride_?": "i32:16" if head_dim % 16 == 0 else "i32",
            **dict.fromkeys(("tokens", "num_slots"), "i32"),
        }
        for targets, num_warps in warps_by_target(block_h * d_padded, HEADS_PER_THREAD):
            yield CompileCase(
                kernel=qk_norm_append_paged_kv_kernel,
                arguments=argument_types(qk_norm_append_paged_kv_kernel, constants, types),
                constants=constants,
                num_warps=num_warps,
                num_stages=1,
                targets=targets,
                label=f"H {heads}, D {head_dim}"
                + {"qk": "", "k": " norm of k", "": " no norm"}[norm]
                + (", 8 bits" if kv8 else ""),
            )


CASES = tuple(_cases())
