"""Free memory and the batch size that fits into it."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_models import small_model

from variant.engine import memory
from variant.engine.cuda_graphs import GraphRecorder
from variant.engine.kernels import Launchers
from variant.engine.memory import (
    _group_limit,
    batch_size,
    decoder_bytes,
    free_bytes,
    image_bytes,
)
from variant.errors import UserError
from variant.models.config import VARConfig, VQVAEConfig
from variant_kernels import CachePlan, DepthSchedule
from variant_kernels.kv_quantization import KV8_DTYPE


def group(folder, limit, used, stat):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text("".join(f"{k} {v}\n" for k, v in stat.items()))


def test_file_cache_counts_as_free_and_every_parent_group_limits(tmp_path):
    root, membership = tmp_path / "cgroup", tmp_path / "membership"
    membership.write_text("0::/outer/inner\n")
    group(root, "max", 0, {})
    group(root / "outer", 1000, 900, {"inactive_file": 300, "slab_reclaimable": 50})
    group(root / "outer" / "inner", 5000, 10, {"inactive_file": 0})
    assert _group_limit(root, membership) == 450
    membership.write_text("0::/\n")
    assert _group_limit(root, membership) == float("inf")
    assert _group_limit(tmp_path / "none", tmp_path / "none") == float("inf")


def test_this_machine_has_free_memory():
    assert 2**20 < free_bytes(torch.device("cpu")) < 2**50


@pytest.mark.parametrize(
    ("count", "max_batch", "available", "expected"),
    [(5, None, 1000, 5), (5, None, 35, 2), (5, 3, 1000, 3), (5, 3, 40, 3), (2, 9, 30, 2)],
)
def test_a_batch_is_limited_by_the_request_the_caller_and_memory(
    count, max_batch, available, expected
):
    size = batch_size(count, max_batch, per_image=10, fixed=10, available=available)
    assert size == expected


def test_a_batch_size_is_a_plain_integer():
    for value in (np.int64(3), torch.tensor(3)):
        size = batch_size(5, value, per_image=10, fixed=10, available=1000)
        assert (type(size), size) == (int, 3)


def test_a_batch_that_does_not_fit_says_what_it_needs_and_what_is_free():
    sizes = {"per_image": 5 * 2**20, "fixed": 2 * 2**20, "available": 6 * 2**20}
    with pytest.raises(MemoryError, match=r"1 image.* need 7 MiB, but 6 MiB are free"):
        batch_size(3, None, **sizes)
    with pytest.raises(MemoryError, match=r"3 image.* need 17 MiB, but 6 MiB are free"):
        batch_size(3, 8, **sizes)


def test_a_batch_that_does_not_fit_raises():
    for max_batch, available in ((None, 19), (3, 39)):
        with pytest.raises(MemoryError, match=f"generate: {max_batch or 1} image"):
            batch_size(5, max_batch, per_image=10, fixed=10, available=available)
    for max_batch, error in ((0, ValueError), (1.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match="max_batch must be an integer >= 1"):
            batch_size(5, max_batch, per_image=10, fixed=10, available=1000)


VAR_CONFIG = VARConfig(
    depth=4,
    embed_dim=64,
    num_heads=2,
    num_classes=5,
    patch_nums=(1, 2, 3),
    vocab_size=32,
    vae_channels=8,
    mlp_ratio=3.0,
    subnets={2: (0, 3)},
    bridge=1,
)
VAE_CONFIG = VQVAEConfig(
    vocab_size=32, z_channels=8, ch=32, ch_mult=(1, 1), patch_nums=(1, 2, 3), share_quant_resi=2
)


def bytes_of_one_image(
    dtype=torch.bfloat16,
    pages=None,
    attention=None,
    scores=False,
    config=VAR_CONFIG,
    **options,
):
    """(K/V bytes, all bytes) of one more image of the small model at full depth."""
    plan = CachePlan(config.layout, DepthSchedule.full(4, 3), page_size=1)
    launchers = SimpleNamespace(
        pages_dtype=pages or dtype,
        attention_dtype=attention or dtype,
        stores_scores=scores,
    )
    settings = {"guidance": True, "packed": True} | options
    kv = plan.peak_bytes(1, 2, 32, launchers.pages_dtype, settings["guidance"])
    return kv, image_bytes(config, VAE_CONFIG, plan, dtype, launchers, **settings)


def test_bytes_of_one_image_are_those_of_the_tensors_of_a_layer():
    # The last scale's 9 tokens, conditional and unconditional, 64 wide.
    tokens, width, hidden = 18, 64, 192
    streams = 2 * 4 * tokens * width  # before and after, float32
    # The packed projection (three widths), q, k and v, attention's output; two hidden tensors.
    temporary = tokens * (3 * width + 3 * width + width + 2 * hidden)
    kv, total = bytes_of_one_image()
    assert total - kv == streams + 2 * temporary
    kv, total = bytes_of_one_image(torch.float32)
    assert total - kv == streams + 4 * temporary
    kv, half = bytes_of_one_image(guidance=False)
    assert half - kv == (streams + 2 * temporary) // 2


def test_bytes_of_casts_around_attention_and_of_stored_scores():
    tokens, width, total_tokens = 18, 64, 14
    kv, plain = bytes_of_one_image(torch.float32)
    kv16, cast = bytes_of_one_image(torch.float32, attention=torch.float16, pages=torch.float16)
    assert (cast - kv16) - (plain - kv) == 5 * tokens * width * 2
    _, stored = bytes_of_one_image(torch.float32, scores=True)
    keys_and_values = 2 * 2 * total_tokens * width * 4  # of both sequences, float32
    scores = 2 * tokens * total_tokens * 8  # two heads, twice in float32
    assert stored - plain == keys_and_values + scores


@pytest.mark.parametrize(
    ("backend", "dtype", "kv_dtype", "stores"),
    [
        ("cpu", torch.float32, None, False),
        ("cpu", torch.float16, None, False),
        ("cpu", torch.float16, KV8_DTYPE, False),
        ("reference", torch.float32, None, True),
    ],
    ids=str,
)
def test_only_plain_torch_stores_scores(backend, dtype, kv_dtype, stores):
    model = small_model()
    launchers = Launchers(backend, "cpu", dtype, torch.float32, model.var, 16, kv_dtype)
    assert launchers.stores_scores == stores


def test_bytes_of_logits_where_they_are_more_than_a_layers():
    config = dataclasses.replace(VAR_CONFIG, vocab_size=4096)
    tokens = 18
    kv, total = bytes_of_one_image(config=config)
    assert total - kv == tokens * 4096 * (2 + 4 + 4)
    kv, total = bytes_of_one_image(config=config, extra_logit_bytes=5)
    assert total - kv == tokens * 4096 * (2 + 4 + 4) + 9 * 4096 * 5


def test_bytes_of_the_decoder_count_once_where_it_is_packed():
    side = VAE_CONFIG.image_size
    maps = 6 * 4 * 32 * side * side
    assert decoder_bytes(VAE_CONFIG, packed=True) == maps
    assert decoder_bytes(VAE_CONFIG, packed=False) == 0
    kv, total = bytes_of_one_image(packed=False)
    layer = bytes_of_one_image()[1] - kv
    assert total - kv == max(layer, maps)
    large = VQVAEConfig(vocab_size=32, z_channels=8, ch=256, ch_mult=(1, 1), patch_nums=(1, 2, 3))
    plan = CachePlan(VAR_CONFIG.layout, DepthSchedule.full(4, 3))
    launchers = SimpleNamespace(
        pages_dtype=torch.float32,
        attention_dtype=torch.float32,
        stores_scores=False,
    )
    sizes = VAR_CONFIG, large, plan, torch.float32, launchers
    pages = plan.peak_bytes(1, 2, 32, torch.float32, False)
    for packed, expected in ((False, 6 * 4 * 256 * large.image_size**2), (True, None)):
        total = image_bytes(*sizes, guidance=False, packed=packed)
        assert (total == pages + expected) if expected else (total < pages + 6 * 4 * 256 * 36)


def test_weights_that_do_not_fit_are_refused_before_they_are_built(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(memory, "free_bytes", lambda device: 3 * 2**30)
    memory.check_fits("a recipe", "its weights", 3 * 2**30, cpu)
    text = "a recipe: its weights need 5,120 MiB, but 3,072 MiB are free on cpu; use a smaller"
    with pytest.raises(UserError, match=f"^{text}"):
        memory.check_fits("a recipe", "its weights", 5 * 2**30, cpu)
    with pytest.raises(UserError, match="need 3,072 MiB, but 3,072 MiB are free"):
        memory.check_fits("a recipe", "its weights", 3 * 2**30 + 1, cpu)


def test_free_bytes_are_a_share_of_the_smaller_limit(monkeypatch):
    monkeypatch.setattr(memory, "_available", lambda: 1000)
    monkeypatch.setattr(memory, "_group_limit", lambda: 2000.0)
    assert free_bytes(torch.device("cpu")) == 800
    monkeypatch.setattr(memory, "_group_limit", lambda: 500.0)
    assert free_bytes(torch.device("cpu")) == 400
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (700, 9999))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 400)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    monkeypatch.setattr(torch.cuda, "memory_snapshot", list)
    assert free_bytes(torch.device("cuda", 0)) == 800


def segment(device, pool, total, allocated):
    return {
        "device": device,
        "segment_pool_id": pool,
        "total_size": total,
        "allocated_size": allocated,
    }


def test_memory_that_torch_caches_for_graphs_is_not_free(monkeypatch):
    snapshot = [
        segment(0, (0, 0), 150, 20),
        segment(0, (0, 1), 100, 40),
        segment(0, (1, 0), 50, 10),
        segment(1, (0, 1), 1000, 0),
    ]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: snapshot)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (700, 9999))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for device in (torch.device("cuda", 0), torch.device("cuda")):
        assert free_bytes(device) == (700 + 200 - 60 - 40) * 0.8
        assert memory.idle_pool_bytes(device) == 60 + 40
        assert memory.idle_pool_bytes(device, (0, 1)) == 60
    monkeypatch.setattr("variant.engine.cuda_graphs.torch.cuda.Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (1, 0))
    assert GraphRecorder(torch.device("cuda", 0)).idle_bytes() == 40


def test_available_memory_is_read_in_bytes(monkeypatch):
    text = "MemTotal: 9 kB\nMemAvailable:    5 kB\nBuffers: 7 kB\n"
    monkeypatch.setattr(memory.Path, "read_text", lambda path: text)
    assert memory._available() == 5 * 1024
    monkeypatch.setattr(memory.Path, "read_text", lambda path: "MemTotal: 9 kB\n")
    with pytest.raises(OSError, match="/proc/meminfo has no MemAvailable"):
        memory._available()


def test_a_group_over_its_limit_or_with_files_that_cannot_be_read(tmp_path):
    group(tmp_path / "full", 100, 500, {"inactive_file": 10})
    assert memory._free_in_group(tmp_path / "full") == 0
    group(tmp_path / "bare", 100, 40, {})
    assert memory._free_in_group(tmp_path / "bare") == 60
    group(tmp_path / "odd", 100, "no number", {})
    assert memory._free_in_group(tmp_path / "odd") == float("inf")
