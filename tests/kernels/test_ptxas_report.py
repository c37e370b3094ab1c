"""The report on compiled CUDA kernels: how it reads ptxas's output, and that it reports spills."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "csrc" / "cuda" / "ptxas_report.py"

LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z5quietPf' for 'sm_80'
ptxas info    : Function properties for _Z5quietPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 39 registers, used 1 barriers, 4096 bytes smem, 528 bytes cmem[0]
ptxas info    : Compile time = 9.939 ms
ptxas info    : Compiling entry function '_Z4loudPf' for 'sm_90a'
ptxas info    : Function properties for _Z4loudPf
    184 bytes stack frame, 180 bytes spill stores, 240 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers, 528 bytes cmem[0]
"""


@pytest.fixture(scope="module")
def ptxas():
    spec = importlib.util.spec_from_file_location("ptxas_report", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["ptxas_report"] = module
    spec.loader.exec_module(module)
    return module


def test_reads_registers_shared_memory_and_spills(ptxas):
    quiet, loud = ptxas.parse(LOG)
    assert quiet == ptxas.Kernel("sm_80", "_Z5quietPf", 39, 4096, 0, 0, 0)
    assert loud == ptxas.Kernel("sm_90a", "_Z4loudPf", 32, 0, 184, 180, 240)
    assert loud.spills
    assert not quiet.spills


def test_an_unknown_format_is_an_error_and_not_an_empty_table(ptxas):
    with pytest.raises(ValueError, match="_Z5quietPf"):
        ptxas.parse(LOG.replace("Used 39 registers", "Uses 39 registers"))


def test_table_has_a_line_for_each_kernel(ptxas):
    lines = ptxas.table(ptxas.parse(LOG)).splitlines()
    assert len(lines) == 3
    assert lines[1].split() == ["_Z4loudPf", "sm_90a", "32", "0", "184", "180/240"]


def test_a_spill_is_an_error_unless_listed_with_a_reason(ptxas):
    kernels = ptxas.parse(LOG)
    (line,) = ptxas.complaints(kernels, [])
    assert "_Z4loudPf spills registers on sm_90a (180 bytes stored, 240 loaded)" in line
    assert ptxas.complaints(kernels, ptxas.read_excuses("sm_90a loud: measured 3 % faster")) == []
    assert len(ptxas.complaints(kernels, ptxas.read_excuses("sm_80 loud: elsewhere"))) == 2
    with pytest.raises(ValueError, match="sm_NN kernel: reason"):
        ptxas.read_excuses("sm_90a loud")


def test_an_excuse_that_is_no_longer_needed_must_go(ptxas):
    excuses = ptxas.read_excuses("# comment\n\nsm_80 quiet: once it spilled\nsm_90a loud: it does")
    assert ptxas.complaints(ptxas.parse(LOG), excuses) == [
        'spills.txt: "sm_80 quiet" spills no more; remove the line'
    ]


def test_names_lose_namespaces_and_arguments(ptxas):
    if not shutil.which("c++filt"):
        pytest.skip("c++filt is not installed")
    name = "_ZN7variant12_GLOBAL__N_16kernelIfLi4EEEvPKfm"
    assert ptxas.readable([name]) == {name: "kernel<float, 4>"}


def test_the_listed_excuses_can_be_read(ptxas):
    ptxas.read_excuses(SCRIPT.with_name("spills.txt").read_text())


def test_a_kernel_that_spills_stops_the_build(tmp_path):
    if not shutil.which("nvcc"):
        pytest.skip("nvcc is not installed")
    source, log, spills = tmp_path / "k.cu", tmp_path / "k.ptxas", tmp_path / "spills.txt"
    source.write_text(
        "__global__ void greedy(float* x) {\n"
        "  float a[64];\n"
        "  for (int i = 0; i < 64; ++i) a[i] = x[i * 32 + threadIdx.x];\n"
        "  __syncthreads();\n"
        "  for (int r = 0; r < 64; ++r)\n"
        "#pragma unroll\n"
        "    for (int i = 0; i < 64; ++i) a[i] = a[i] * a[(i + 7) % 64] + x[r];\n"
        "  for (int i = 0; i < 64; ++i) x[i * 32 + threadIdx.x] = a[i];\n"
        "}\n"
    )
    spills.write_text("")
    command = ["nvcc", "-arch=sm_80", "-maxrregcount=32", "-Xptxas=-v", "--cubin"]
    run = [sys.executable, str(SCRIPT)]
    subprocess.run(
        [*run, "compile", str(log), *command, str(source), "-o", str(tmp_path / "k.cubin")],
        check=True,
    )
    table = [*run, "table", "--spills", str(spills), str(log)]
    done = subprocess.run(table, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "error: greedy spills registers on sm_80" in done.stderr
    warn = [*table, "--on-spill", "warn"]
    done = subprocess.run(warn, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "warning: greedy spills registers on sm_80" in done.stderr
    spills.write_text("sm_80 greedy: the test asks for it\n")
    assert subprocess.run(table, capture_output=True, check=False).returncode == 0


def test_a_compiler_error_is_passed_on_and_leaves_no_log(tmp_path):
    if not shutil.which("nvcc"):
        pytest.skip("nvcc is not installed")
    source, log = tmp_path / "k.cu", tmp_path / "k.ptxas"
    source.write_text("__global__ void broken( {}\n")
    command = ["nvcc", "-c", str(source), "-o", str(tmp_path / "k.o")]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "compile", str(log), *command],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "k.cu(1): error" in done.stderr
    assert not log.exists()
