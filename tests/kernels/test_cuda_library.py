"""The library of CUDA kernels: loaded at first use, with a clear error if it is missing."""

import re
import subprocess
import sys

import pytest

from variant_kernels.cuda_ops import library


@pytest.fixture
def built():
    if library.is_emulated():
        pytest.skip("VARIANT_CUDA_EMULATION puts other kernels in its place")
    if not library.is_built():
        pytest.skip("the CUDA kernels are not built: VARIANT_CUDA=1 builds them with nvcc")
    return library


def test_importing_the_package_loads_no_cuda_library():
    code = (
        "import variant_kernels, variant_kernels._C, variant_kernels.cuda_ops.library\n"
        "maps = open('/proc/self/maps').read()\n"
        "assert 'variant_kernels/_C' in maps\n"
        "assert 'variant_kernels/_cuda.so' not in maps, 'loaded at import'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_missing_library_says_how_to_build_it(monkeypatch, tmp_path):
    monkeypatch.delenv(library.EMULATION, raising=False)
    monkeypatch.setattr(library, "PATH", tmp_path / "_cuda.so")
    library.load.cache_clear()
    assert not library.is_built()
    with pytest.raises(RuntimeError, match="VARIANT_CUDA=1"):
        library.load()
    assert library.describe().startswith("not built")


def test_a_library_that_cannot_be_loaded_is_reported(monkeypatch, tmp_path):
    broken = tmp_path / "_cuda.so"
    broken.write_bytes(b"not a library")
    monkeypatch.delenv(library.EMULATION, raising=False)
    monkeypatch.setattr(library, "PATH", broken)
    library.load.cache_clear()
    with pytest.raises(RuntimeError, match="cannot be loaded"):
        library.load()
    assert "cannot be loaded" in library.describe()


def test_describes_itself_without_a_gpu(built):
    archs = built.architectures()
    assert archs
    assert all(re.fullmatch(r"\d+[af]?", arch) for arch in archs)
    assert f"sm_{archs[0]}" in built.describe()


def test_a_failed_launch_is_named_in_words(built):
    built.check("some_op", 0)
    with pytest.raises(RuntimeError, match=r"some_op: .*: invalid argument \(1\)"):
        built.check("some_op", 1)
