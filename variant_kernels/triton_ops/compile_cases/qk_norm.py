"""Compile-report cases of ``triton_ops/qk_norm.py``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from variant_kernels.triton_ops.common import padded
from variant_kernels.triton_ops.compile_cases.case import (
    CompileCase,
    argument_types,
    warps_by_target,
)
from variant_kernels.triton_ops.qk_norm import (
    BLOCK_PARTS,
    BLOCK_SUMS,
    STAGES,
    qk_norm_backward_kernel,
    qk_norm_forward_kernel,
    qk_norm_sums_kernel,
)
from variant_kernels.triton_ops.rows import HEADS_PER_THREAD, PER_THREAD, heads_per_block

# Kernel, elements per thread, label, further constants. Forward without queries: keys only.
_KERNELS: tuple[tuple[Any, int, str, dict[str, Any]], ...] = (
    (qk_norm_forward_kernel, HEADS_PER_THREAD, "", {}),
    (
        qk_norm_forward_kernel,
        HEADS_PER_THREAD,
        ", keys",
        dict.fromkeys(("q_ptr", "scale_ptr", "q_out_ptr")),
    ),
    (qk_norm_backward_kernel, PER_THREAD, "", {"STAGES": STAGES}),
)


def _cases() -> Iterator[CompileCase]:
    for heads, head_dim, strides in ((16, 64, "i32:16"), (30, 64, "i32:16"), (3, 24, "i32")):
        block_h, d_padded = heads_per_block(heads, head_dim), padded(head_dim)
        blocks = {"H": heads, "D": head_dim, "BLOCK_H": block_h, "D_PADDED": d_padded}
        types = {
            **dict.fromkeys(("scale_ptr", "sums_ptr"), "*fp32:16"),
            "*_ptr": "*T:16",
            "*_stride_?": strides,
            **dict.fromkeys(("tokens", "num_tokens", "tokens_per_part"), "i32"),
        }
        for kernel, per_thread, suffix, more in _KERNELS:
            constants = {"scale_stride": 1, **blocks, **more}
            for targets, num_warps in warps_by_target(block_h * d_padded, per_thread):
                yield CompileCase(
                    kernel=kernel,
                    arguments=argument_types(kernel, constants, types),
                    constants=constants,
                    num_warps=num_warps,
                    num_stages=1,
                    targets=targets,
                    label=f"H {heads}, D {head_dim}{suffix}",
                )
    yield CompileCase(
        kernel=qk_norm_sums_kernel,
        arguments={
            "sums_ptr": "*fp32:16",
            "scale_ptr": "*fp32:16",
            "dscale_ptr": "*fp32:16",
            "parts": "i32",
        },
        constants={"scale_stride": 1, "H": 30, "BLOCK_N": BLOCK_PARTS, "BLOCK_H": BLOCK_SUMS},
        num_warps=4,
        num_stages=1,
        label="H 30",
    )


CASES = tuple(_cases())
