"""8-bit K and V in the engine: off by default; per engine and per call give the same tokens."""

import pickle

import pytest
import torch
from golden_models import NAMES, golden_engine
from small_models import small_model
from test_cuda_graphs import Repeater

import variant.models.var as network
from variant.engine.engine import Engine
from variant.engine.kernels import Launchers
from variant_kernels import CachePlan, qk_norm, use_backend
from variant_kernels.kv_quantization import dequantize_kv, quantize_kv

BACKENDS = ("reference", "cpu")


def rms(x):
    return x.double().square().mean().sqrt()


def assert_the_same_rounding(ours, theirs, change):
    """Two computations of one model with 8-bit K/V differ by far less than 8 bits change in it.

    They cannot agree to the last bit: where float32 rounding moves a key or a value across the
    midpoint between two 8-bit numbers, one of about ten thousand entries differs by a sixteenth.
    An entry that is always read wrongly would give an error as large as the change itself.
    """
    assert rms(ours - theirs) <= 0.02 * rms(change)
    assert (ours - theirs).abs().max() <= 0.2 * change.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_default_is_exact_and_the_same_bit_by_bit_beside_8_bit_calls(dtype):
    golden, engine = golden_engine("plain", dtype=dtype)
    label, tokens = golden.tensors["label"], golden.tensors["tokens_in"]
    before = engine.forced_logits(label, tokens), engine.generate(label, seed=1, decode=False)
    changed = engine.forced_logits(label, tokens, kv_dtype="fp8")
    engine.generate(label, seed=1, kv_dtype="fp8", decode=False)
    after = engine.forced_logits(label, tokens), engine.generate(label, seed=1, decode=False)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1].tokens, after[1].tokens)
    assert before[1].stats.kv_dtype == str(dtype).removeprefix("torch.")
    assert not torch.equal(before[0], changed)
    assert torch.equal(
        before[0], golden_engine("plain", dtype=dtype)[1].forced_logits(label, tokens)
    )


def test_an_engine_of_8_bits_and_a_call_of_8_bits_are_the_same():
    golden, engine = golden_engine("plain")
    label, tokens = golden.tensors["label"], golden.tensors["tokens_in"]
    own = Engine(engine.var, engine.vae, kv_dtype=torch.float8_e4m3fn)
    assert torch.equal(
        own.forced_logits(label, tokens), engine.forced_logits(label, tokens, kv_dtype="fp8")
    )
    ours = own.generate(label, seed=2, decode=False)
    theirs = engine.generate(label, seed=2, kv_dtype="fp8", decode=False)
    assert torch.equal(ours.tokens, theirs.tokens)
    assert ours.stats.kv_dtype == theirs.stats.kv_dtype == "float8_e4m3fn"
    again = pickle.loads(pickle.dumps(own)).generate(label, seed=2, decode=False)
    assert torch.equal(again.tokens, ours.tokens)


def test_the_model_passes_kv_dtype_to_its_engine():
    model = small_model()
    ours = model.generate([1, 2], seed=4, kv_dtype="fp8", dtype=torch.bfloat16)
    engine = Engine(model.var, model.vae, dtype=torch.bfloat16, kv_dtype="fp8")
    assert torch.equal(ours.tokens, engine.generate([1, 2], seed=4).tokens)
    assert (ours.stats.dtype, ours.stats.kv_dtype) == ("bfloat16", "float8_e4m3fn")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_plain_torch_with_rounded_keys_and_values(name, backend, monkeypatch):
    """The reference: the training path, all scales at once, without pages, with rounded K and V."""
    golden, engine = golden_engine(name, backend=backend, kv_dtype="fp8")
    label, tokens = golden.tensors["label"], golden.tensors["tokens_in"]
    attention = network.block_causal_attention

    def rounded(q, k, v, *rest, scale_mul_1H11, **options):
        if scale_mul_1H11 is not None:
            q, k = qk_norm(q, k, scale_mul_1H11)
        k, v = (dequantize_kv(*quantize_kv(x), x.dtype) for x in (k, v))
        return attention(q, k, v, *rest, **options)

    for kind, depth in {"full": None, "subnet": golden.json["subnet"]["depth"]}.items():
        with monkeypatch.context() as patched, torch.no_grad(), use_backend("reference"):
            patched.setattr(network, "block_causal_attention", rounded)
            plain = engine.var(label, golden.tensors["x_teacher"], engine.var.schedule(depth))
        ours = engine.forced_logits(label, tokens, depth=depth)
        assert_the_same_rounding(ours, plain, plain - golden.tensors[f"logits_{kind}"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_order_and_page_size_change_no_more_than_a_matrix_product_does(backend):
    golden, engine = golden_engine("plain", backend=backend, kv_dtype="fp8")
    labels = torch.tensor([3, 1, 4])
    tokens = golden.tensors["tokens_in"][:1].repeat(3, 1).roll(5, dims=1)
    whole = engine.forced_logits(labels, tokens)
    change = whole - golden_engine("plain", backend=backend)[1].forced_logits(labels, tokens)
    for images in ([2], [2, 1, 0]):
        logits = engine.forced_logits(labels[images], tokens[images])
        assert_the_same_rounding(logits, whole[images], change[images])
    for page_size in (1, 64):
        other = Engine(engine.var, engine.vae, backend=backend, kv_dtype="fp8", page_size=page_size)
        assert_the_same_rounding(other.forced_logits(labels, tokens), whole, change)
        stats = other.generate(labels, seed=1, decode=False).stats
        assert stats.kv_allocated_bytes == stats.kv_planned_bytes


@pytest.mark.parametrize("backend", BACKENDS)
def test_seed_and_image_ids_determine_the_tokens(backend):
    _, engine = golden_engine("no_l2norm", backend=backend, kv_dtype="fp8")
    arguments = {"seed": 11, "top_p": 0.9, "decode": False}
    first = engine.generate([1, 1], **arguments).tokens
    assert torch.equal(first, engine.generate([1, 1], image_ids=[0, 1], **arguments).tokens)
    assert not torch.equal(first[0], first[1])
    assert torch.equal(first[0], engine.generate([1, 1], image_ids=[0, 0], **arguments).tokens[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_switching_between_scales_equals_the_schedule_given_at_once(backend):
    golden, engine = golden_engine("plain", backend=backend, kv_dtype="fp8")
    label = golden.tensors["label"]
    planned = engine.generate(label, depth=3, bridge=4, seed=3, decode=False)
    switched = engine.generate(
        label, bridge=2, seed=3, on_scale=lambda k, partial: 3 if k == 3 else None, decode=False
    )
    assert torch.equal(planned.tokens, switched.tokens)
    assert switched.stats.kv_peak_bytes < switched.stats.kv_planned_bytes


@pytest.mark.parametrize("backend", BACKENDS)
def test_replays_give_the_eager_tokens_and_exact_calls_are_recorded_apart(backend, monkeypatch):
    repeater = Repeater()
    monkeypatch.setattr("variant.engine.engine.new_recorder", lambda device: repeater)
    monkeypatch.setattr(Launchers, "can_be_captured", True)  # the double records plain torch too
    model = small_model()
    captured = Engine(model.var, model.vae, backend=backend)
    eager = Engine(model.var, model.vae, backend=backend, capture=False)
    for seed in (1, 2):
        for kv_dtype in (None, "fp8"):
            call = {"labels": [1, 2], "seed": seed, "kv_dtype": kv_dtype, "decode": False}
            ours, expected = captured.generate(**call), eager.generate(**call)
            assert ours.stats.captured
            assert torch.equal(ours.tokens, expected.tokens)
            assert ours.stats.kv_allocated_bytes == expected.stats.kv_allocated_bytes
            assert ours.stats.kv_peak_bytes == expected.stats.kv_peak_bytes
    assert repeater.recorded == 2


def test_allocated_bytes_are_the_plan_values_and_scales():
    golden, engine = golden_engine("plain", dtype=torch.bfloat16, kv_dtype="fp8")
    config = golden.var_config
    for depth in (None, 3):
        stats = engine.generate([1, 2], depth=depth, seed=0, decode=False).stats
        plan = CachePlan(engine.var.layout, engine.var.schedule(depth), 16)
        # Two images with guidance; of each token K and V, a byte per channel and one per head.
        token = config.num_heads * (config.head_dim + 1)
        assert stats.kv_allocated_bytes == 4 * plan.peak_page_tokens * 2 * token
        assert stats.kv_allocated_bytes == stats.kv_planned_bytes == stats.kv_peak_bytes
        assert stats.kv_paper_bytes == plan.paper_bytes(
            2, config.num_heads, config.head_dim, k_bytes=2, v_bytes=2
        )


def test_more_images_fit_into_free_memory(monkeypatch):
    # One backend for both: what attention gathers is then the same.
    _, engine = golden_engine("plain", backend="reference")
    plan = CachePlan(engine.var.layout, engine.var.schedule(None), 16)
    one, always = engine.image_bytes(plan, kv_dtype="fp8"), engine.decoder_bytes()
    exact = engine.image_bytes(plan)
    config = engine.var.config
    assert exact - one == 2 * plan.peak_page_tokens * 2 * config.num_heads * (
        3 * config.head_dim - 1
    )
    monkeypatch.setattr("variant.engine.engine.free_bytes", lambda device: 2 * one + always)
    labels = [0, 1]
    assert engine.generate(labels, seed=1, kv_dtype="fp8", decode=False).stats.batches == 1
    assert engine.generate(labels, seed=1, decode=False).stats.batches == 2


@pytest.mark.parametrize("wrong", ["fp16", "float8_e4m3fn", torch.bfloat16, 8, False])
def test_other_kv_dtypes_raise(wrong):
    golden, engine = golden_engine("plain")
    with pytest.raises(ValueError, match=r"Engine: kv_dtype must be None .* got"):
        Engine(engine.var, engine.vae, kv_dtype=wrong)
    with pytest.raises(ValueError, match="generate: kv_dtype must be"):
        engine.generate(0, kv_dtype=wrong)
    with pytest.raises(ValueError, match="forced_logits: kv_dtype must be"):
        engine.forced_logits(golden.tensors["label"], golden.tensors["tokens_in"], kv_dtype=wrong)


def test_a_backend_without_8_bit_support_raises_at_construction():
    _, engine = golden_engine("plain")
    with pytest.raises(ValueError, match=r'backend "(flash|flex)" cannot run this call'):
        Engine(engine.var, engine.vae, backend="flash", kv_dtype="fp8")
