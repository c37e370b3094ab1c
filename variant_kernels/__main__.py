"""``python -m variant_kernels``: what was built, what this machine supports, what would run."""

from __future__ import annotations

import platform

import torch

from variant_kernels import _C, __version__, ops
from variant_kernels.backends import available_backends, dtype_name, explain
from variant_kernels.contract import FLOAT_DTYPES


def report() -> str:
    """The text that the module prints."""
    build = _C.build_info()
    lines = [
        f"variant-kernels {__version__}, Python {platform.python_version()}, torch "
        f"{torch.__version__}, {platform.machine()}",
        f"built with {build['compiler']}: CPU instruction sets {', '.join(build['isas_built'])}; "
        f"OpenMP {'yes' if build['openmp'] else 'no'}; CUDA {'yes' if build['cuda'] else 'no'}",
        f"this machine supports: {', '.join(build['isas_supported'])}; in use: {build['isa']} "
        f"(VARIANT_CPU_ISA forces one), {torch.get_num_threads()} threads",
        f"backends: {', '.join(available_backends())} (VARIANT_BACKEND or backend= forces one)",
        "",
        f"backend of each op on the CPU, {', '.join(dtype_name(d) for d in FLOAT_DTYPES)}:",
    ]
    for op in ops.tables():
        chosen = [explain(op, dtype=dtype) for dtype in FLOAT_DTYPES]
        lines.append(f"  {op}: {' | '.join(chosen)}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
