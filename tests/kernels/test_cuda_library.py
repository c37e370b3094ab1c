"""The library of CUDA kernels: loaded at first use, with a clear error if it is missing."""

import ctypes
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from variant_kernels.cuda_ops import common, library


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


@pytest.fixture
def loaded(monkeypatch, tmp_path):
    """A library in place of the compiled one: the functions that describe it."""
    (tmp_path / "_cuda.so").write_bytes(b"")
    functions = SimpleNamespace(
        variant_cuda_architectures=lambda: b"80,90a",
        variant_cuda_error_text=lambda status: b"invalid argument",
        variant_cuda_runtime_version=lambda: 12080,
    )
    monkeypatch.delenv(library.EMULATION, raising=False)
    monkeypatch.setattr(library, "PATH", tmp_path / "_cuda.so")
    monkeypatch.setattr(ctypes, "CDLL", lambda path: functions)
    library.load.cache_clear()
    yield library
    library.load.cache_clear()


def test_a_loaded_library_names_its_architectures_and_toolkit(loaded):
    assert loaded.architectures() == ("80", "90a")
    assert loaded.describe() == "built for sm_80, sm_90a with CUDA 12.8"


def test_a_launch_that_fails_raises_the_text_of_the_runtime(loaded, monkeypatch):
    loaded.check("some_op", 0)
    with pytest.raises(RuntimeError, match=r"some_op: .* launched: invalid argument \(1\)"):
        loaded.check("some_op", 1)
    monkeypatch.setenv(library.EMULATION, "a library")
    with pytest.raises(RuntimeError, match=r"some_op: the emulated .* its arguments \(1\)"):
        loaded.check("some_op", 1)


def test_a_launch_takes_the_device_and_its_current_stream(loaded, monkeypatch):
    x = SimpleNamespace(device=torch.device("cuda", 1))
    streams = {x.device: SimpleNamespace(cuda_stream=77)}
    monkeypatch.setattr(torch.cuda, "current_stream", streams.__getitem__)
    assert common.device_and_stream(x) == (1, 77)
    properties = {x.device: SimpleNamespace(multi_processor_count=132)}
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties.__getitem__)
    assert common.num_processors.__wrapped__(x.device) == 132
    monkeypatch.setenv(library.EMULATION, "a library")
    assert common.device_and_stream(x) == (0, 0)
    assert common.num_processors.__wrapped__(x.device) == 4
