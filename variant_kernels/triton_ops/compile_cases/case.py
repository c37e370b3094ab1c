"""``CompileCase``, a case of the compile report, and helpers that the tables of all ops share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from triton.backends.compiler import GPUTarget

from variant_kernels.triton_ops.rows import PER_THREAD, warps_for

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# The device family (``common.family``) whose block sizes each target gets.
FAMILY_TARGETS = {"sm90": "sm_90", "nvidia": "sm_80", "amd": "gfx942"}
DTYPES = ("bf16", "fp16", "fp32")


@dataclass(frozen=True)
class CompileCase:
    """One kernel with the arguments that decide its machine code.

    arguments: type of each argument that is not a compile-time constant: ``"*T"`` a pointer to the
        case's dtype, ``"*fp32"``, ``"i32"``, ``"fp32"``; a suffix ``":16"`` means that the value is
        divisible by 16, as addresses and most strides are. Triton specialises on no other divisor,
        so heads of 24, 40, ... are loaded value by value.
    constants: the remaining arguments. targets, dtypes: where the case is compiled. fp_fusion:
        whether products and sums may be fused, as the launcher sets it.
    """

    kernel: Any
    arguments: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int
    targets: tuple[str, ...] = tuple(TARGETS)
    dtypes: tuple[str, ...] = DTYPES
    label: str = ""
    fp_fusion: bool = True
    maxnreg: int | None = None


def argument_types(
    kernel: Any, constants: Mapping[str, Any], types: Mapping[str, str]
) -> dict[str, str]:
    """The type of every argument that is not a constant.

    Args:
        types: by shell patterns of argument names; the first pattern that matches decides.
    Raises:
        KeyError: an argument that is no constant and matches no pattern.
    """

    def type_of(name: str) -> str:
        for pattern, kind in types.items():
            if fnmatchcase(name, pattern):
                return kind
        raise KeyError(f"compile cases: {kernel.__name__} has an argument without a type: {name}")

    return {name: type_of(name) for name in kernel.arg_names if name not in constants}


def warps_by_target(
    elements: int, per_thread: int = PER_THREAD
) -> tuple[tuple[tuple[str, ...], int], ...]:
    """``rows.num_warps_for`` on every target: (targets, number of warps)."""
    return (
        (("sm_80", "sm_90"), warps_for(elements, 32, per_thread)),
        (("gfx942",), warps_for(elements, 64, per_thread)),
    )
