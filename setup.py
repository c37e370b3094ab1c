"""Builds the extension module variant_kernels._C: everything is in CMakeLists.txt, this calls it.

Where nvcc works, the CUDA kernels are built as well (VARIANT_CUDA=0 leaves them out, 1 insists).
An editable install builds in `build/`, so the next one compiles only what changed; every other
build uses the temporary folder that setuptools gives.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CUDA_LIBRARY = "_cuda.so"


def find_compiler() -> str:
    """The C++ compiler that CMake will be told to use: $CXX, else the first of the usual names."""
    asked = os.environ.get("CXX", "").strip()
    for command in [asked] if asked else ["c++", "g++", "clang++"]:
        if shutil.which(shlex.split(command)[0]):
            return command
    raise SystemExit(
        "variant-kernels needs a C++17 compiler (g++ >= 10 or clang++ >= 12): "
        + (f"CXX={asked} was not found" if asked else "none found")
        + "; install one (Debian: apt-get install g++) or set CXX"
    )


def find_program(name: str, folder_attribute: str) -> str:
    """cmake or ninja: from its Python package where installed, else from PATH."""
    try:
        module = __import__(name)
        candidate = Path(getattr(module, folder_attribute)) / name
        if candidate.exists():
            return str(candidate)
    except (ImportError, AttributeError):
        pass
    found = shutil.which(name)
    if found:
        return found
    raise SystemExit(f"variant-kernels needs {name} to build: not found; pip install {name}")


def python_include() -> str:
    include = sysconfig.get_path("include")
    if not (Path(include) / "Python.h").exists():
        raise SystemExit(
            f"variant-kernels needs Python's C headers: no Python.h in {include}; "
            "install them (Debian: apt-get install python3-dev)"
        )
    return include


class CMakeBuild(build_ext):
    """One CMake configure and one build for the whole extension."""

    def run(self) -> None:
        # setuptools clears `inplace` while it builds; the folder must be chosen before that.
        self.builds_in_tree = bool(self.inplace or getattr(self, "editable_mode", False))
        super().run()

    def build_extension(self, ext: Extension) -> None:
        compiler = find_compiler()
        cmake = find_program("cmake", "CMAKE_BIN_DIR")
        ninja = find_program("ninja", "BIN_DIR")
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        tag = sysconfig.get_config_var("SOABI") or sys.implementation.cache_tag
        folder = ROOT / "build" / tag if self.builds_in_tree else Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        configure = [
            cmake,
            "-G",
            "Ninja",
            "-S",
            str(ROOT),
            "-B",
            str(folder),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            "-DVARIANT_PYTHON=ON",
            f"-DVARIANT_PYTHON_INCLUDE={python_include()}",
            f"-DVARIANT_PYBIND11_INCLUDE={pybind11.get_include()}",
            f"-DVARIANT_EXT_NAME={target.name}",
            f"-DVARIANT_EXT_FOLDER={target.parent}",
            f"-DVARIANT_VERSION={self.distribution.get_version()}",
            f"-DVARIANT_CUDA={os.environ.get('VARIANT_CUDA', 'auto')}",
            # Said even when empty: what an earlier build was given must not linger.
            f"-DVARIANT_CUDA_ARCHS={os.environ.get('VARIANT_CUDA_ARCHS', '')}",
            f"-DPython3_EXECUTABLE={sys.executable}",
        ]
        environment = {**os.environ, "CXX": compiler}
        jobs = str(self.parallel or os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or os.cpu_count())
        build = [cmake, "--build", str(folder), "--parallel", jobs]
        for what, step in (("configuring", configure), ("compiling", build)):
            if subprocess.run(step, env=environment, check=False).returncode:
                raise SystemExit(f"variant-kernels: {what} failed; CMake's output above says why")
        self.place_cuda_library(folder / CUDA_LIBRARY, target.parent)

    def place_cuda_library(self, built: Path, beside_extension: Path) -> None:
        """Put the CUDA kernels beside the extension, and take away what an older build left.

        setuptools copies extensions into the source tree, but not other libraries.
        """
        folders = {beside_extension}
        if self.builds_in_tree:
            folders.add(ROOT / "variant_kernels")
        for folder in folders:
            if built.exists():
                shutil.copy2(built, folder / CUDA_LIBRARY)
            else:
                (folder / CUDA_LIBRARY).unlink(missing_ok=True)


setup(
    ext_modules=[Extension("variant_kernels._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
