"""For which GPUs a build compiles the CUDA kernels: the driver's answer and CMake's decision.

A shared library with the driver's functions stands in for the driver, and a script for nvcc.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "csrc" / "cuda" / "visible_gpus.py"

DRIVER = """
static const int capabilities[][2] = {%s {0, 0}};
static const int count = sizeof(capabilities) / sizeof(capabilities[0]) - 1;
extern "C" {
int cuInit(unsigned) { return %d; }
int cuDeviceGetCount(int* out) { *out = count; return 0; }
int cuDeviceGet(int* out, int index) { *out = index; return 0; }
int cuDeviceGetAttribute(int* out, int attribute, int device) {
  if (attribute != 75 && attribute != 76) return 1;
  *out = capabilities[device][attribute - 75];
  return 0;
}
}
"""
NVCC = """#!/bin/sh
case "$1" in --list-gpu-code) printf 'sm_75\\nsm_80\\nsm_89\\nsm_90\\nsm_100\\n' ;; esac
"""


@pytest.fixture
def driver(tmp_path):
    """A function that makes a driver with these capabilities and returns the environment for it."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler on PATH")

    def make(*capabilities: tuple[int, int], status: int = 0) -> dict[str, str]:
        folder = tmp_path / "driver"
        folder.mkdir()
        source = folder / "driver.cpp"
        entries = "".join(f"{{{major}, {minor}}}, " for major, minor in capabilities)
        source.write_text(DRIVER % (entries, status))
        library = folder / "libcuda.so.1"
        subprocess.run([compiler, "-shared", "-fPIC", source, "-o", library], check=True)
        return {**os.environ, "LD_LIBRARY_PATH": str(folder)}

    return make


def ask(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True, check=False
    )


def test_prints_each_capability_once(driver):
    done = ask(driver((9, 0), (8, 0), (9, 0)))
    assert (done.returncode, done.stdout, done.stderr) == (0, "8.0\n9.0\n", "")


@pytest.mark.parametrize(
    ("capabilities", "status", "reason"),
    [((), 0, "the CUDA driver shows none"), (((9, 0),), 100, "cuInit returned the error 100")],
)
def test_says_why_there_is_no_gpu(driver, capabilities, status, reason):
    done = ask(driver(*capabilities, status=status))
    assert (done.returncode, done.stdout) == (1, "")
    assert reason in done.stderr


@pytest.fixture
def configure(tmp_path):
    """A function that configures csrc/cuda alone with CMake and returns its output."""
    cmake, ninja = shutil.which("cmake"), shutil.which("ninja")
    beside_python = Path(sys.executable).parent
    cmake = cmake or shutil.which("cmake", path=str(beside_python))
    ninja = ninja or shutil.which("ninja", path=str(beside_python))
    if cmake is None or ninja is None:
        pytest.skip("cmake or ninja is not installed")
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(NVCC)
    nvcc.chmod(0o755)
    source, build = tmp_path / "source", tmp_path / "build"
    source.mkdir()
    # The compiler's name is only passed on to nvcc: no language is enabled, which takes seconds.
    (source / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.24)\nproject(cuda_alone LANGUAGES NONE)\n"
        "set(CMAKE_CXX_COMPILER c++)\n"
        'function(variant_decided text)\n  message(STATUS "${text}")\nendfunction()\n'
        f"add_subdirectory({ROOT / 'csrc' / 'cuda'} cuda)\n"
    )

    def run(environment: dict[str, str], *options: str) -> str:
        done = subprocess.run(
            [
                *(cmake, "-S", source, "-B", build, "-G", "Ninja"),
                *(f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DPython3_EXECUTABLE={sys.executable}"),
                *(f"-DVARIANT_NVCC={nvcc}", "-DVARIANT_CUDA_SPILLS=fail", *options),
            ],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        # CMake wraps error texts.
        output = " ".join((done.stdout + done.stderr).split())
        return f"{'configured' if done.returncode == 0 else 'failed'}: {output}"

    return run


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        (((9, 0),), "CUDA kernels for 90a (the visible GPUs have compute capability 9.0"),
        (((8, 9), (9, 0)), "CUDA kernels for 89;90a (the"),
        # This nvcc is older than the GPU.
        (((12, 1),), "CUDA kernels for 80 (the"),
        (((7, 5), (8, 0)), "CUDA kernels for 80 (the"),
        (((7, 5),), "CUDA kernels left out: no visible GPU has compute capability 8.0 or higher"),
        ((), "CUDA kernels left out: no GPU is visible: the CUDA driver shows none"),
    ],
)
def test_auto_compiles_for_the_visible_gpus_alone(driver, configure, capabilities, expected):
    output = configure(driver(*capabilities), "-DVARIANT_CUDA=auto")
    assert output.startswith("configured")
    assert expected in output


def test_1_compiles_the_usual_architectures_whatever_is_visible(driver, configure):
    output = configure(driver((8, 9)), "-DVARIANT_CUDA=1")
    assert output.startswith("configured")
    assert "CUDA kernels for 80;90a;100a (the usual ones" in output


def test_named_architectures_need_no_gpu(driver, configure):
    output = configure(driver(), "-DVARIANT_CUDA=auto", "-DVARIANT_CUDA_ARCHS=90a")
    assert "CUDA kernels for 90a (VARIANT_CUDA_ARCHS names them)" in output


def test_a_visible_gpu_without_a_working_nvcc_leaves_them_out(driver, configure, tmp_path):
    (tmp_path / "bin" / "nvcc").write_text(NVCC + "case $1 in --list*) ;; *) exit 1 ;; esac\n")
    environment = driver((9, 0))
    output = configure(environment, "-DVARIANT_CUDA=auto")
    assert output.startswith("configured")
    assert "cannot compile for 90a" in output
    assert "VARIANT_CUDA=1, but" in configure(environment, "-DVARIANT_CUDA=1")
