"""What a device's family decides: block sizes, processors, library versions. GPUs are doubles."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from variant_kernels.dispatch import support
from variant_kernels.library_ops.installed import find_flash
from variant_kernels.triton_ops import (
    block_causal_attention_configs,
    common,
    compile_report,
    paged_attention_configs,
    tuning,
)

GPU, XPU, CPU = torch.device("cuda", 0), torch.device("xpu", 0), torch.device("cpu")
FAMILIES = ("sm90", "nvidia", "amd", "other", "interpreter")


@pytest.fixture(autouse=True)
def nothing_is_remembered_of_devices():
    cached = (common.num_processors, common.family, tuning._device_name, find_flash)
    cached += (paged_attention_configs.configs_by_queries,)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


@pytest.mark.parametrize(
    ("device", "interprets", "hip", "capability", "family"),
    [
        (GPU, False, None, (9, 0), "sm90"),
        (GPU, False, None, (10, 0), "sm90"),
        (GPU, False, None, (8, 6), "nvidia"),
        (GPU, False, None, (11, 0), "nvidia"),
        (GPU, False, None, (12, 0), "nvidia"),
        (GPU, False, "6.2", (9, 4), "amd"),
        (XPU, False, None, None, "other"),
        (CPU, True, None, None, "interpreter"),
        (GPU, True, None, (9, 0), "interpreter"),
    ],
)
def test_families(monkeypatch, device, interprets, hip, capability, family):
    monkeypatch.setenv("TRITON_INTERPRET", "1" if interprets else "0")
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert common.family(device) == family


def test_processors_and_names_of_devices(monkeypatch):
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: SimpleNamespace(multi_processor_count=132),
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(
        torch.xpu, "get_device_properties", lambda device: SimpleNamespace(gpu_subslice_count=64)
    )
    monkeypatch.setattr(torch.xpu, "get_device_name", lambda device: "an XPU")
    assert [common.num_processors(device) for device in (GPU, XPU, CPU)] == [132, 64, 1]
    assert [tuning._device_name(device) for device in (GPU, XPU, CPU)] == ["a GPU", "an XPU", "cpu"]


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_a_launch_changes_the_device_only_where_it_is_another(monkeypatch, kind):
    module = getattr(torch, kind)
    monkeypatch.setattr(module, "current_device", lambda: 0)
    monkeypatch.setattr(module, "device", lambda device: f"switched to {device}")

    def context(index):
        return common.on_device_of(SimpleNamespace(device=torch.device(kind, index)))

    assert context(1) == f"switched to {kind}:1"
    with context(0) as nothing:
        assert nothing is None


def test_block_sizes_fit_the_width_the_queries_and_the_dtype(monkeypatch):
    configs = paged_attention_configs

    def chosen(family, queries, width, dtype=torch.bfloat16, kv8=False):
        monkeypatch.setattr(configs, "family", lambda device: family)
        return configs.configs_for(torch.empty(1, queries, 1, width, dtype=dtype), kv8)

    table = configs._CONFIGS["sm90"]
    for queries, entry in ((1, 16), (16, 16), (17, 32), (64, 64), (65, 128), (128, 128)):
        assert chosen("sm90", queries, 64) == table[entry]
    assert chosen("sm90", 1000, 64) == table[128]
    for family in FAMILIES[:-1]:
        assert chosen(family, 1, 128, torch.float32) == configs.WIDE_OR_FP32
        assert chosen(family, 1, 256) == configs.WIDE_OR_FP32
        most = 64 if family == "sm90" else 32
        narrow = chosen(family, 128, 64, kv8=True)
        assert narrow == chosen(family, 128, 64)
        wide = chosen(family, 16, 128, kv8=True)
        assert wide == tuple(c for c in chosen(family, 16, 128) if c.block_k <= most)
        assert wide
    assert chosen("interpreter", 1, 256, torch.float32) == configs._CONFIGS["interpreter"][128]


@pytest.mark.parametrize("name", ["DQ", "DKV"])
def test_block_sizes_of_the_backward_pass_fit_the_width(monkeypatch, name):
    configs = block_causal_attention_configs
    table = getattr(configs, name)

    def chosen(family, width, dtype):
        monkeypatch.setattr(configs, "family", lambda device: family)
        return configs.configs_for(table, torch.empty(1, width, dtype=dtype))

    for width, entry in ((16, 64), (64, 64), (65, 128), (128, 128), (130, 256)):
        assert chosen("sm90", width, torch.float16) == table["sm90"][entry]
    assert chosen("nvidia", 64, torch.float32) == configs.FLOAT32
    assert chosen("nvidia", 65, torch.float32) == configs.FLOAT32_WIDE
    assert chosen("interpreter", 64, torch.float32) == table["interpreter"][256]


@pytest.mark.parametrize(
    ("major", "installed", "version"),
    [
        (9, {"flash_attn_interface", "flash_attn"}, 3),
        (9, {"flash_attn"}, 2),
        (8, {"flash_attn_interface", "flash_attn"}, 2),
        (8, {"flash_attn_interface"}, None),
        (9, set(), None),
    ],
)
def test_the_newest_flash_attn_that_runs_on_the_device(monkeypatch, major, installed, version):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: name if name in installed else None
    )
    flash = find_flash(GPU)
    assert (None if flash is None else flash.version) == version


def test_flash_attn_that_is_not_installed_is_an_import_error(monkeypatch):
    from variant_kernels.library_ops import flash

    monkeypatch.setattr(flash, "find_flash", lambda device: None)
    x, table = torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, dtype=torch.int32)
    with pytest.raises(ImportError, match="paged_attention: flash-attn is not installed"):
        flash.launch_paged_attention_forward(
            q_BTHD=x,
            k_pages_PNHD=x,
            v_pages_PNHD=x,
            page_table_BM=table,
            kv_lens_B=table[0],
            softmax_scale=1.0,
        )


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"VARIANT_CACHE_DIR": "/a"}, "/a/tuning"),
        ({"VARIANT_CACHE_DIR": "/a", "XDG_CACHE_HOME": "/b"}, "/a/tuning"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/variant_kernels/tuning"),
        ({"HOME": "/c"}, "/c/.cache/variant_kernels/tuning"),
    ],
)
def test_where_choices_of_block_sizes_are_stored(monkeypatch, variables, folder):
    for name in ("VARIANT_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert str(tuning.cache_dir()) == folder


@pytest.mark.skipif(support.triton_interprets(), reason="an interpreted kernel is not compiled")
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_the_compile_report_of_both_makers(capsys, monkeypatch, tmp_path, target):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    words = ["--kernel", "paged_attention_combine", "--case", "D 64", "--dtype", "fp16"]
    assert compile_report.main([*words, "--target", target]) == 0
    head, line = capsys.readouterr().out.splitlines()
    assert head.split()[0] == "kernel"
    registers, spills, _ = map(int, line.split()[-3:])
    assert registers > 0
    assert spills == 0


def test_the_compile_report_says_what_failed_and_goes_on(capsys, monkeypatch):
    def fail(case, target, dtype):
        raise RuntimeError(f"no {dtype} on {target}\nmore lines")

    monkeypatch.setattr(compile_report, "compile_case", fail)
    words = ["--kernel", "paged_attention_combine", "--case", "D 64", "--target", "sm_90"]
    assert compile_report.main(words) == 1
    lines = capsys.readouterr().out.splitlines()[1:]
    assert len(lines) > 1
    assert all("failed" in line for line in lines)
    assert lines[0].endswith("on sm_90")


def test_the_compile_report_refuses_assembly_without_its_fields():
    assert compile_report._number("  .vgpr_count:  12\n", ".vgpr_count") == 12
    with pytest.raises(RuntimeError, match=r"the assembly has no field \.vgpr_spill_count"):
        compile_report._number(".vgpr_count: 12", ".vgpr_spill_count")
