"""The compile report works without a GPU: one small kernel to machine code."""

import importlib
import os
import pkgutil
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from variant_kernels import triton_ops
from variant_kernels.triton_ops.compile_cases import COMPILE_CASES


def report(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "variant_kernels.triton_ops.compile_report", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0", **environment},
    )


def test_every_kernel_has_a_case():
    kernels = {
        name
        for module in pkgutil.iter_modules(triton_ops.__path__, "variant_kernels.triton_ops.")
        for name in vars(importlib.import_module(module.name))
        if name.endswith("_kernel")
    }
    assert kernels == {case.kernel.__name__ for case in COMPILE_CASES}


def test_a_kernel_is_compiled_for_a_gpu_that_is_not_there(tmp_path):
    run = report(
        *("--kernel", "paged_attention_combine", "--target", "sm_90", "--dtype", "bf16"),
        TRITON_CACHE_DIR=str(tmp_path),
    )
    assert run.returncode == 0, run.stderr
    head, line = run.stdout.splitlines()
    assert head.split()[-3:] == ["registers", "spills", "shared"]
    fields = r"paged_attention_combine_kernel +D 64 +sm_90 +bf16 +4 +1 +(\d+) +(\d+) +(\d+)"
    match = re.fullmatch(fields, line.strip())
    assert match, line
    registers, spills, _ = map(int, match.groups())
    assert 0 < registers <= 255
    assert spills == 0


def test_what_does_not_compile_is_a_line_and_an_exit_code(tmp_path):
    run = report(
        *("--kernel", "paged_attention_combine", "--target", "sm_90", "--dtype", "bf16"),
        TRITON_CACHE_DIR=str(tmp_path),
        TRITON_INTERPRET="1",
    )
    assert run.returncode == 1
    assert "failed" in run.stdout
    assert "unset TRITON_INTERPRET" in run.stdout


IN_FLIGHT = """
import re, sys
from variant_kernels.triton_ops.compile_report import compile_stages
from variant_kernels.triton_ops.compile_cases.paged_attention import CASES
(case,) = (c for c in CASES if c.label == sys.argv[1] and "sm_90" in c.targets)
text = compile_stages(case, "sm_90", "bf16").asm["ttgir"]
for loop in re.findall(r"scf[.]for.*?scf[.]yield", text, re.DOTALL):
    print(*re.findall(r"async_wait [^\\n]*num = ([0-9]+)", loop))
"""


def test_a_tile_of_keys_is_in_flight_while_another_is_attended_to(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", IN_FLIGHT, "D 64, 128 x 64"],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
    )
    assert run.returncode == 0, run.stderr
    # Complete tiles, then the incomplete one: K, V and the page numbers of the next.
    assert run.stdout.split() == ["3", "3"]
