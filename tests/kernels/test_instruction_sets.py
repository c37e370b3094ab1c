"""The instruction sets of older processors pass the kernels' own tests.

A process chooses its instruction set once, so each set runs in a separate process; the other tests
use the default. ``make test-isas``, a part of ``make nightly``, runs every test of the kernels with
every set. Here CI runs that of most older processors; the portable one is for ``make nightly``.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from variant_kernels.cpu_ops.common import build_info

FOLDER = Path(__file__).parent
# Only tests of results: registration and checks do not depend on the instruction set.
STEMS = (
    "adaln",
    "block_causal_attention",
    "gelu",
    "kv8",
    "paged_attention",
    "qk_norm",
    "qk_norm_append_paged_kv",
    "sample_tokens",
)
OLDER = {"avx2": (), "portable": (pytest.mark.nightly,)}
# Draws of every set are those of the default by test_cpu_launchers.py: the 65,000 draws that
# are compared with the reference need no repetition.
SELECTED = "cpu and not opcheck and not instruction_set and not backends_differ"


@pytest.mark.parametrize(
    "isa",
    [
        pytest.param(isa, marks=marks)
        for isa, marks in OLDER.items()
        if isa in build_info()["isas_built"]
    ],
)
def test_kernels_are_right_with_every_instruction_set(isa):
    info = build_info()
    if isa not in info["isas_supported"]:
        pytest.skip(f"this machine lacks {isa}")
    if isa == info["isa"]:
        pytest.skip(f"{isa} is in use: the other tests exercise it")
    files = [str(FOLDER / f"test_{stem}.py") for stem in (*STEMS, "cpu_launchers")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", SELECTED]
    ran = subprocess.run(
        [*command, *files],
        env={**os.environ, "VARIANT_CPU_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
