"""Compile-report cases of ``triton_ops/group_norm.py``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from variant_kernels.triton_ops.compile_cases.case import CompileCase, argument_types
from variant_kernels.triton_ops.group_norm import (
    BLOCK_C,
    BLOCK_N,
    NUM_WARPS,
    group_norm_apply_kernel,
    group_norm_combine_kernel,
    group_norm_sums_kernel,
)

_TYPES = {
    **dict.fromkeys(("x_ptr", "y_ptr", "weight_ptr", "bias_ptr"), "*T:16"),
    "*_ptr": "*fp32:16",
    **dict.fromkeys(("pixels", "pixels_per_part"), "i32:16"),
    **dict.fromkeys(("parts", "tiles"), "i32"),
    "eps": "fp32",
}
_TILE = {"BLOCK_N": BLOCK_N, "BLOCK_C": BLOCK_C}


def _cases() -> Iterator[CompileCase]:
    for channels in (160, 640):
        groups = {"C": channels, "G": 32}
        kernels: tuple[tuple[Any, dict[str, Any]], ...] = (
            (group_norm_sums_kernel, {"C": channels, **_TILE}),
            (group_norm_combine_kernel, {**groups, "BLOCK_P": 64, "BLOCK_GC": 32}),
            (group_norm_apply_kernel, {**groups, "SILU": True, **_TILE}),
        )
        for kernel, constants in kernels:
            yield CompileCase(
                kernel=kernel,
                arguments=argument_types(kernel, constants, _TYPES),
                constants=constants,
                num_warps=NUM_WARPS,
                num_stages=3,
                label=f"C {channels}",
            )


CASES = tuple(_cases())
