"""``python -m variant_kernels``: one line for each op, and why faster backends are not taken."""

import os

from tests.forked_program import run_forked
from variant_kernels import ops


def report(**environment):
    variables = {"TRITON_INTERPRET": "0", "VARIANT_BACKEND": "auto", **environment}
    return run_forked("-m", "variant_kernels", env={**os.environ, **variables})


def test_every_op_has_one_line_and_every_reason_too():
    lines = report().stdout.splitlines()
    table = lines[lines.index("backend of each op on cpu:") + 1 :]
    for op in ops.tables():
        (line,) = (line for line in table if line.split()[:1] == [op])
        served = "float32, bfloat16); reference (float16)"
        if "paged" in op:
            served = "float32, bfloat16, float16)"
        assert f"cpu ({served}" in line
    reasons = table[table.index("not taken:") + 1 :]
    assert "  cpu: dtype float16 is not among its dtypes (float32, bfloat16)" in reasons
    assert len(set(reasons)) == len(reasons)


def test_a_backend_that_cannot_serve_is_said_in_place():
    lines = report(VARIANT_BACKEND="flash").stdout.splitlines()
    (line,) = (line for line in lines if line.split()[:1] == ["paged_attention"])
    assert 'backend "flash" cannot run this call: it needs an NVIDIA GPU' in line


def test_an_unknown_instruction_set_is_one_line_and_an_exit_code():
    run = report(VARIANT_CPU_ISA="z80")
    assert run.returncode == 1
    assert run.stderr.startswith("variant_kernels: error: ")
    assert "z80" in run.stderr
