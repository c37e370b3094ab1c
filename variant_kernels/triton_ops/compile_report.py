"""What the compiler makes of every Triton kernel, for GPUs that need not be there.

``python -m variant_kernels.triton_ops.compile_report [--target sm_90] [--kernel NAME]`` prints
registers, spilled bytes and shared memory; each kernel file lists its cases in ``COMPILE_CASES``.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = ("bf16", "fp16", "fp32")


@dataclass(frozen=True)
class CompileCase:
    """One kernel with the arguments that decide its machine code.

    arguments: type of each argument that is not a compile-time constant: ``"*T"`` a pointer to the
        case's dtype, ``"*fp32"``, ``"i32"``, ``"fp32"``; ``":16"`` behind it says that the value is
        divisible by 16, as addresses and most strides are. A launch tells no other divisor, so that
        heads of 24, 40, ... are loaded value by value.
    constants: the remaining arguments. targets, dtypes: where the case is compiled. fp_fusion:
        whether products and sums may become one, as the launcher has it.
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


@dataclass(frozen=True)
class Compiled:
    """Figures of one compiled kernel; spills in bytes a thread (AMD: registers of a wave)."""

    registers: int
    spills: int
    shared: int


def all_cases() -> Iterator[CompileCase]:
    """The cases of every kernel file."""
    package = importlib.import_module("variant_kernels.triton_ops")
    for module in pkgutil.iter_modules(package.__path__):
        if module.name != "compile_report":
            file = importlib.import_module(f"variant_kernels.triton_ops.{module.name}")
            yield from getattr(file, "COMPILE_CASES", ())


def compile_case(case: CompileCase, target: str, dtype: str) -> Compiled:
    """Compile to machine code for a target; no GPU is needed.

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
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    shared = int(compiled.metadata.shared)
    if TARGETS[target].backend == "cuda":
        return Compiled(*_assembled(compiled.asm["cubin"]), shared)
    text = str(compiled.asm["amdgcn"])
    return Compiled(_number(text, ".vgpr_count"), _number(text, ".vgpr_spill_count"), shared)


def _number(text: str, field: str) -> int:
    found = re.search(re.escape(field) + r":\s+(\d+)", text)
    if found is None:
        raise RuntimeError(f"compile_report: the assembly has no field {field}")
    return int(found.group(1))


def _assembled(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes of the machine code itself; the stack holds nothing but spills."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.cubin"
        source.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", source]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"compile_report: cuobjdump says nothing of registers: {text}")
    return int(found.group(1)), int(found.group(2))


def main(arguments: list[str] | None = None) -> int:
    """Print one line for each case, target and dtype; 1 if one does not compile."""
    parser = argparse.ArgumentParser(
        prog="python -m variant_kernels.triton_ops.compile_report",
        description="Compile every Triton kernel ahead of time and print what it needs.",
        epilog="example: python -m variant_kernels.triton_ops.compile_report --target sm_90",
    )
    parser.add_argument("--target", choices=TARGETS, action="append", help="default: all")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="default: all")
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--case", default="", help="only cases whose label contains this")
    given = parser.parse_args(arguments)
    columns = "{:<42} {:<26} {:<7} {:<5} {:>5} {:>6} {:>9} {:>6} {:>7}"
    head = ("kernel", "case", "target", "dtype", "warps", "stages", "registers", "spills", "shared")
    print(columns.format(*head))
    failed = False
    for case in all_cases():
        name = case.kernel.__name__
        if given.kernel not in name or given.case not in case.label:
            continue
        for target in [t for t in given.target or TARGETS if t in case.targets]:
            for dtype in [d for d in given.dtype or DTYPES if d in case.dtypes]:
                line = (name, case.label, target, dtype, case.num_warps, case.num_stages)
                try:
                    made = compile_case(case, target, dtype)
                except Exception as error:  # whatever a compiler raises, the others go on
                    failed = True
                    print(columns.format(*line, "failed", "", ""), str(error).splitlines()[0])
                    continue
                print(columns.format(*line, made.registers, made.spills, made.shared), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
