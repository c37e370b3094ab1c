"""The engine: equal to outputs of the original VAR code, and consistent with itself."""

import copy
import pickle

import numpy as np
import pytest
import torch
from golden_models import NAMES, golden_engine, golden_models, load_golden
from small_models import small_model

from variant.engine.engine import Engine
from variant.models.config import VQVAEConfig
from variant.models.var import VAR
from variant.models.vqvae import VQVAE
from variant_kernels import CachePlan, use_backend

BACKENDS = ("reference", "cpu")


def depths(golden):
    return {"full": None, "subnet": golden.json["subnet"]["depth"]}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_and_images_equal_the_original(name, backend):
    golden, engine = golden_engine(name, backend=backend)
    for kind, depth in depths(golden).items():
        result = engine.generate(golden.tensors["label"], depth=depth, cfg=4.0, top_k=1)
        assert torch.equal(result.tokens, golden.tensors[f"greedy_tokens_{kind}"])
        expected = golden.tensors[f"greedy_image_{kind}"].float()
        torch.testing.assert_close(result.images, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_sampled_tokens_equal_the_original_with_its_generator(name, backend):
    golden, engine = golden_engine(name, backend=backend)
    for kind, depth in depths(golden).items():
        generator = torch.Generator().manual_seed(7)
        result = engine.generate(
            golden.tensors["label"], depth=depth, cfg=1.5, top_k=40, top_p=0.9, generator=generator
        )
        assert torch.equal(result.tokens, golden.tensors[f"sampled_tokens_{kind}"])


@pytest.mark.parametrize("page_size", [1, 5, 16, 256])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_forced_logits_equal_the_original(name, backend, page_size):
    golden, engine = golden_engine(name, backend=backend, page_size=page_size)
    for kind, depth in depths(golden).items():
        logits = engine.forced_logits(
            golden.tensors["label"], golden.tensors["tokens_in"], depth=depth
        )
        torch.testing.assert_close(logits, golden.tensors[f"logits_{kind}"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_forced_logits_in_bfloat16_are_as_near_as_autocast(name, backend):
    """At most twice the error that the training path makes under bfloat16 autocast."""
    golden, engine = golden_engine(name, backend=backend, dtype=torch.bfloat16)
    label = golden.tensors["label"]
    for kind, depth in depths(golden).items():
        expected = golden.tensors[f"logits_{kind}"]
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            schedule = engine.var.schedule(depth)
            autocast = engine.var(label, golden.tensors["x_teacher"], schedule)
        logits = engine.forced_logits(label, golden.tensors["tokens_in"], depth=depth)
        error, allowed = (x - expected for x in (logits, autocast))
        assert error.square().mean().sqrt() <= 2 * allowed.square().mean().sqrt()
        assert error.abs().max() <= 2 * allowed.abs().max()
        assert not torch.equal(logits, expected)


def test_allocated_bytes_are_the_plan_and_never_more():
    golden, engine = golden_engine("plain")
    config = golden.var_config
    for depth in (None, 3, [0, 5], [0, 2, 5]):
        stats = engine.generate([1, 2], depth=depth, seed=0).stats
        plan = CachePlan(engine.var.layout, engine.var.schedule(depth), 16)
        planned = plan.peak_bytes(2, config.num_heads, config.head_dim, "float32")
        assert stats.kv_allocated_bytes == stats.kv_planned_bytes == planned
        assert stats.kv_peak_bytes == planned
        assert planned < stats.kv_paper_bytes


def test_same_seed_and_image_id_give_the_same_image_in_any_batch():
    _, engine = golden_engine("plain")
    labels = torch.tensor([3, 1, 4, 1, 5])
    whole = engine.generate(labels, seed=11, top_p=0.9)
    split = engine.generate(labels, seed=11, top_p=0.9, max_batch=2)
    assert split.stats.batches == 3
    assert torch.equal(whole.tokens, split.tokens)
    alone = engine.generate(int(labels[3]), seed=11, top_p=0.9, image_ids=[3])
    assert torch.equal(whole.tokens[3:4], alone.tokens)
    assert not torch.equal(whole.tokens[1], whole.tokens[3])
    assert not torch.equal(whole.tokens, engine.generate(labels, seed=12, top_p=0.9).tokens)


def test_thread_count_changes_nothing(two_threads):
    _, engine = golden_engine("plain", backend="cpu")
    two = engine.generate([1, 2, 3], seed=5).tokens
    torch.set_num_threads(1)
    assert torch.equal(engine.generate([1, 2, 3], seed=5).tokens, two)


def test_switching_between_scales_equals_the_schedule_given_at_once():
    golden, engine = golden_engine("plain")
    label = golden.tensors["label"]
    planned = engine.generate(label, depth=3, bridge=4, seed=3)
    switched = engine.generate(
        label, bridge=2, seed=3, on_scale=lambda k, partial: 3 if k == 3 else None
    )
    assert torch.equal(planned.tokens, switched.tokens)
    assert switched.stats.depths == (6, 6, 6, 6, 3, 3, 3)
    early = engine.generate(label, bridge=4, seed=3, on_scale=lambda k, partial: 3)
    assert torch.equal(planned.tokens, early.tokens)
    # The slab was planned for full depth; in use was less, because pages were freed early.
    assert switched.stats.kv_peak_bytes < switched.stats.kv_planned_bytes
    with pytest.raises(ValueError, match="subset"):
        engine.generate(
            label, depth=[0, 5], bridge=4, on_scale=lambda k, partial: 3 if k == 5 else None
        )


@pytest.mark.parametrize(
    ("depth", "error", "message"),
    [
        (
            6,
            ValueError,
            r"depth can only fall within an image.*\[0, 3, 5\]; got \[0, 1, 2, 3, 4, 5",
        ),
        (
            [0, 4, 5],
            ValueError,
            r"can only fall.* to run at scale 5, \[0, 3, 5\]; got \[0, 4",
        ),
        (4, ValueError, r"one that the model was trained at \(3 or 6\); got 4"),
        (9, ValueError, "depth must be an integer in"),
        ("3", TypeError, "depth must be an integer in"),
    ],
)
def test_a_depth_that_cannot_follow_raises(depth, error, message):
    _, engine = golden_engine("plain")
    with pytest.raises(error, match=f"^generate: on_scale after scale 4: .*{message}"):
        engine.generate(1, depth=3, bridge=4, on_scale=lambda k, partial: depth if k == 4 else None)
    with pytest.raises(ValueError, match=r"can only fall .* at scale 4, \[0, 5\]; got \[0, 3"):
        engine.generate(1, depth=[0, 5], bridge=4, on_scale=lambda k, p: 3 if k == 1 else None)
    # The engine stays usable, and a depth after the last scale asks for nothing.
    result = engine.generate(1, seed=0, depth=3, on_scale=lambda k, p: 6 if k == 6 else None)
    assert torch.equal(result.tokens, engine.generate(1, seed=0, depth=3).tokens)


def test_a_postponed_depth_is_in_the_stats():
    _, engine = golden_engine("plain")

    def stats(bridge, **depths):
        return engine.generate(
            1, bridge=bridge, on_scale=lambda k, partial: depths.get(f"after_{k}")
        ).stats

    early = stats(4, after_1=3)
    assert (early.depths, early.postponed) == ((6, 6, 6, 6, 3, 3, 3), (1,))
    assert stats(4, after_4=3).depths == (6, 6, 6, 6, 6, 3, 3)  # not the scale that has run
    assert stats(4, after_0=3, after_1=3, after_2=3).postponed == (0,)
    for on_time in (stats(4, after_3=3), stats(2, after_1=3), stats(4, after_1=6)):
        assert on_time.postponed == ()
    assert engine.generate(1).stats.postponed == ()


def test_partial_results_grow_and_decode():
    _, engine = golden_engine("no_l2norm")
    seen = []

    def watch(k, partial):
        seen.append((k, partial.tokens.shape, partial.images().shape))

    result = engine.generate([0, 1], seed=0, on_scale=watch)
    shape = tuple(result.images.shape)
    assert seen == [(k, (2, n), shape) for k, n in enumerate((1, 5, 21, 70))]


def test_zero_guidance_runs_no_unconditional_half_and_changes_nothing():
    golden, engine = golden_engine("plain")
    label = golden.tensors["label"]
    plain = engine.generate(label, cfg=0.0, top_k=1)
    forced = engine.forced_logits(label, plain.tokens)
    assert torch.equal(forced.argmax(-1), plain.tokens)
    guided = engine.generate(label, cfg=1.0, top_k=1).stats
    assert plain.stats.kv_allocated_bytes * 2 == guided.kv_allocated_bytes


def test_weights_changed_in_place_are_cast_again():
    golden, engine = golden_engine("plain", dtype=torch.bfloat16)
    before = engine.forced_logits(golden.tensors["label"], golden.tensors["tokens_in"])
    weight = engine.var.blocks[0].ffn.fc1.weight
    with torch.no_grad():
        weight.mul_(2)
    after = engine.forced_logits(golden.tensors["label"], golden.tensors["tokens_in"])
    assert not torch.equal(before, after)
    with torch.no_grad():
        weight.mul_(0.5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"labels": [11]}, ValueError, r"labels must be in \[0, 10\), or -1 or 10 for .*; got 11"),
        ({"labels": [0, -2]}, ValueError, r"labels must be in \[0, 10\), .*; got -2"),
        ({"labels": []}, ValueError, "labels must be one or more integers"),
        ({"labels": [0.5]}, TypeError, "labels must be integers; got float32"),
        ({"labels": None}, TypeError, "labels must be integers of 64 bits; got None"),
        ({"labels": 2**70}, TypeError, f"labels must be integers of 64 bits; got {2**70}"),
        ({"labels": [1j]}, TypeError, "labels must be integers; got complex64"),
        ({"labels": [True]}, TypeError, "labels must be integers; got bool"),
        ({"labels": [2, True]}, TypeError, "labels must be integers; got bool"),
        ({"labels": np.array([2, np.True_], object)}, TypeError, "must be integers; got bool"),
        ({"labels": bytearray(b"12")}, TypeError, "labels must be integers; got bytearray"),
        ({"labels": np.ma.array([1, 2], mask=[0, 1])}, TypeError, "integers; got masked values"),
        ({"bridge": 99}, ValueError, r"bridge must be an integer in \[0, 7\]; got 99"),
        ({"bridge": "x"}, TypeError, r"bridge must be an integer in \[0, 7\]; got 'x'"),
        ({"depth": 3, "bridge": 8}, ValueError, r"bridge must be an integer in \[0, 7\]; got 8"),
        (
            {"depth": 2},
            ValueError,
            r"trained at \(3 or 6\); got 2. A list of layers, such as \[0, 5\]",
        ),
        (
            {"depth": 2.5},
            TypeError,
            "depth must be an integer .*or a list of layers; got 2.5",
        ),
        ({"depth": [0, 1.7, 5]}, TypeError, r"depth\[1\] must be an integer; got 1.7"),
        (
            {"depth": [0, 3]},
            ValueError,
            r"depth, a list of layers, must start .* end with 5; got \[0, 3\]",
        ),
        ({"depth": 9}, ValueError, r"depth must be an integer in \[2, 6\] .*; got 9"),
        ({"depth": True}, TypeError, "depth must be an integer"),
        ({"depth": [[0, 5]]}, TypeError, r"depth\[0\] must be an integer"),
        ({"top_k": 2.5}, TypeError, r"top_k must be an integer in .* \(0 keeps all\); got 2.5"),
        ({"top_k": True}, TypeError, "top_k must be an integer"),
        ({"top_k": -1}, ValueError, "top_k must be an integer .*; got -1"),
        ({"top_p": 1.5}, ValueError, r"top_p must be a finite number in \[0, 1\]"),
        ({"top_p": float("nan")}, ValueError, r"top_p must be a finite number in \[0, 1\]"),
        ({"top_p": None}, TypeError, r"top_p must be a finite number in \[0, 1\]"),
        ({"seed": 1.5}, TypeError, "seed must be an integer in"),
        ({"seed": -1}, ValueError, "seed must be an integer in"),
        ({"seed": 2**63}, ValueError, "seed must be an integer in"),
        ({"cfg": 1e39}, ValueError, r"cfg must be a finite number in \[0, 10000\]"),
        ({"cfg": -1.0}, ValueError, r"cfg must be a finite number in \[0, 10000\]; got -1.0"),
        ({"cfg": "1.5"}, TypeError, "cfg must be a finite number"),
        ({"cfg": [1.0, 2.0]}, ValueError, r"cfg must be .* per scale \(7\); got a list of 2"),
        ({"cfg": []}, ValueError, "cfg must be one number, or one per scale; got an empty list"),
        ({"cfg": [1.0] * 6 + [-2]}, ValueError, r"cfg\[6\] must be a finite number"),
        ({"cfg": torch.ones(2, 2)}, TypeError, r"cfg\[0\] must be a finite number"),
        ({"temperature": 0}, ValueError, r"temperature must be .* in \[0.0001, 10000\] \(top_k=1"),
        (
            {"temperature": [1.0] * 8},
            ValueError,
            r"temperature must be one number, .*\(7\); got a list of 8",
        ),
        ({"more_smooth": "yes"}, TypeError, "more_smooth must be True or False; got 'yes'"),
        ({"more_smooth": 1}, TypeError, "more_smooth must be True or False; got 1"),
        ({"log_probs": None}, TypeError, "log_probs must be True or False; got None"),
        ({"decode": "no"}, TypeError, "decode must be True or False; got 'no'"),
        ({"log_probs": True, "more_smooth": True}, ValueError, "log_probs and more_smooth exclude"),
        ({"max_batch": 0}, ValueError, "max_batch must be an integer >= 1; got 0"),
        ({"image_ids": [0.7]}, TypeError, "image_ids must be integers"),
        ({"image_ids": [1, 2]}, ValueError, r"one id per label \(1\); got shape \(2,\)"),
        ({"generator": 7}, TypeError, "generator must be of type Generator; got 7"),
        ({"on_scale": 7}, TypeError, r"on_scale must be a function of \(scale, partial\); got int"),
        ({"kv_dtype": "fp4"}, ValueError, "kv_dtype must be None"),
        ({"depht": 2}, TypeError, "got an unexpected argument 'depht'"),
    ],
)
def test_bad_arguments_raise_with_their_name_and_value(arguments, error, message):
    _, engine = golden_engine("plain")
    with pytest.raises(error, match=f"^generate: .*{message}") as caught:
        engine.generate(**{"labels": 0, **arguments})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [np.int64, np.uint8, torch.tensor, np.array])
def test_integers_of_numpy_and_torch_are_taken(kind):
    _golden, engine = golden_engine("plain")
    plain = {"labels": 3, "depth": 3, "bridge": 4, "top_k": 40, "seed": 7, "max_batch": 2}
    expected = engine.generate(**plain).tokens
    assert torch.equal(engine.generate(**{n: kind(v) for n, v in plain.items()}).tokens, expected)
    layers = kind([0, 3, 5]) if kind in (torch.tensor, np.array) else [kind(v) for v in (0, 3, 5)]
    assert torch.equal(engine.generate(**{**plain, "depth": layers}).tokens, expected)


@pytest.mark.parametrize("kind", [np.float32, np.float64, torch.tensor, np.array, str])
def test_numbers_of_numpy_and_torch_are_taken(kind):
    _, engine = golden_engine("plain")
    plain = {"cfg": 2.5, "top_p": 0.5, "temperature": 0.75}
    given = {name: kind(value) for name, value in plain.items()}
    if kind is str:
        with pytest.raises(TypeError):
            engine.generate(1, seed=0, **given)
        return
    expected = engine.generate(1, seed=0, **plain).tokens
    assert torch.equal(engine.generate(1, seed=0, **given).tokens, expected)
    scales = {"cfg": [2.5] * 7, "temperature": [0.75] * 7}
    given = {
        n: kind(v) if kind in (torch.tensor, np.array) else [kind(x) for x in v]
        for n, v in scales.items()
    }
    expected = engine.generate(1, seed=0, **scales).tokens
    assert torch.equal(engine.generate(1, seed=0, **given).tokens, expected)


def test_no_tokens_decode_to_no_images():
    golden, engine = golden_engine("plain")
    tokens = golden.tensors["tokens_in"]
    images = engine.decode(tokens)
    nothing = engine.decode(tokens[:0])
    assert (nothing.shape, nothing.dtype) == ((0, *images.shape[1:]), images.dtype)
    with pytest.raises(TypeError, match="decode: tokens_BL must be integers; got float32"):
        engine.decode(tokens.float())
    with pytest.raises(ValueError, match=r"decode: tokens_BL must be \(B, 155\); got \(\)"):
        engine.decode(5)


def test_seed_and_generator_exclude_each_other():
    _, engine = golden_engine("plain")
    with pytest.raises(ValueError, match="exclude each other"):
        engine.generate(0, seed=1, generator=torch.Generator())


def test_too_little_memory_raises_one_line(monkeypatch):
    _, engine = golden_engine("plain")
    monkeypatch.setattr("variant.engine.engine.free_bytes", lambda device: 1000)
    with pytest.raises(MemoryError, match=r"MiB, but 0 MiB are free; use a smaller depth"):
        engine.generate(0)


def test_a_request_is_split_by_free_memory(monkeypatch):
    _, engine = golden_engine("plain")
    one = engine.image_bytes(CachePlan(engine.var.layout, engine.var.schedule(None), 16))
    always = engine.decoder_bytes()
    whole = engine.generate([0, 1, 2, 3, 4], seed=1)
    monkeypatch.setattr("variant.engine.engine.free_bytes", lambda device: 2 * one + always + 5)
    split = engine.generate([0, 1, 2, 3, 4], seed=1)
    assert split.stats.batches == 3
    assert torch.equal(whole.tokens, split.tokens)


def test_results_are_ordinary_tensors():
    _, engine = golden_engine("no_l2norm")
    result = engine.generate([0, 1], seed=0)
    weight = torch.ones(1, requires_grad=True)
    (result.images.mul_(2) * weight).sum().backward()
    assert weight.grad is not None


def test_a_callback_that_uses_the_engine_does_not_change_the_generation():
    _, engine = golden_engine("no_l2norm")
    expected = engine.generate([0, 1], seed=0).tokens

    def meddle(k, partial):
        with use_backend("reference"):
            engine.generate([2], seed=5)

    assert torch.equal(engine.generate([0, 1], seed=0, on_scale=meddle).tokens, expected)


def test_forced_logits_checks_its_tokens():
    golden, engine = golden_engine("plain")
    label, tokens = golden.tensors["label"], golden.tensors["tokens_in"]
    with pytest.raises(ValueError, match=r"tokens_BL must be \(3, 155\); got \(3, 154\)"):
        engine.forced_logits(label, tokens[:, 1:])
    with pytest.raises(ValueError, match=r"tokens_BL must be in \[0, 256\); got 256"):
        engine.forced_logits(label, tokens.clamp_min(256))
    with pytest.raises(ValueError, match="forced_logits: labels must be in"):
        engine.forced_logits(label + 99, tokens)


def test_unsupported_backends_dtypes_and_page_sizes_raise_at_construction():
    _golden, var, vae = golden_models("plain")
    with pytest.raises(ValueError, match='backend "nope" is unknown'):
        Engine(var, vae, backend="nope")
    with pytest.raises(ValueError, match='backend "flash" cannot run this call: it does not impl'):
        Engine(var, vae, backend="flash", dtype=torch.float16)
    with pytest.raises(ValueError, match="page_size must be an integer >= 1; got 0"):
        Engine(var, vae, page_size=0)
    with pytest.raises(TypeError, match=r"Engine: backend must be .*; got ndarray"):
        Engine(var, vae, backend=np.array([1, 2]))
    for name in ("capture", "pack"):
        with pytest.raises(TypeError, match=f"Engine: {name} must be True or False"):
            Engine(var, vae, **{name: 2**64})


def test_weights_of_a_dtype_without_an_engine_are_named():
    model = small_model()
    model.var.double()
    with pytest.raises(
        ValueError, match=r"the weights are float64, in which no engine .* float32,"
    ):
        model.generate(1, seed=0)
    assert model.generate(1, seed=0, dtype="float32").stats.dtype == "float32"


@pytest.mark.parametrize("part", ["var.blocks.1.attn.proj", "vae.decoder.conv_in"])
def test_weights_without_values_are_named(part):
    _golden, var, vae = golden_models("plain")
    torch.nn.ModuleDict({"var": var, "vae": vae}).get_submodule(part).to("meta")
    with pytest.raises(ValueError, match=rf'^Engine: .* {part}\.weight is on "meta"'):
        Engine(var, vae)


@pytest.mark.parametrize("part", ["var", "vae", "vae.quantize"])
def test_weights_that_lose_their_values_are_named(part):
    model = small_model()
    model.generate([1], seed=3)
    model.get_submodule(part).to("meta")
    with pytest.raises(ValueError, match=rf'^Engine: .*; {part}\..* is on "meta"'):
        model.generate([1], seed=3)


def test_a_used_engine_does_not_need_the_values_of_the_encoder():
    model = small_model()
    before = model.generate([1], seed=3)
    model.vae.encoder.to("meta")
    assert torch.equal(model.generate([1], seed=3).images, before.images)
    assert torch.equal(Engine(model.var, model.vae).generate([1], seed=3).images, before.images)


def test_a_used_model_can_be_pickled_and_copied():
    model = small_model()
    before = model.generate([1], seed=3)
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(again.generate([1], seed=3).tokens, before.tokens)


def test_refresh_casts_weights_that_were_changed_through_data():
    model = small_model()
    engine = Engine(model.var, model.vae, dtype=torch.bfloat16)
    labels, tokens = torch.tensor([1]), torch.zeros(1, 14, dtype=torch.int64)
    before = engine.forced_logits(labels, tokens)
    model.var.head.weight.data.mul_(2)
    engine.refresh()
    after = engine.forced_logits(labels, tokens)
    assert not torch.equal(before, after)
    assert torch.equal(
        after, Engine(model.var, model.vae, dtype=torch.bfloat16).forced_logits(labels, tokens)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_float16_keeps_k_and_v_in_it(backend):
    golden, engine = golden_engine("plain", dtype=torch.float16, backend=backend)
    assert set(engine._launchers(None).names.values()) == {backend}
    assert engine.product_dtype == torch.float32
    logits = engine.forced_logits(golden.tensors["label"], golden.tensors["tokens_in"])
    assert (logits - golden.tensors["logits_full"]).abs().max() < 0.05


def test_models_of_different_layouts_raise():
    plain, other = load_golden("plain"), load_golden("no_l2norm")
    with pytest.raises(ValueError, match="agree on patch_nums"):
        Engine(VAR(plain.var_config), VQVAE(other.vae_config))


def test_a_later_model_that_does_not_fit_is_refused():
    """A larger codebook would give images of other codes without a word."""
    model = small_model()
    engine = Engine(model.var, model.vae)
    engine.generate([1], seed=0)
    engine.vae = VQVAE(VQVAEConfig.from_dict({**model.vae.config.to_dict(), "vocab_size": 48}))
    with pytest.raises(ValueError, match="agree on vocab_size; got 24 and 48"):
        engine.generate([1], seed=0)


def test_replaced_layers_modules_and_weights_are_cast_again():
    model = small_model()
    var = model.var
    engine = Engine(var, model.vae)
    label, tokens = torch.tensor([1]), torch.zeros(1, var.layout.total, dtype=torch.int64)

    def layer():
        var.blocks[1] = copy.deepcopy(var.blocks[2])

    def weight():
        var.head.weight = torch.nn.Parameter(2 * var.head.weight)

    def module():
        other = copy.deepcopy(var.head_nm)
        with torch.no_grad():
            other.ada_lin[1].bias.add_(1)
        var.head_nm = other

    def whole():
        engine.var = var = small_model().var
        with torch.no_grad():
            var.head.bias.add_(torch.arange(len(var.head.bias)))

    for replace in (layer, weight, module, whole):
        before = engine.forced_logits(label, tokens)
        replace()
        after = engine.forced_logits(label, tokens)
        assert not torch.equal(before, after), replace.__name__
        assert torch.equal(after, Engine(engine.var, model.vae).forced_logits(label, tokens))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda var: var.blocks.pop(1), ValueError, "blocks must have 4 layers, .* got 3"),
        (
            lambda var: var.blocks.append(copy.deepcopy(var.blocks[0])),
            ValueError,
            "must have 4 layers, .* got 5",
        ),
        (
            lambda var: var.blocks.__setitem__(1, torch.nn.Identity()),
            TypeError,
            r"blocks\[1\] must be of type Block; got Identity",
        ),
        (lambda var: delattr(var.blocks[2], "attn"), TypeError, r"blocks\[2\].attn must be of"),
        (
            lambda var: setattr(var.blocks[2], "ffn", torch.nn.Identity()),
            TypeError,
            r"blocks\[2\].ffn must be of type MLP; got Identity",
        ),
    ],
)
@pytest.mark.parametrize("used", [False, True])
def test_layers_that_were_removed_or_replaced_are_named(change, error, message, used, tmp_path):
    model = small_model()
    if used:
        model.generate([1], seed=0)
    change(model.var)
    with pytest.raises(error, match=message):
        model.generate([1], seed=0)
    with pytest.raises(error, match=message):
        model.save_pretrained(tmp_path / "m")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("options", [{}, {"pack": False}, {"dtype": torch.bfloat16}])
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_around_a_call_changes_nothing(backend, options):
    model = small_model()
    engine = Engine(model.var, model.vae, backend=backend, **options)
    label = torch.tensor([1, 2])

    def results():
        generation = engine.generate(label, seed=3)
        return (
            generation.tokens,
            generation.images,
            engine.decode(generation.tokens),
            engine.forced_logits(label, generation.tokens),
        )

    expected = results()
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = results()
    assert all(torch.equal(a, b) for a, b in zip(under_autocast, expected, strict=True))
