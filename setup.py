"""Builds the extension module variant_kernels._C. CMakeLists.txt compiles; this file calls CMake.

Every build uses the folder `build/<tag of this Python>` and keeps it, so that the next build
compiles only what changed. Environment variables choose what is compiled:

    VARIANT_CUDA         the CUDA kernels: auto (default), 1 or 0. auto compiles them where a GPU is
                         visible and nvcc works, for that GPU alone.
    VARIANT_CUDA_ARCHS   CUDA architectures, such as "80;90a"
    VARIANT_CPU_ISAS     CPU instruction sets: all (default), local, or names such as "avx2;avx512".
                         local compiles the portable one and the best one of this machine.
"""

from __future__ import annotations

import hashlib
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
    """The command of the C++ compiler: $CXX, else the first of the usual names that exists."""
    chosen = os.environ.get("CXX", "").strip()
    for command in [chosen] if chosen else ["c++", "g++", "clang++"]:
        if shutil.which(shlex.split(command)[0]):
            return command
    raise SystemExit(
        "variant-kernels needs a C++17 compiler (g++ >= 10 or clang++ >= 12): "
        + (f"CXX={chosen} was not found" if chosen else "none found")
        + "; install one (Debian: apt-get install g++) or set CXX"
    )


def find_program(name: str, folder_attribute: str) -> str:
    """The path of cmake or ninja: in its Python package if that is installed, else on PATH."""
    try:
        module = __import__(name)
        candidate = Path(getattr(module, folder_attribute)) / name
        if candidate.exists():
            return str(candidate)
    except (ImportError, AttributeError):
        pass
    path = shutil.which(name)
    if path:
        return path
    raise SystemExit(f"variant-kernels needs {name} to build: not found; pip install {name}")


def python_include() -> str:
    """The folder of Python.h."""
    include = sysconfig.get_path("include")
    if not (Path(include) / "Python.h").exists():
        raise SystemExit(
            f"variant-kernels needs Python's C headers: no Python.h in {include}; "
            "install them (Debian: apt-get install python3-dev)"
        )
    return include


def copy_headers(source: Path, target: Path) -> Path:
    """Copy a folder of headers, unless the target already holds the same files.

    pip installs pybind11 into a new temporary folder for each build. Its path would stand in the
    compiler's command line, and ninja compiles again when a command line changes.
    """
    digest = hashlib.sha256()
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        digest.update(str(file.relative_to(source)).encode() + b"\0")
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    stamp = target / "sha256.txt"
    if not stamp.exists() or stamp.read_text() != digest.hexdigest():
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)
        stamp.write_text(digest.hexdigest())
    return target


def replace_file(source: Path, target: Path) -> None:
    """Copy a library to a new file: a process that has loaded the old one keeps it."""
    target.unlink(missing_ok=True)
    shutil.copy2(source, target)


def build_folder() -> Path:
    """The folder that CMake builds in: one for each Python version and platform."""
    return ROOT / "build" / (sysconfig.get_config_var("SOABI") or sys.implementation.cache_tag)


def must_start_afresh(folder: Path, key: str) -> bool:
    """Whether the folder was configured with another compiler or for another source folder.

    CMake cannot change either of them in a folder that it has configured.
    """
    cache = folder / "CMakeCache.txt"
    if not cache.exists():
        return False
    lines = cache.read_text().splitlines()
    return (
        f"VARIANT_BUILD_KEY:STRING={key}" not in lines
        or f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}" not in lines
    )


class CMakeBuild(build_ext):
    """Configures with CMake once, builds once, and copies the libraries to where they belong."""

    def run(self) -> None:
        # setuptools clears `inplace` while it builds, so it must be read before.
        self.builds_in_tree = bool(self.inplace or getattr(self, "editable_mode", False))
        super().run()

    def build_extension(self, ext: Extension) -> None:
        compiler = find_compiler()
        cmake = find_program("cmake", "CMAKE_BIN_DIR")
        ninja = find_program("ninja", "BIN_DIR")
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = build_folder()
        folder.mkdir(parents=True, exist_ok=True)
        headers = copy_headers(Path(pybind11.get_include()), folder / "pybind11")
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
            f"-DVARIANT_PYBIND11_INCLUDE={headers}",
            f"-DVARIANT_EXT_NAME={target.name}",
            f"-DVARIANT_VERSION={self.distribution.get_version()}",
            # These are passed even when empty: the folder remembers those of an earlier build.
            f"-DVARIANT_CUDA={os.environ.get('VARIANT_CUDA') or 'auto'}",
            f"-DVARIANT_CUDA_ARCHS={os.environ.get('VARIANT_CUDA_ARCHS', '')}",
            f"-DVARIANT_CUDA_SPILLS={os.environ.get('VARIANT_CUDA_SPILLS') or 'warn'}",
            f"-DVARIANT_CPU_ISAS={os.environ.get('VARIANT_CPU_ISAS') or 'all'}",
            # CMake runs scripts that need only the standard library. The interpreter of a virtual
            # environment may be a temporary one, so its base is taken: the path stays the same.
            f"-DPython3_EXECUTABLE={getattr(sys, '_base_executable', None) or sys.executable}",
            f"-DVARIANT_BUILD_KEY={compiler}",
        ]
        if must_start_afresh(folder, compiler):
            configure.insert(1, "--fresh")
        environment = {**os.environ, "CXX": compiler}
        jobs = str(self.parallel or os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or os.cpu_count())
        build = [cmake, "--build", str(folder), "--parallel", jobs, "--target", "variant_package"]
        for what, step in (("configuring", configure), ("compiling", build)):
            if subprocess.run(step, env=environment, check=False).returncode:
                raise SystemExit(f"variant-kernels: {what} failed; CMake's output above says why")
        target.parent.mkdir(parents=True, exist_ok=True)
        replace_file(folder / target.name, target)
        self.place_cuda_library(folder / CUDA_LIBRARY, target.parent)

    def place_cuda_library(self, built: Path, beside_extension: Path) -> None:
        """Copy the CUDA kernels beside the extension, and remove those of an earlier build.

        setuptools copies extensions into the source tree, but not other libraries.
        """
        folders = {beside_extension}
        if self.builds_in_tree:
            folders.add(ROOT / "variant_kernels")
        for folder in folders:
            if built.exists():
                replace_file(built, folder / CUDA_LIBRARY)
            else:
                (folder / CUDA_LIBRARY).unlink(missing_ok=True)


setup(
    ext_modules=[Extension("variant_kernels._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
