"""The engine on a GPU: the original code's outputs, graphs, determinism, memory."""

from functools import cache

import pytest
import torch
from golden_models import NAMES, golden_models

from variant.engine.engine import Engine
from variant_kernels import CachePlan, available_backends

BACKENDS = tuple(name for name in ("reference", "triton", "cuda") if name in available_backends())
needs_kernels = pytest.mark.skipif(
    BACKENDS == ("reference",),
    reason="no GPU kernels: plain torch is not captured",
)


@cache
def shared_models(name):
    return golden_models(name, "cuda")


def engine_of(name, **options):
    golden, var, vae = shared_models(name)
    return golden, Engine(var, vae, **options)


def depths(golden):
    return {"full": None, "subnet": golden.json["subnet"]["depth"]}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_float32_equals_the_original(name, backend):
    golden, engine = engine_of(name, backend=backend)
    label, tokens = golden.tensors["label"], golden.tensors["tokens_in"]
    for kind, depth in depths(golden).items():
        logits = engine.forced_logits(label, tokens, depth=depth).cpu()
        torch.testing.assert_close(logits, golden.tensors[f"logits_{kind}"], atol=1e-3, rtol=0)
        result = engine.generate(label, depth=depth, cfg=4.0, top_k=1)
        assert torch.equal(result.tokens.cpu(), golden.tensors[f"greedy_tokens_{kind}"])
        expected = golden.tensors[f"greedy_image_{kind}"].float()
        torch.testing.assert_close(result.images.cpu(), expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_16_bit_logits_are_as_near_as_autocast(name, backend, dtype):
    golden, engine = engine_of(name, backend=backend, dtype=dtype)
    label, x_teacher = golden.tensors["label"].cuda(), golden.tensors["x_teacher"].cuda()
    for kind, depth in depths(golden).items():
        expected = golden.tensors[f"logits_{kind}"].cuda()
        with torch.no_grad(), torch.autocast("cuda", dtype):
            autocast = engine.var(label, x_teacher, engine.var.schedule(depth))
        logits = engine.forced_logits(label, golden.tensors["tokens_in"], depth=depth)
        error, allowed = (x - expected for x in (logits, autocast))
        assert error.square().mean().sqrt() <= 2 * allowed.square().mean().sqrt()
        assert error.abs().max() <= 2 * allowed.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_images_are_as_near_as_autocast(dtype):
    golden, engine = engine_of("plain", dtype=dtype)
    _, exact = engine_of("plain")
    tokens = golden.tensors["greedy_tokens_full"].cuda()
    expected, layout = exact.decode(tokens), exact.var.layout
    f_hat = exact.vae.new_features(len(tokens))
    with torch.no_grad():
        for k in range(layout.num_scales):
            exact.vae.accumulate(f_hat, tokens[:, layout.slice(k)], k)
        with torch.autocast("cuda", dtype):
            autocast = exact.vae.decode_features(f_hat).float().expand_as(expected)
    error, allowed = (x - expected for x in (engine.decode(tokens), autocast))
    assert error.square().mean().sqrt() <= 2 * allowed.square().mean().sqrt()


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graphs_give_the_eager_tokens(dtype):
    golden, captured = engine_of("plain", dtype=dtype)
    _, eager = engine_of("plain", dtype=dtype, capture=False)
    calls = [
        {"labels": [1, 2], "seed": 3},
        {"labels": [4, 0], "seed": 2**62 + 11, "cfg": 3.25},
        {"labels": [4, 0], "seed": 5, "image_ids": [7, 2**40]},
        {"labels": [4, 0], "seed": 5, "depth": golden.json["subnet"]["depth"]},
        {"labels": [1, 2], "seed": 3, "top_k": 40, "top_p": 0.9},
    ]
    for call in calls * 2:
        ours, expected = captured.generate(**call), eager.generate(**call)
        assert ours.stats.captured
        assert not expected.stats.captured
        assert torch.equal(ours.tokens, expected.tokens)
        torch.testing.assert_close(ours.images, expected.images, atol=1e-3, rtol=0)


def test_twenty_runs_give_the_same_bits():
    golden, engine = engine_of("plain", dtype=torch.bfloat16)
    first = engine.generate([1, 2, 3], seed=9)
    for _ in range(20):
        again = engine.generate([1, 2, 3], seed=9)
        assert torch.equal(again.tokens, first.tokens)
        assert torch.equal(again.images, first.images)
    logits = engine.forced_logits(golden.tensors["label"], golden.tensors["tokens_in"])
    for _ in range(20):
        again = engine.forced_logits(golden.tensors["label"], golden.tensors["tokens_in"])
        assert torch.equal(again, logits)


@needs_kernels
def test_a_generation_does_not_synchronise():
    """Neither the eager loop nor a replay synchronises with the host before the end."""
    for capture in (False, True):
        _, engine = engine_of("plain", dtype=torch.bfloat16, capture=capture)
        engine.generate([1, 2], seed=0)  # page tables are copied, kernels compiled
        torch.cuda.set_sync_debug_mode("error")
        try:
            engine.generate([3, 4], seed=1, image_ids=[8, 9], max_batch=2)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@needs_kernels
def test_switching_depth_moves_no_weight_and_records_nothing_twice():
    golden, engine = engine_of("plain", dtype=torch.bfloat16)
    depth = golden.json["subnet"]["depth"]
    for next_depth in (None, depth):
        engine.generate([1, 2], seed=0, depth=next_depth)
    recorded = len(engine._graphs[1].graphs)
    allocated = torch.cuda.memory_allocated()
    for next_depth in (None, depth) * 5:
        engine.generate([1, 2], seed=0, depth=next_depth)
    assert len(engine._graphs[1].graphs) == recorded
    assert torch.cuda.memory_allocated() <= allocated


def test_allocated_bytes_are_the_plan():
    golden, engine = engine_of("plain", dtype=torch.bfloat16)
    config = golden.var_config
    for depth in (None, golden.json["subnet"]["depth"]):
        stats = engine.generate([1, 2], depth=depth, seed=0).stats
        plan = CachePlan(engine.var.layout, engine.var.schedule(depth), 16)
        planned = plan.peak_bytes(2, config.num_heads, config.head_dim, "bfloat16")
        assert stats.kv_allocated_bytes == stats.kv_peak_bytes == planned


def test_the_gpu_draws_what_the_cpu_draws():
    """Logits are not equal bit for bit across devices; at most a few near ties may differ."""
    _, engine = engine_of("plain")
    cpu = Engine(*golden_models("plain")[1:])
    tokens = cpu.generate([1, 2, 3], seed=4, top_k=50, top_p=0.95).tokens
    ours = engine.generate([1, 2, 3], seed=4, top_k=50, top_p=0.95).tokens.cpu()
    first = cpu.var.layout.slice(0)
    assert torch.equal(ours[:, first], tokens[:, first])
    assert (ours == tokens).float().mean() > 0.98
