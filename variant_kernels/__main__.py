"""``python -m variant_kernels``: what was built, what this machine supports, what would run."""

from __future__ import annotations

import platform
import sys

import torch

from variant_kernels import _C, __version__, ops
from variant_kernels.backends import available_backends, resolve_backend
from variant_kernels.cuda_ops import library
from variant_kernels.dispatch.request import Request, dtype_name
from variant_kernels.ops.contract import FLOAT_DTYPES
from variant_kernels.products import slow_products
from variant_kernels.wording import counted


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
        f"(VARIANT_CPU_ISA forces one), {counted(torch.get_num_threads(), 'thread')}",
        _products(),
        f"backends: {', '.join(available_backends())} (VARIANT_BACKEND or backend= forces one)",
        "",
    ]
    for device in ("cpu", *(("cuda",) if torch.cuda.is_available() else ())):
        lines += _table(device)
    return "\n".join(lines)


def _products() -> str:
    """Which dtypes have slow matrix products on this processor."""
    slow = ", ".join(map(dtype_name, slow_products("cpu")))
    if not slow:
        return (
            "matrix products: native in float32, bfloat16 and float16; a float16 engine computes in"
            " float32 on the CPU, and stores K and V in float16"
        )
    return (
        f"matrix products: slow in {slow}, which this processor lacks; an engine of such a dtype "
        "stores K and V in it and computes in float32"
    )


def _table(device: str) -> list[str]:
    """Each op's backend by dtype, then each reason against an earlier one, once."""
    width = max(map(len, ops.tables()))
    lines, reasons = [f"backend of each op on {device}:"], {}
    for op in ops.tables():
        dtypes: dict[str, list[str]] = {}
        for dtype in FLOAT_DTYPES:
            try:
                choice = resolve_backend(op, Request(device, (dtype, dtype), 64))
            except ValueError as error:  # VARIANT_BACKEND names one that cannot serve this
                dtypes.setdefault(f"none: {error}", []).append(dtype_name(dtype))
                continue
            dtypes.setdefault(choice.name, []).append(dtype_name(dtype))
            for name, reason in choice.others.items():
                if name in ops.tables()[op]:
                    reasons.setdefault((name, reason), None)
        shown = "; ".join(f"{chosen} ({', '.join(names)})" for chosen, names in dtypes.items())
        lines.append(f"  {op:{width}}  {shown}")
    if reasons:
        lines += ["not taken:", *(f"  {name}: {reason}" for name, reason in reasons)]
    return lines


if __name__ == "__main__":
    try:
        print(report())
    except ValueError as error:
        sys.exit(f"variant_kernels: error: {error}")
