"""The reader of machine code: loops, counts, widths of accesses, waits, programs per processor."""

import pytest

from tests.machine_code import sass, ttgir
from tests.machine_code.occupancy import programs_per_processor


def listing(*lines):
    """Text as cuobjdump prints it, from instructions without addresses; @N is the N-th one."""
    text = ["\tcode for sm_90a", "\t\tFunction : example_kernel", '\t.headerflags\t@"EF_CUDA_SM90"']
    for index, line in enumerate(lines):
        guard, _, rest = line.rpartition("|")
        for other in range(len(lines)):
            rest = rest.replace(f"[{other}]", f"0x{16 * other:x}")
        text += [
            f"        /*{16 * index:04x}*/      {guard and '@' + guard:>6} {rest} ;   /* 0x0000 */",
            f"{'':60}/* 0x000fe20000000800 */",
        ]
    return "\n".join(text)


def read(*lines):
    (instructions,) = sass.parse(listing(*lines)).values()
    return instructions


def spans(loops):
    return [(loop.header // 16, loop.body[-1].address // 16, len(loop.body)) for loop in loops]


def test_instructions_have_guards_opcodes_and_operands():
    first, second = read("LDC R1, c[0x0][0x28]", "!P3|LDG.E.128 R24, desc[UR44][R6.64]")
    assert (first.address, first.guard, first.opcode) == (0, "", "LDC")
    assert (second.address, second.guard, second.name) == (16, "!P3", "LDG")
    assert second.operands == "R24, desc[UR44][R6.64]"


def test_a_line_that_cannot_be_read_is_an_error_and_not_skipped():
    text = listing("MOV R1, R2", "MOV R1, R2", "EXIT").replace("0010*/", "0010*/ ???")
    with pytest.raises(ValueError, match="between 0x0 and 0x20"):
        sass.parse(text)
    with pytest.raises(ValueError, match="no instruction"):
        sass.parse("code for sm_90a\n")


def test_a_backward_branch_makes_a_loop():
    found = sass.loops(read(
        "MOV R1, RZ",
        "HGMMA.64x64x16.F32.BF16 R24, R88, gdesc[UR8], R24",
        "LDL R4, [R1+0x10]",
        "ISETP.GE.AND P0, PT, R1, R2, PT",
        "!P0|BRA [1]",
        "STL [R1], R4",
        "EXIT",
        "BRA [7]",
        "NOP",
    ))  # fmt: skip
    assert spans(found) == [(1, 4, 4)]
    (loop,) = found
    assert (loop.count("HGMMA"), loop.count("LDL"), loop.count("STL")) == (1, 1, 0)


def test_innermost_loops_contain_no_other():
    found = sass.loops(read(
        "MOV R1, RZ",
        "MOV R2, RZ",  # outer
        "HMMA.16816.F32.BF16 R4, R4, R8, R4",  # inner
        "P1|BRA [2]",
        "FADD R1, R1, R2",
        "BRA.U !UP0, [1]",
        "FMUL R1, R1, R2",  # a loop of its own, without products
        "P2|BRA [6]",
        "EXIT",
    ))  # fmt: skip
    assert spans(found) == [(1, 5, 5), (2, 3, 2), (6, 7, 2)]
    assert spans(sass.innermost(found)) == [(2, 3, 2), (6, 7, 2)]


def test_slow_paths_behind_the_end_are_no_loops_of_their_own():
    lines = [
        "MOV R1, RZ",
        "P0|BRA [8]",  # slow path, behind the end
        "FMUL R1, R1, R2",
        "HGMMA.64x64x16.F32.BF16 R24, R88, gdesc[UR8], R24",  # loop
        "P1|BRA [10]",  # slow path of the loop
        "FADD R1, R1, R2",
        "!P2|BRA [3]",
        "EXIT",
        "MUFU.RCP R1, R1",
        "BRA [2]",
        "MUFU.RCP R1, R1",
        "BRA [5]",
    ]
    found = sass.loops(read(*lines))
    assert [loop.header // 16 for loop in found] == [3]
    # The slow path belongs to the loop: four instructions and two behind the end.
    assert len(found[0].body) == 6
    assert found[0].count("MUFU") == 1


def test_two_branches_to_one_header_are_one_loop():
    found = sass.loops(read("NOP", "FADD R1, R1, R2", "P0|BRA [1]", "FMUL R1, R1, R2",
                            "P1|BRA [1]", "EXIT"))  # fmt: skip
    assert spans(found) == [(1, 4, 4)]


def test_a_conditional_branch_without_a_guard_falls_through():
    found = sass.loops(read("FADD R1, R1, R2", "BRA P0, [0]", "HMMA.16816.F32 R4, R4, R8, R4",
                            "BRA.DIV UR4, [0]", "EXIT"))  # fmt: skip
    assert spans(found) == [(0, 3, 4)]


def test_a_branch_out_of_the_function_is_an_error():
    with pytest.raises(ValueError, match="out of the function"):
        sass.loops(read("BRA 0x5000", "EXIT"))
    with pytest.raises(ValueError, match="without an address"):
        sass.loops(read("BRA `(.L_x_1)", "EXIT"))


def test_accesses_are_counted_by_width():
    instructions = read(
        "LDG.E.128 R24, desc[UR44][R6.64]",
        "P0|LDG.E R24, desc[UR44][R6.64]",
        "LDG.E.U8 R24, desc[UR44][R6.64]",
        "LDGSTS.E.BYPASS.128 [R19], desc[UR44][R6.64], P0",
        "LDGSTS.E [R19], desc[UR44][R6.64]",
        "STG.E.U16 desc[UR4][R2.64], R1",
        "STG.E.64 desc[UR4][R2.64], R1",
        "LDS.128 R4, [R1]",
        "EXIT",
    )
    assert sass.global_accesses(instructions) == {
        "load 128": 2, "load 32": 2, "load 8": 1, "store 16": 1, "store 64": 1,
    }  # fmt: skip


WAITS = """\
tt.func public @kernel() {
  %0 = ttg.async_wait %t {num = 7 : i32}
  %1:4 = scf.for %i = %a to %b step %c iter_args(%x = %y) -> (tensor<1xf32>)  : i32 {
    %2 = ttg.async_wait %t, %u {num = 3 : i32} loc(#loc)
    %3 = scf.if %p -> (i32) {
      %4 = ttg.async_wait %t {num = 2 : i32}
    } else {
      scf.yield %q : i32
    }
    scf.for %j = %a to %b step %c : i32 {
      %5 = ttg.async_wait {num = 0 : i32}
    }
    %6 = ttg.async_wait %t {num = 1 : i32}
    scf.yield %2 : i32
  } {tt.num_stages = 3 : i32} loc(#loc3)
  %7 = ttg.async_wait {num = 0 : i32}
  %8 = scf.while (%x = %y) : (i32) -> i32 {
    scf.condition(%p) %x : i32
  } do {
  ^bb0(%z: i32):
    %9 = ttg.async_wait {num = 4 : i32}
  }
  %10 = ttg.async_wait {num = 0 : i32}
  tt.return
}
"""


def test_waits_outside_loops_do_not_count():
    assert ttgir.waits_in_loops(WAITS) == [3, 2, 0, 1, 4]
    with pytest.raises(ValueError, match="without a number"):
        ttgir.waits_in_loops(WAITS.replace("num = 2", "count = 2"))


@pytest.mark.parametrize(
    ("registers", "warps", "shared", "programs"),
    [
        (128, 8, 65_536, 2),
        (129, 8, 65_536, 1),  # one register more, half the programs
        (168, 4, 57_344, 3),
        (169, 4, 0, 2),
        (255, 4, 65_536, 2),
        (255, 8, 0, 1),
        (32, 1, 0, 32),  # at most 32 programs
        (16, 32, 0, 2),  # at most 64 warps
        (32, 4, 114_688, 2),  # 2 x (112 KiB + 1) fit 228 KiB
        (32, 4, 115_712, 2),
        (32, 4, 115_713, 1),
        (32, 4, 232_448, 1),
        (32, 4, 232_449, 0),
    ],
)
def test_programs_of_a_processor(registers, warps, shared, programs):
    assert programs_per_processor(registers, warps, shared) == programs
