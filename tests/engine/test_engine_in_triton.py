"""The engine on Triton kernels, run by Triton's interpreter (``TRITON_INTERPRET=1``)."""

import pytest
import torch
from golden_models import golden_models

from variant.engine.engine import Engine
from variant_kernels.dispatch.support import triton_interprets

pytestmark = pytest.mark.skipif(
    not triton_interprets(), reason="needs Triton's interpreter: TRITON_INTERPRET=1"
)


@pytest.fixture(scope="module")
def small():
    """Four layers, four scales: the interpreter takes seconds for each generation."""
    golden, var, vae = golden_models("no_l2norm")
    return golden, Engine(var, vae, backend="triton")


# The interpreter takes as long for each row: one image where the batch is tried by another test.
IMAGE = slice(1, 2)


def test_logits_equal_the_original_and_the_stream_is_written_once_a_layer(small, monkeypatch):
    """The sum after attention is left to the launch after the MLP."""
    golden, engine = small
    label, tokens = golden.tensors["label"], golden.tensors["tokens_in"]
    launchers, told = engine._launchers(None), []
    gated = launchers.gated_adaln
    launchers.gated_adaln = lambda **given: told.append(given) or gated(**given)
    monkeypatch.setattr(engine, "_launchers", lambda kv_dtype: launchers)
    logits = engine.forced_logits(label, tokens)
    torch.testing.assert_close(logits, golden.tensors["logits_full"], atol=1e-4, rtol=0)
    assert told
    assert all(given["store_sum"] is False for given in told[::2])
    for first, second in zip(told[::2], told[1::2], strict=True):
        assert "store_sum" not in second
        assert second["x_BTC"] is first["x_BTC"]
        assert second["earlier"][0] is first["y_BTC"]


def test_logits_of_a_subnet_equal_the_original(small):
    golden, engine = small
    label, tokens = golden.tensors["label"][IMAGE], golden.tensors["tokens_in"][IMAGE]
    logits = engine.forced_logits(label, tokens, depth=golden.json["subnet"]["depth"])
    torch.testing.assert_close(logits, golden.tensors["logits_subnet"][IMAGE], atol=1e-4, rtol=0)


def test_greedy_tokens_equal_the_original(small):
    golden, engine = small
    depth = golden.json["subnet"]["depth"]
    result = engine.generate(golden.tensors["label"][IMAGE], depth=depth, cfg=4.0, top_k=1)
    assert torch.equal(result.tokens, golden.tensors["greedy_tokens_subnet"][IMAGE])


def test_sampled_tokens_equal_the_original_with_its_generator(small):
    golden, engine = small
    result = engine.generate(
        golden.tensors["label"],
        depth=golden.json["subnet"]["depth"],
        cfg=1.5,
        top_k=40,
        top_p=0.9,
        generator=torch.Generator().manual_seed(7),
    )
    assert torch.equal(result.tokens, golden.tensors["sampled_tokens_subnet"])


def test_a_seed_draws_what_the_cpu_kernels_draw(small):
    golden, engine = small
    plain = Engine(engine.var, engine.vae, backend="cpu")
    arguments = {"depth": golden.json["subnet"]["depth"], "seed": 11, "top_k": 100, "top_p": 0.95}
    ours = engine.generate([1, 2], image_ids=[5, 2**40], **arguments)
    expected = plain.generate([1, 2], image_ids=[5, 2**40], **arguments)
    assert torch.equal(ours.tokens, expected.tokens)


def watched(engine, monkeypatch):
    """The arguments of every call of attention, collected as the engine runs."""
    launchers, told = engine._launchers(None), []
    attention = launchers.attention
    launchers.attention = lambda **given: told.append(given) or attention(**given)
    monkeypatch.setattr(engine, "_launchers", lambda kv_dtype: launchers)
    return told


@pytest.mark.parametrize("backend", ["triton", "cpu"])
def test_l2_normalised_logits_equal_the_original(backend, monkeypatch):
    golden, var, vae = golden_models("plain")
    engine = Engine(var, vae, backend=backend, page_size=5)
    told = watched(engine, monkeypatch)
    two = slice(1, 3)  # of one image, every view would be contiguous
    logits = engine.forced_logits(
        golden.tensors["label"][two],
        golden.tensors["tokens_in"][two],
        depth=golden.json["subnet"]["depth"],
    )
    torch.testing.assert_close(logits, golden.tensors["logits_subnet"][two], atol=1e-4, rtol=0)
    # Triton's attention normalises the queries of the projection, which the append leaves alone.
    fused = backend == "triton"
    assert told
    assert all(("scale_mul_1H11" in given) == fused for given in told)
    assert all(given["q_BTHD"].is_contiguous() != fused for given in told)
