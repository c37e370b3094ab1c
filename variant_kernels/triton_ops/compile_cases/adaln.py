"""Compile-report cases of ``triton_ops/adaln.py``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from variant_kernels.triton_ops.adaln import (
    BLOCK_COLUMNS,
    BLOCK_PARTS,
    STAGES,
    adaln_backward_kernel,
    adaln_forward_kernel,
    adaln_sums_kernel,
)
from variant_kernels.triton_ops.common import padded
from variant_kernels.triton_ops.compile_cases.case import (
    CompileCase,
    argument_types,
    warps_by_target,
)

# Arguments of the gated kernels that are None (pointers) or 0 (strides) without a gate.
_GATED_ONLY = ("grad_x_out", "y_", "gate_", "x_out", "grad_y", "grad_gate")
# Of sums: what a launch that has none of the kind lacks.
_EARLIER_ONLY, _STORED_ONLY = ("earlier_",), ("x_out",)


def _case(
    kernel: Any,
    width: int,
    gated: bool,
    stream: str = "*T:16",
    strides: str = "i32:16",
    *,
    earlier: bool = False,
    stored: bool = True,
) -> Iterator[CompileCase]:
    """stream: type of x and its gradient, which may be float32 beside 16-bit h."""
    block_c = padded(width)
    constants: dict[str, Any] = {"GATED": gated, "C": width, "BLOCK_C": block_c}
    if kernel is adaln_sums_kernel:
        constants |= {"BLOCK_N": BLOCK_PARTS, "BLOCK_C": BLOCK_COLUMNS}
    else:
        constants["BLOCK_T"] = 1
    if kernel is adaln_backward_kernel:
        constants["STAGES"] = STAGES
    if kernel is adaln_forward_kernel:
        constants |= {"EARLIER": earlier, "STORED": gated and stored}
    absent = (
        *(() if gated else _GATED_ONLY),
        *(() if earlier else _EARLIER_ONLY),
        *(() if stored else _STORED_ONLY),
    )
    for name in kernel.arg_names:
        if name.startswith(absent):
            constants[name] = None if name.endswith("_ptr") else 0
    types = {
        **dict.fromkeys(("mean_ptr", "rstd_ptr", "sums_ptr"), "*fp32:16"),
        **dict.fromkeys(("x_ptr", "x_out_ptr", "grad_x_ptr", "grad_x_out_ptr"), stream),
        "*_ptr": "*T:16",
        "*_stride*": strides,
        **dict.fromkeys(("tokens", "parts", "tokens_per_part"), "i32"),
        "eps": "fp32",
    }
    for targets, num_warps in warps_by_target(block_c):
        yield CompileCase(
            kernel=kernel,
            arguments=argument_types(kernel, constants, types),
            constants=constants,
            num_warps=4 if kernel is adaln_sums_kernel else num_warps,
            num_stages=1,
            targets=targets,
            label=f"C {width}{' gated' * gated}{' fp32 stream' * ('fp32' in stream)}"
            f"{', not stored' * (not stored)}{', with an earlier sum' * earlier}",
        )


def _cases() -> Iterator[CompileCase]:
    for width in (1024, 1920):
        for gated in (False, True):
            for stream in ("*fp32:16", "*T:16"):
                for kernel in (adaln_forward_kernel, adaln_backward_kernel):
                    yield from _case(kernel, width, gated, stream)
            yield from _case(adaln_sums_kernel, width, gated)
        # A layer of the engine: the sum after attention is left to the launch after the MLP.
        yield from _case(adaln_forward_kernel, width, True, "*fp32:16", stored=False)
        yield from _case(adaln_forward_kernel, width, True, "*fp32:16", earlier=True)
    # Rows whose addresses are not aligned.
    for kernel in (adaln_forward_kernel, adaln_backward_kernel, adaln_sums_kernel):
        yield from _case(kernel, 1030, True, strides="i32")


CASES = tuple(_cases())
