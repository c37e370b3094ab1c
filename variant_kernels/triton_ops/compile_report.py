"""Registers, spills and shared memory of every Triton kernel, for GPUs that need not be present.

``python -m variant_kernels.triton_ops.compile_report [--target sm_90] [--kernel NAME]`` compiles
the cases of ``compile_cases`` ahead of time and prints one line for each.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton import knobs
from triton.compiler import ASTSource, CompiledKernel

from variant_kernels.triton_ops.compile_cases import COMPILE_CASES
from variant_kernels.triton_ops.compile_cases.case import DTYPES, TARGETS, CompileCase


@dataclass(frozen=True)
class Compiled:
    """Resources of one compiled kernel; spills in bytes per thread (AMD: registers per wave)."""

    registers: int
    spills: int
    shared: int


def compile_stages(case: CompileCase, target: str, dtype: str) -> CompiledKernel:
    """Compile one case for a target; ``asm`` of the result holds every stage. No GPU is needed.

    Raises:
        RuntimeError: Triton is interpreting (``TRITON_INTERPRET=1``).
    """
    if not hasattr(case.kernel, "cache_key"):
        raise RuntimeError("compile_report: kernels are interpreted; unset TRITON_INTERPRET")
    names = case.kernel.arg_names
    signature, attributes = {}, {}
    for name in names:
        kind, _, divisor = case.arguments.get(name, "constexpr").partition(":")
        signature[name] = f"*{dtype}" if kind == "*T" else kind
        if divisor:
            attributes[(names.index(name),)] = [["tt.divisibility", int(divisor)]]
    source = ASTSource(
        fn=case.kernel, signature=signature, constexprs=dict(case.constants), attrs=attributes
    )
    options = {
        "num_warps": case.num_warps,
        "num_stages": case.num_stages,
        "enable_fp_fusion": case.fp_fusion,
    }
    if case.maxnreg is not None:
        options["maxnreg"] = case.maxnreg
    return triton.compile(source, target=TARGETS[target], options=options)


def compile_case(case: CompileCase, target: str, dtype: str) -> Compiled:
    """The resources of one case, as :func:`compile_stages` compiles it."""
    compiled = compile_stages(case, target, dtype)
    shared = int(compiled.metadata.shared)
    if TARGETS[target].backend == "cuda":
        return Compiled(*_assembled(compiled.asm["cubin"]), shared)
    text = str(compiled.asm["amdgcn"])
    return Compiled(_number(text, ".vgpr_count"), _number(text, ".vgpr_spill_count"), shared)


def _number(text: str, field: str) -> int:
    match = re.search(re.escape(field) + r":\s+(\d+)", text)
    if match is None:
        raise RuntimeError(f"compile_report: the assembly has no field {field}")
    return int(match.group(1))


def _assembled(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes of the machine code; the stack holds only spills."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.cubin"
        source.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", source]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if match is None:
        raise RuntimeError(f"compile_report: cuobjdump printed no registers: {text}")
    return int(match.group(1)), int(match.group(2))


def main(arguments: list[str] | None = None) -> int:
    """Print one line for each case, target and dtype; return 1 if one does not compile."""
    parser = argparse.ArgumentParser(
        prog="python -m variant_kernels.triton_ops.compile_report",
        description="Compile every Triton kernel; print its registers, spills and shared memory.",
        epilog="example: python -m variant_kernels.triton_ops.compile_report --target sm_90",
    )
    parser.add_argument("--target", choices=TARGETS, action="append", help="default: all")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="default: all")
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--case", default="", help="only cases whose label contains this")
    args = parser.parse_args(arguments)
    columns = "{:<42} {:<26} {:<7} {:<5} {:>5} {:>6} {:>9} {:>6} {:>7}"
    head = ("kernel", "case", "target", "dtype", "warps", "stages", "registers", "spills", "shared")
    print(columns.format(*head))
    failed = False
    for case in COMPILE_CASES:
        name = case.kernel.__name__
        if args.kernel not in name or args.case not in case.label:
            continue
        for target in [t for t in args.target or TARGETS if t in case.targets]:
            for dtype in [d for d in args.dtype or DTYPES if d in case.dtypes]:
                line = (name, case.label, target, dtype, case.num_warps, case.num_stages)
                try:
                    compiled = compile_case(case, target, dtype)
                except Exception as error:  # any compiler error: report it and go on
                    failed = True
                    print(columns.format(*line, "failed", "", ""), str(error).splitlines()[0])
                    continue
                print(
                    columns.format(*line, compiled.registers, compiled.spills, compiled.shared),
                    flush=True,
                )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
