"""``python -m variant_kernels``: what was built, what this machine supports, what would run."""

from __future__ import annotations

import platform
import sys

import torch

from variant_kernels import _C, __version__, ops
from variant_kernels.backends import available_backends, dtype_name, explain
from variant_kernels.contract import FLOAT_DTYPES
from variant_kernels.cuda_ops import library


def report() -> str:
    """The text that the module prints.

    Raises:
        ValueError: ``VARIANT_CPU_ISA`` names an instruction set that is unknown or missing here.
    """
    build = _C.build_info()
    lines = [
        f"variant-kernels {__version__}, Python {platform.python_version()}, torch "
        f"{torch.__version__}, {platform.machine()}",
        f"built with {build['compiler']}: CPU instruction sets {', '.join(build['isas_built'])}; "
        f"OpenMP {'yes' if build['openmp'] else 'no'}",
        f"CUDA kernels: {library.describe()}",
        f"this machine supports: {', '.join(build['isas_supported'])}; in use: {build['isa']} "
        f"(VARIANT_CPU_ISA forces one), {torch.get_num_threads()} threads",
        f"backends: {', '.join(available_backends())} (VARIANT_BACKEND or backend= forces one)",
        "",
        "backend of each op on the CPU:",
    ]
    for op in ops.tables():
        for dtype in FLOAT_DTYPES:
            lines.append(f"  {op}, {dtype_name(dtype)}: {_chosen(op, dtype)}")
    return "\n".join(lines)


def _chosen(op: str, dtype: torch.dtype) -> str:
    try:
        return explain(op, dtype=dtype)
    except ValueError as error:  # VARIANT_BACKEND names one that cannot serve this
        return f"none: {error}"


if __name__ == "__main__":
    try:
        print(report())
    except ValueError as error:
        sys.exit(f"variant_kernels: error: {error}")
