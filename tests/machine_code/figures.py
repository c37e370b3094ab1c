"""The figures of one compiled case: resources, counts in the loops of products, widths of accesses.

A case is one of ``triton_ops.compile_cases``; its key is what the tables and messages call it.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from tests.machine_code import ttgir
from tests.machine_code.occupancy import programs_per_processor
from tests.machine_code.sass import LOCAL_MEMORY, counts, global_accesses, parse, product_loops
from variant_kernels.triton_ops.compile_cases.case import CompileCase

TARGET, DTYPE = "sm_90", "bf16"
# Counted in each loop of products, besides all instructions. U...: on the uniform datapath.
IN_LOOP = ("HGMMA", "HMMA", "ISETP", "MUFU", "LDGSTS", "LDG", *LOCAL_MEMORY, "BAR", "MEMBAR")


def shipped_cases() -> dict[str, CompileCase]:
    """The cases whose machine code is tested, by key."""
    from variant_kernels.triton_ops.compile_cases import COMPILE_CASES

    found: dict[str, CompileCase] = {}
    for case in COMPILE_CASES:
        # Other head widths are tested for results only; D is absent from some row kernels.
        ships = case.constants.get("D", 64) in (64, 128)
        if TARGET in case.targets and DTYPE in case.dtypes and ships:
            assert key(case) not in found, f"two cases are called {key(case)}"
            found[key(case)] = case
    return found


def key(case: CompileCase) -> str:
    """``paged_attention/D 64, 128 x 64, 8 warps, 3 stages``."""
    name = case.kernel.__name__.removesuffix("_kernel")
    parts = [f"{name}/{case.label}", f"{case.num_warps} warps", f"{case.num_stages} stages"]
    registers = case.maxnreg
    return ", ".join([*parts, *([f"at most {registers} registers"] if registers else [])])


def elements_per_thread(case: CompileCase) -> int:
    """Entries of a tile of scores that one thread holds; 0 for kernels without such a tile."""
    entries = case.constants.get("BLOCK_Q", 0) * case.constants.get("BLOCK_K", 0)
    return entries // (32 * case.num_warps)


def measure(case: CompileCase) -> dict[str, Any]:
    """Compile a case and read its machine code. Takes one to five seconds.

    Raises:
        RuntimeError: the disassembler printed something else than expected.
    """
    from variant_kernels.triton_ops.compile_report import compile_stages

    compiled = compile_stages(case, TARGET, DTYPE)
    shared = int(compiled.metadata.shared)
    registers, stack, instructions = _disassembled(compiled.asm["cubin"])
    found = product_loops(instructions)
    return {
        "registers": registers,
        "stack": stack,
        "shared": shared,
        "programs": programs_per_processor(registers, case.num_warps, shared),
        "instructions": len(instructions),
        "local": sum(counts(instructions)[name] for name in LOCAL_MEMORY),
        "global": global_accesses(instructions),
        "waits": ttgir.waits_in_loops(compiled.asm["ttgir"]),
        "loops": [
            {"instructions": len(loop.body)}
            | {name: loop.count(name) for name in IN_LOOP if loop.count(name)}
            for loop in found
        ],
    }


def measure_key(key: str) -> dict[str, Any]:
    """:func:`measure` of the case with this key, for another process."""
    return measure(shipped_cases()[key])


def _disassembled(cubin: bytes) -> tuple[int, int, list[Any]]:
    """Registers, stack bytes and instructions."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage, code = (
            subprocess.run(
                [knobs.nvidia.cuobjdump.path, option, path],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            for option in ("--dump-resource-usage", "-sass")
        )
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    functions = list(parse(code).values())
    if match is None or len(functions) != 1:
        raise RuntimeError(f"machine code: cuobjdump printed no registers, or two kernels: {usage}")
    return int(match.group(1)), int(match.group(2)), functions[0]
