"""Triton's JIT compiles for a GPU that is not present, through the launchers."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import offline_triton
from benchmarks.offline_triton import A100, H200, gpu
from variant_kernels.dispatch.support import triton_interprets
from variant_kernels.triton_ops import tuning
from variant_kernels.triton_ops.adaln import launch_adaln_forward
from variant_kernels.triton_ops.common import family
from variant_kernels.triton_ops.tuning import Config

pytestmark = pytest.mark.skipif(triton_interprets(), reason="kernels are interpreted")


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))


def _modulate(rows: int = 3) -> None:
    x_BTC = torch.empty(2, rows, 1920, device="cuda", dtype=torch.bfloat16)
    condition_BC = torch.empty(2, 1920, device="cuda", dtype=torch.bfloat16)
    launch_adaln_forward(x_BTC=x_BTC, scale_BC=condition_BC, shift_BC=condition_BC, eps=1e-6)


def test_a_launcher_compiles_and_its_launch_is_recorded():
    with gpu() as h200:
        _modulate()
    (launch,) = h200.launches
    assert launch.name == "adaln_forward_kernel"
    assert launch.grid[1:] == (1, 1)
    assert launch.grid[0] > 0
    assert launch.arguments["tokens"] == 3
    assert launch.arguments["C"] == 1920
    assert ".target sm_90a" in launch.asm["ptx"]
    assert launch.asm["cubin"].startswith(b"\x7fELF")
    assert 0 < launch.registers <= 255
    assert launch.stack == 0
    assert 1 <= launch.programs_per_processor(H200) <= 32
    assert h200.compiled == ["adaln_forward_kernel"]
    assert h200.found == []


def test_the_entry_is_found_later_and_belongs_to_its_target():
    with gpu() as first:
        _modulate()
    with gpu() as second:
        _modulate(rows=5)
    with gpu(A100) as other:
        _modulate()
    assert first.compiled
    assert second.found == first.compiled
    assert not second.compiled
    assert other.compiled == first.compiled
    assert ".target sm_80" in other.launches[0].asm["ptx"]


def test_every_config_is_launched_and_one_that_does_not_fit_is_named(monkeypatch):
    fits, large = Config(16, 16, 4, 2), Config(32, 32, 4, 2)

    def launch(config: Config) -> None:
        if config is large:
            raise tuning.OutOfResources(300_000, H200.shared_memory, "shared memory")
        _modulate()

    with gpu() as h200:
        kernel = offline_triton.JITFunction
        chosen = tuning.best(kernel, (large, fits), (), launch, torch.device("cuda", 0))
        _modulate()
    assert chosen == fits
    assert [launch.config for launch in h200.launches] == [fits, None]
    assert [(config, "shared memory" in why) for _, config, why in h200.failures] == [(large, True)]


def test_nothing_of_the_gpu_is_left():
    best, capability = tuning.best, torch.cuda.get_device_capability
    with gpu():
        _modulate()
        assert family(torch.device("cuda", 0)) == "sm90"
    assert tuning.best is best
    assert torch.cuda.get_device_capability is capability
    assert family.cache_info().currsize == 0
    assert type(torch.empty(1)) is torch.Tensor


def test_addresses_tell_views_and_other_tensors_apart():
    with gpu():
        a = torch.empty(4, 3, 8, device="cuda", dtype=torch.bfloat16)
        b = torch.empty(4, device="cuda")
        assert a.unbind(1)[1].data_ptr() - a.data_ptr() == 8 * 2
        assert a.data_ptr() % 512 == b.data_ptr() % 512 == 0
        assert abs(a.data_ptr() - b.data_ptr()) >= 2**39
