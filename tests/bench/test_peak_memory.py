"""Peak memory: what is run, read and refused; the original and GPUs are doubles."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from variant import UserError
from variant.bench import device, peak_memory
from variant.bench.peak_memory import Job, in_use, resident, run


def original(**changes):
    job = {"who": "original", "model": "digits", "batch": 12, "depth": 8, "dtype": "float32"}
    return Job(**job | changes)


@pytest.mark.parametrize("decoder", [False, True])
def test_the_original_generates_with_and_without_its_decoder(monkeypatch, tmp_path, decoder):
    calls = []

    @contextlib.contextmanager
    def without_decoder():
        calls.append("without decoder")
        yield

    def generate(labels_B, **options):
        calls.append((labels_B.tolist(), options))

    def load(repo, config, vae_config, device):
        assert (repo, config.num_classes, device) == (tmp_path, 10, "cpu")
        return SimpleNamespace(generate=generate, without_decoder=without_decoder)

    monkeypatch.setattr(peak_memory.original_var, "load", load)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: calls.append(count))
    sizes = run(original(var_repo=str(tmp_path), decoder=decoder, autocast=True, cfg=2.0))
    options = {"seed": 0, "autocast": True, "cfg": 2.0, "top_k": 900, "top_p": 0.96}
    # Twelve labels of ten classes.
    generated = ([*range(10), 0, 1], options)
    assert calls == [1, generated] if decoder else [1, "without decoder", generated]
    assert 0 < sizes["loaded"] <= sizes["peak"]


def test_the_original_needs_its_repository():
    with pytest.raises(UserError, match="the original needs --var-repo"):
        run(original(threads=torch.get_num_threads()))


def test_sizes_of_this_process_are_read_in_bytes(monkeypatch, tmp_path):
    assert 0 < resident("VmRSS") <= resident("VmHWM")
    status = tmp_path / "status"
    status.write_text("VmPeak:\t  9 kB\nVmHWM:\t  7 kB\nVmRSS:\t  5 kB\n")
    monkeypatch.setattr(peak_memory, "STATUS", status)
    assert (in_use("cpu", most=True), in_use("cpu", most=False)) == (7 * 1024, 5 * 1024)
    status.write_text("VmPeak:\t  9 kB\n")
    with pytest.raises(UserError, match="has no VmRSS; memory is measured on Linux only"):
        resident("VmRSS")


def test_memory_of_a_gpu_is_what_torch_allocated(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 2)
    assert (in_use("cuda", most=True), in_use("cuda", most=False)) == (3, 2)


def test_the_command_prints_one_line_or_says_why_not(monkeypatch, capsys):
    monkeypatch.setattr(peak_memory, "run", lambda job: {"loaded": job.batch, "peak": 2})
    words = '{"who": "ours", "model": "digits", "batch": 4, "depth": 2, "dtype": "float32"}'
    monkeypatch.setattr("sys.argv", ["peak_memory", words])
    peak_memory.main()
    assert capsys.readouterr().out == '{"loaded": 4, "peak": 2}\n'

    def fail(job):
        raise MemoryError("no memory")

    monkeypatch.setattr(peak_memory, "run", fail)
    with pytest.raises(SystemExit, match="no memory"):
        peak_memory.main()


def test_peers_and_clocks_by_device(monkeypatch):
    monkeypatch.setattr(device, "has_products", lambda device, dtype: True)
    assert device.peer_settings("cpu") == {"float32": False, "bfloat16 autocast": True}
    assert device.peer_settings("cuda") == {"float16 autocast": True}
    monkeypatch.setattr(device, "has_products", lambda device, dtype: False)
    assert device.peer_settings("cpu") == {"float32": False}
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(True))
    before = device.clock("cpu")
    assert waited == []
    assert device.clock("cuda") >= before
    assert waited == [True]
    with device.autocast("cpu", True):
        assert torch.mm(torch.zeros(2, 2), torch.zeros(2, 2)).dtype == torch.bfloat16
