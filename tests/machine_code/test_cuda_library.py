"""Machine code of the CUDA C++ kernels for sm_90, where nvcc has compiled them (``make cuda``).

Registers and spills are in the table that ``make cuda`` prints; csrc/cuda/spills.txt lists the
accepted spills.
"""

import re
import shutil
import subprocess

import pytest

pytest.importorskip("triton", reason="Triton's package has the disassembler")

from triton import knobs

from tests.machine_code import sass
from variant_kernels.cuda_ops import library

TARGET = "sm_90a"
QUALIFIERS = r"variant::|cuda::|\(anonymous namespace\)::"
# Kernels with a stack, without or besides spills: the reason.
STACKS = {"adaln_sum_tiles_kernel": "addresses of three results, chosen by a number at run time"}
# The least share of 16-byte loads among all loads of global memory, by a part of the kernel's name.
# The others: logarithms of sums and page tables, 4 bytes; sums and statistics.
WIDE_SHARES = {
    "adaln_forward_kernel<__nv_bfloat16, __nv_bfloat16, 0>": 1.0,
    "gated_adaln_forward_kernel<float, __nv_bfloat16, 0>": 1.0,
    "adaln_backward_kernel<float, __nv_bfloat16, 0>": 0.66,
    "block_causal_attention_kernel<SoftmaxTile<__nv_bfloat16, 64, 64, 4>": 1.0,
    "block_causal_backward_kernel<BackwardTile<__nv_bfloat16, 64, 32, true>": 0.85,
    "block_causal_backward_kernel<BackwardTile<__nv_bfloat16, 64, 16, false>": 0.9,
    "append_paged_kv_kernel<uint4>": 0.66,
}
# The most instructions of the loop without a mask, and of the one with it: nvcc 13.0's and a tenth
# more. An index computed in 64 bits, or a mask for every tile, costs hundreds.
LOOPS = {
    "block_causal_attention_kernel<SoftmaxTile<__nv_bfloat16, 64, 64, 4>": (431, 532),
    "block_causal_backward_kernel<BackwardTile<__nv_bfloat16, 64, 32, true>": (318, 395),
    "block_causal_backward_kernel<BackwardTile<__nv_bfloat16, 64, 16, false>": (135, 163),
    "paged_attention_kernel<SoftmaxTile<__nv_bfloat16, 64, 64, 4>": (507, 612),
}


def cuobjdump(*options):
    command = [knobs.nvidia.cuobjdump.path, *options, library.PATH]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def readable(names):
    text = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout
    plain = re.sub(QUALIFIERS, "", text)
    return dict(zip(names, plain.splitlines(), strict=True))


@pytest.fixture(scope="module")
def kernels():
    """(architecture, mangled name) -> (readable name, registers, stack bytes)."""
    if library.is_emulated() or not library.is_built():
        pytest.skip("the CUDA kernels are not built: make cuda builds them with nvcc")
    if not shutil.which("c++filt"):
        pytest.skip("c++filt is not installed")
    found, arch, name = {}, "", ""
    for line in cuobjdump("--dump-resource-usage").splitlines():
        if match := re.match(r"arch = (\S+)", line):
            arch = match.group(1)
        elif match := re.match(r"\s*Function (\S+?):", line):
            name = match.group(1)
        elif match := re.search(r"REG:(\d+) STACK:(\d+)", line):
            found[arch, name] = int(match.group(1)), int(match.group(2))
    assert found
    names = readable(list({name for _, name in found}))
    return {key: (names[key[1]], *usage) for key, usage in found.items()}


def test_no_kernel_has_a_stack(kernels):
    listed = library.PATH.parents[1] / "csrc" / "cuda" / "spills.txt"
    spills = listed.read_text() if listed.exists() else ""
    # "sm_90a part_of_the_kernel's_name: the reason"
    lines = [line for line in spills.splitlines() if line and not line.startswith("#")]
    parts = [line.partition(": ")[0].split(None, 1) for line in lines]
    excused = {(arch, re.sub(QUALIFIERS, "", part)) for arch, part in parts}
    wrong = [
        f"{name} on {arch}: {stack} bytes"
        for (arch, _), (name, _, stack) in kernels.items()
        if stack
        and not any(part in name for part in STACKS)
        and not any(arch == on and part in name for on, part in excused)
    ]
    assert not wrong


def machine_code(kernels, part):
    """The instructions of each kernel for TARGET whose readable name has this part."""
    if not any(arch == TARGET for arch, _ in kernels):
        pytest.skip(f"the CUDA kernels were not compiled for {TARGET}")
    names = [key[1] for key, (name, *_) in kernels.items() if key[0] == TARGET and part in name]
    assert names, f"no kernel is called {part}"
    for name in names:
        (instructions,) = sass.parse(cuobjdump("-sass", "-arch", TARGET, "-fun", name)).values()
        yield instructions


@pytest.mark.parametrize("part", LOOPS)
def test_loops_with_and_without_a_mask_are_apart_and_short(kernels, part):
    for instructions in machine_code(kernels, part):
        found = sass.product_loops(instructions)
        lengths = [len(loop.body) for loop in found]
        assert len(lengths) == 2, (part, lengths)
        assert all(n <= most for n, most in zip(lengths, LOOPS[part], strict=True)), (part, lengths)
        for loop in found:
            copies = loop.count("LDGSTS") + loop.count("LDG")
            # The upper half of a sum or a compare in 64 bits: addresses of copies have them.
            carries = sum(bool({"X", "EX"} & {*i.opcode.split(".")}) for i in loop.body)
            assert carries <= copies, (part, carries, copies)


@pytest.mark.parametrize("part", WIDE_SHARES)
def test_loads_are_16_bytes_wide(kernels, part):
    for instructions in machine_code(kernels, part):
        widths = sass.global_accesses(instructions)
        loads = sum(count for access, count in widths.items() if access.startswith("load"))
        share = widths.get("load 128", 0) / loads
        assert share >= WIDE_SHARES[part], (part, widths)
