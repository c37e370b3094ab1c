"""The engine: equal to outputs of the original VAR code, and consistent with itself."""

import copy
import pickle

import pytest
import torch
from golden_models import NAMES, golden_engine, golden_models, load_golden
from small_models import small_model

from variant.engine.engine import Engine
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


def test_thread_count_changes_nothing():
    _, engine = golden_engine("plain", backend="cpu")
    two = engine.generate([1, 2, 3], seed=5).tokens
    torch.set_num_threads(1)
    try:
        assert torch.equal(engine.generate([1, 2, 3], seed=5).tokens, two)
    finally:
        torch.set_num_threads(2)


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
    ("arguments", "message"),
    [
        ({"labels": [10]}, r"labels must be in \[0, 10\); got 10"),
        ({"labels": []}, "labels must be one or more integers"),
        ({"labels": [0.5]}, "labels must be integers; got float32"),
        ({"labels": None}, "labels must be integers; got None"),
        ({"labels": [True]}, "labels must be integers; got bool"),
        ({"labels": 0, "bridge": 99}, r"bridge must be an integer in \[0, 7\]; got 99"),
        ({"labels": 0, "bridge": "x"}, r"bridge must be an integer in \[0, 7\]; got 'x'"),
        (
            {"labels": 0, "depth": 2},
            r"trained at \(3 or 6\); got 2. A list of layers, such as \[0, 5\]",
        ),
        ({"labels": 0, "depth": 2.5}, r"depth must be .*or a list of layers; got 2.5"),
        ({"labels": 0, "depth": [0, 1.7, 5]}, r"a list of layers\[1\] must be an integer; got 1.7"),
        ({"labels": 0, "top_k": 2.5}, "top_k must be an integer >= 0"),
        ({"labels": 0, "seed": 1.5}, "seed must be an integer in"),
        ({"labels": 0, "cfg": 1e39}, r"cfg must be in \[0, 10000\]"),
        ({"labels": 0, "image_ids": [0.7]}, "image_ids must be integers"),
        ({"labels": 0, "depth": 9}, r"depth must be an integer in \[2, 6\] \(a number of layers\)"),
        ({"labels": 0, "depth": 3, "bridge": 8}, r"bridge must be an integer in \[0, 7\]; got 8"),
        ({"labels": 0, "cfg": torch.tensor(1.5)}, r"cfg must be in \[0, 10000\]; got tensor"),
        ({"labels": 0, "cfg": -1.0}, r"cfg must be in \[0, 10000\]; got -1.0"),
        ({"labels": 0, "top_p": 1.5}, r"top_p must be in \[0, 1\]"),
        ({"labels": 0, "seed": -1}, "seed must be an integer in"),
        ({"labels": 0, "max_batch": 0}, "max_batch must be an integer >= 1"),
        ({"labels": 0, "image_ids": [1, 2]}, r"one id per label \(1\); got \(2,\)"),
    ],
)
def test_bad_arguments_raise_with_their_name_and_value(arguments, message):
    _, engine = golden_engine("plain")
    with pytest.raises((TypeError, ValueError), match=message):
        engine.generate(**arguments)


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
    with pytest.raises(ValueError, match='backend "cpu" cannot run this call: dtype float16'):
        Engine(var, vae, backend="cpu", dtype=torch.float16)
    with pytest.raises(ValueError, match="page_size must be at least 1; got 0"):
        Engine(var, vae, page_size=0)


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


def test_float16_runs_on_the_plain_torch_backend():
    golden, engine = golden_engine("plain", dtype=torch.float16)
    logits = engine.forced_logits(golden.tensors["label"], golden.tensors["tokens_in"])
    assert (logits - golden.tensors["logits_full"]).abs().max() < 0.05


def test_models_of_different_layouts_raise():
    plain, other = load_golden("plain"), load_golden("no_l2norm")
    with pytest.raises(ValueError, match="agree on patch_nums"):
        Engine(VAR(plain.var_config), VQVAE(other.vae_config))


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
