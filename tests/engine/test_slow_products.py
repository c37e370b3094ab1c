"""16-bit engines on processors without 16-bit products: 16-bit K and V, float32 products.

In float16 on every CPU.
"""

import warnings

import pytest
import torch
from small_models import small_model

from variant.engine import cast_models
from variant.engine.engine import Engine
from variant_kernels import products

SIXTEEN_BITS = [torch.bfloat16, torch.float16]


@pytest.fixture
def no_16_bit_products(monkeypatch):
    monkeypatch.setattr(products, "has_products", lambda device, dtype: False)
    monkeypatch.setattr(cast_models, "has_products", lambda device, dtype: False)
    cast_models._warn_of_slowness.cache_clear()
    yield
    cast_models._warn_of_slowness.cache_clear()


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
@pytest.mark.parametrize("pack", [False, True])
def test_kv_is_stored_in_16_bits_and_products_are_float32(no_16_bit_products, dtype, pack):
    model = small_model()
    with pytest.warns(UserWarning, match="Engine: this processor has no native"):
        engine = Engine(model.var, model.vae, dtype=dtype, pack=pack)
    exact = Engine(model.var, model.vae, dtype=torch.float32, pack=pack)
    result, reference = engine.generate([1, 2], seed=0), exact.generate([1, 2], seed=0)
    assert result.stats.product_dtype == "float32"
    assert result.stats.dtype == result.stats.kv_dtype == str(dtype).removeprefix("torch.")
    assert result.stats.kv_allocated_bytes * 2 == reference.stats.kv_allocated_bytes
    assert result.stats.kv_paper_bytes * 2 == reference.stats.kv_paper_bytes
    weights = engine._weights()
    assert weights.dtype == torch.float32
    assert engine.image_bytes(plan_of(engine)) > 0
    tokens = reference.tokens
    logits, expected = (e.forced_logits([1, 2], tokens) for e in (engine, exact))
    # Only K, V and the output of attention are rounded.
    error = (logits - expected).abs().max() / expected.std()
    assert 0 < error < (0.1 if dtype == torch.bfloat16 else 0.02)


def plan_of(engine):
    from variant_kernels import CachePlan

    return CachePlan(engine.var.layout, engine.var.schedule(), engine.page_size)


def test_eight_bit_pages_take_float32_without_a_cast(no_16_bit_products):
    model = small_model()
    with pytest.warns(UserWarning, match="no native"):
        engine = Engine(model.var, model.vae, dtype=torch.bfloat16, kv_dtype="fp8")
    exact = Engine(model.var, model.vae, dtype=torch.float32, kv_dtype="fp8")
    tokens = exact.generate([1], seed=0).tokens
    assert torch.equal(engine.forced_logits([1], tokens), exact.forced_logits([1], tokens))


def test_the_warning_comes_once_and_not_for_float32(no_16_bit_products):
    model = small_model()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Engine(model.var, model.vae, dtype=torch.float32)
        for _ in range(3):
            Engine(model.var, model.vae, dtype=torch.bfloat16)
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    assert caught[0].filename == __file__  # the line of the caller


@pytest.mark.parametrize(
    ("dtype", "native", "text"),
    [
        (torch.bfloat16, (), "no native bfloat16 products.* is at least as fast$"),
        (torch.float16, (), "no native float16 products.* is at least as fast$"),
        (torch.float16, SIXTEEN_BITS, "no float16 kernels.* as fast, torch.bfloat16 faster$"),
        (torch.float16, SIXTEEN_BITS[:1], "no native float16 .* as fast, torch.bfloat16 faster$"),
    ],
    ids=str,
)
def test_the_warning_says_what_is_as_fast(monkeypatch, dtype, native, text):
    cast_models._warn_of_slowness.cache_clear()
    for module in (products, cast_models):
        monkeypatch.setattr(module, "has_products", lambda device, dtype: dtype in native)
    model = small_model()
    with pytest.warns(UserWarning, match=f"^Engine: .*{text}"):
        Engine(model.var, model.vae, dtype=dtype)
    cast_models._warn_of_slowness.cache_clear()
