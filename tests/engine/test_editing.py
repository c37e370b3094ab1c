"""Smooth mixtures, the null class and given tokens: equal to outputs of the original VAR code."""

import copy
import json
import weakref

import numpy as np
import pytest
import torch
from golden_models import NAMES, golden_engine
from safetensors.torch import load_file
from small_models import small_model
from test_cuda_graphs import Repeater
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.golden_weights import FOLDER
from variant.engine.arguments import keep_by_map
from variant.engine.drawing import Drawer, extra_logit_bytes, gumbel_noise
from variant.engine.engine import Engine
from variant.engine.generation import Sampling
from variant_kernels import CachePlan, ScaleLayout
from variant_kernels.dispatch.support import triton_interprets

RECORDED = load_file(FOLDER / "editing.safetensors")
CASES = json.loads((FOLDER / "editing.json").read_text())["cases"]
BACKENDS = ("reference", "cpu")


def run(golden, engine, name, case, **changes):
    """The result of a recorded case, and its mask of kept tokens (B, L)."""
    described, label = CASES[case], golden.tensors["label"]
    labels = label if described["labels"] == "label" else torch.full_like(label, -1)
    arguments, keep_BL = {}, torch.zeros(len(label), engine.var.layout.total, dtype=torch.bool)
    if described["mask"] is not None:
        mask = RECORDED[f"{name}.{described['mask']}"]
        arguments = {"tokens": golden.tensors["tokens_in"], "mask": mask}
        keep_BL |= keep_by_map(mask.view(-1, *mask.shape[-2:]).float(), engine.var.layout)
    arguments |= {**described["arguments"], **changes}
    generator = torch.Generator().manual_seed(described["seed"])
    return engine.generate(labels, generator=generator, **arguments), keep_BL


def check(name, case, result, golden, keep_BL):
    drawn, given = RECORDED[f"{name}.{case}.drawn"].long(), golden.tensors["tokens_in"]
    assert torch.equal(result.tokens, torch.where(keep_BL, given, drawn))
    pixels = result.images[..., 3::8, 5::8]
    # A smooth image mixes codes by softmax(logits / temperature), which magnifies the rounding of
    # the products: without AVX-512 (ONEDNN_MAX_CPU_ISA=AVX2) 1.8e-4 of [0, 1].
    atol = 3e-4 if "smooth" in case else 1e-4
    torch.testing.assert_close(pixels, RECORDED[f"{name}.{case}.pixels"], atol=atol, rtol=0)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_tokens_and_images_equal_the_original(name, backend, case):
    golden, engine = golden_engine(name, backend=backend)
    result, keep_BL = run(golden, engine, name, case)
    check(name, case, result, golden, keep_BL)


@pytest.mark.nightly  # test_engine_in_triton.py compares tokens with the original in CI
@pytest.mark.skipif(not triton_interprets(), reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("case", ["null", "edit_smooth"])
def test_tokens_and_images_equal_the_original_in_triton(case):
    golden, engine = golden_engine("no_l2norm", backend="triton")
    result, keep_BL = run(golden, engine, "no_l2norm", case)
    check("no_l2norm", case, result, golden, keep_BL)


# --- masks --------------------------------------------------------------------------------------

LABELS = [1, 2, 0]


@pytest.fixture(scope="module")
def model():
    return small_model()  # 14 tokens: 1 + 4 + 9


@pytest.fixture(scope="module")
def given():
    return torch.randint(24, (3, 14), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_kept_tokens_stay_and_the_images_are_those_of_the_result(model, given, backend, dtype):
    engine = Engine(model.var, model.vae, backend=backend, dtype=dtype)
    mask = torch.rand(3, 14, generator=torch.Generator().manual_seed(1)) < 0.5
    free = engine.generate(LABELS, seed=3)
    result = engine.generate(LABELS, seed=3, tokens=given, mask=mask)
    assert torch.equal(result.tokens[mask], given[mask])
    assert not torch.equal(result.tokens[~mask], given[~mask])
    torch.testing.assert_close(engine.decode(result.tokens), result.images, atol=1e-6, rtol=0)
    nothing = engine.generate(LABELS, seed=3, tokens=given, mask=torch.zeros(14))
    assert torch.equal(nothing.tokens, free.tokens)
    assert torch.equal(nothing.images, free.images)
    for more_smooth in (False, True):
        everything = engine.generate(
            LABELS, seed=3, tokens=given, mask=torch.ones(14), more_smooth=more_smooth
        )
        assert torch.equal(everything.tokens, given)
        torch.testing.assert_close(engine.decode(given), everything.images, atol=1e-6, rtol=0)


def test_given_tokens_are_split_with_their_batches(model, given):
    mask = torch.arange(42).view(3, 14) % 3 == 0
    arguments = {"seed": 3, "tokens": given, "mask": mask}
    whole = model.generate(LABELS, **arguments)
    batches = list(model.generate_batches(LABELS, max_batch=2, **arguments))
    assert torch.equal(torch.cat([batch.tokens for batch in batches]), whole.tokens)
    seen = []
    model.generate(
        LABELS, on_scale=lambda k, partial: seen.append(partial.tokens), max_batch=3, **arguments
    )
    assert torch.equal(seen[1], whole.tokens[:, :5])


def test_tokens_may_come_by_scale_as_the_original_gives_them(model, given):
    tokens, layout = given, model.var.layout
    parts = [tokens[:, layout.slice(k)] for k in range(layout.num_scales)]
    mask = torch.zeros(4, 4)
    mask[:2] = 1
    expected = model.generate(LABELS, tokens=tokens, mask=mask, seed=0).tokens
    assert torch.equal(model.generate(LABELS, tokens=parts, mask=mask, seed=0).tokens, expected)
    for wrong in (parts[1:], parts[::-1], [*parts[:-1], parts[-1][:1]]):
        with pytest.raises(ValueError, match=r"tokens by scale must be one \(B, T\) tensor per"):
            model.generate(LABELS, tokens=wrong, mask=mask, seed=0)


def test_one_image_may_be_given_for_all(model, given):
    mask = torch.arange(14) < 5
    for tokens in (given[0], given[:1], given[0].tolist(), given[0].numpy().astype(np.int32)):
        result = model.generate(LABELS, seed=3, tokens=tokens, mask=mask)
        assert torch.equal(result.tokens[:, :5], given[:1, :5].expand(3, -1))
        assert len(result.tokens[:, 5:].unique(dim=0)) == 3


@pytest.mark.parametrize(
    "form",
    [
        lambda m: m,
        lambda m: m.int(),
        lambda m: m.half(),
        lambda m: m.numpy(),
        lambda m: m.tolist(),
        lambda m: m.expand(3, *m.shape),
        lambda m: m.expand(1, *m.shape),
    ],
    ids=["bool", "int", "half", "numpy", "list", "batch", "one"],
)
def test_masks_of_tokens_and_maps_in_every_form(model, given, form):
    for mask in (torch.arange(14) % 2 == 0, torch.arange(36).view(6, 6) < 18):
        expected = model.generate(LABELS, seed=3, tokens=given, mask=mask).tokens
        result = model.generate(LABELS, seed=3, tokens=given, mask=form(mask))
        assert torch.equal(result.tokens, expected)
        assert not torch.equal(expected, given)


def test_a_map_is_resized_to_every_scale():
    layout = ScaleLayout.from_patch_nums((1, 2, 4))
    (keep_L,) = keep_by_map(torch.tensor([[[1.0, 0.0], [0.0, 0.0]]]), layout)
    assert keep_L[:1].tolist() == [True]  # coarse scales stay
    assert keep_L[1:5].tolist() == [True, False, False, False]
    assert keep_L[5:].view(4, 4).int().tolist() == [
        [1, 1, 0, 0],
        [1, 1, 0, 0],
        [0, 0, 0, 0],
        [0, 0, 0, 0],
    ]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"mask": None}, ValueError, "tokens and mask go together .*; got tokens only"),
        ({"tokens": None}, ValueError, "tokens and mask go together .*; got mask only"),
        (
            {"tokens": torch.zeros(2, 14).long()},
            ValueError,
            r"tokens must be \(3, 14\); got \(2, 14",
        ),
        (
            {"tokens": torch.zeros(3, 9).long()},
            ValueError,
            r"tokens must be \(3, 14\); got \(3, 9\)",
        ),
        ({"tokens": torch.zeros(3, 14)}, TypeError, "tokens must be integers; got float32"),
        ({"tokens": torch.full((3, 14), 24)}, ValueError, r"tokens must be in \[0, 24\); got 24"),
        ({"mask": torch.ones(2, 14)}, ValueError, r"mask must be of tokens, .*; got \(2, 14\)"),
        ({"mask": torch.ones(13)}, ValueError, r"mask must be of tokens, .*; got \(13,\)"),
        (
            {"mask": torch.ones(2, 6, 6)},
            ValueError,
            r"mask must be .* or a map, .*; got \(2, 6, 6\)",
        ),
        ({"mask": torch.ones(0, 6)}, ValueError, r"mask must be .* or a map, .*; got \(0, 6\)"),
        ({"mask": True}, ValueError, r"mask must be of tokens, .*; got \(\)"),
        ({"mask": "cat"}, TypeError, "mask must be a tensor or an array; got str"),
        ({"mask": torch.ones(14) * 0.5}, ValueError, r"mask of tokens must be 0 .*; got 0\.5$"),
        ({"mask": torch.ones(6, 6) * 255}, ValueError, r"mask must be in \[0, 1\] .*; got 255$"),
        ({"mask": torch.ones(6, 6) * torch.nan}, ValueError, r"mask must be in .*; got nan$"),
        ({"mask": torch.ones(14) * 1j}, TypeError, "mask must be booleans or numbers"),
    ],
)
def test_wrong_tokens_and_masks_raise(model, given, changes, error, message):
    arguments = {"tokens": given, "mask": torch.ones(14), **changes}
    with pytest.raises(error, match=f"^generate: {message}"):
        model.generate(LABELS, **arguments)


# --- smooth mixtures, temperature, guidance per scale, no class ---------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_smooth_images_do_not_depend_on_the_batch(backend):
    _, engine = golden_engine("plain", backend=backend)
    labels, arguments = [3, 1, 4, 1, 5], {"seed": 11, "top_p": 0.9, "more_smooth": True}
    whole = engine.generate(labels, **arguments)
    split = engine.generate(labels, max_batch=2, **arguments)
    alone = engine.generate(1, image_ids=[3], **arguments)
    assert torch.equal(whole.tokens, split.tokens)
    assert torch.equal(whole.tokens[3:4], alone.tokens)
    # Products of another batch are rounded otherwise, by about 1e-6 of a logit; the mixtures of the
    # last scale multiply logits by 148. Other noise changes images by more than 0.1.
    torch.testing.assert_close(whole.images, split.images, atol=1e-3, rtol=0)
    torch.testing.assert_close(whole.images[3:4], alone.images, atol=1e-3, rtol=0)
    assert (whole.images[1] - whole.images[3]).abs().max() > 0.1
    other = engine.generate(labels, **{**arguments, "seed": 12})
    assert (whole.images - other.images).abs().max() > 0.1
    plain = engine.generate(labels, seed=11, top_p=0.9)
    assert torch.equal(plain.tokens[:, :1], whole.tokens[:, :1])
    assert (whole.images - plain.images).abs().max() > 0.01


def test_smooth_images_in_bfloat16_are_near_those_in_float32():
    golden, exact = golden_engine("no_l2norm")
    _, rounded = golden_engine("no_l2norm", dtype=torch.bfloat16)
    tokens, mask = golden.tensors["tokens_in"], torch.ones(70)
    mask[-49:] = 0  # the last scale is drawn: no error grows from scale to scale
    arguments = {"seed": 0, "more_smooth": True, "tokens": tokens, "mask": mask}
    a, b = (e.generate(golden.tensors["label"], **arguments).images for e in (exact, rounded))
    assert 0 < (a - b).abs().mean() < 0.05


def test_gumbel_noise_is_keyed_and_standard():
    ids = torch.tensor([3, 2**40 + 3, 4])
    noise = gumbel_noise(5, ids, 10, 7, 1001)
    assert (noise.shape, noise.dtype) == ((3, 7, 1001), torch.float32)
    assert torch.equal(gumbel_noise(5, ids[1:2], 12, 3, 1001)[0], noise[1, 2:5])
    assert torch.equal(gumbel_noise(5, ids, 10, 7, 998), noise[..., :998])
    assert len(noise.flatten().unique()) > 0.99 * noise.numel()
    assert not (gumbel_noise(5 + 2**32, ids, 10, 7, 1001) == noise).any(-1).all()
    values = noise.double().flatten()
    # Mean 0.5772, variance pi^2 / 6; 21,021 values: standard errors 0.009 and 0.024.
    assert abs(values.mean() - 0.5772) < 0.04
    assert abs(values.var() - np.pi**2 / 6) < 0.1
    assert abs((values < -np.log(np.log(2))).double().mean() - 0.5) < 0.015


def divided_head(model, temperature):
    """The model with logits divided by the temperature."""
    divided = copy.deepcopy(model)
    with torch.no_grad():
        divided.var.head.weight.div_(temperature)
        divided.var.head.bias.div_(temperature)
    return divided


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [0.5, 4.0])  # powers of two: the quotients are exact
def test_a_temperature_divides_the_logits(model, backend, dtype, temperature):
    engines = [
        Engine(m.var, m.vae, backend=backend, dtype=dtype)
        for m in (model, divided_head(model, temperature))
    ]
    arguments = {"top_k": 9, "top_p": 0.7, "seed": 1}
    ours = engines[0].generate([1] * 20, temperature=temperature, **arguments).tokens
    assert torch.equal(ours, engines[1].generate([1] * 20, **arguments).tokens)
    plain = engines[0].generate([1] * 20, **arguments).tokens
    assert not torch.equal(ours, plain)
    assert torch.equal(engines[0].generate([1] * 20, temperature=1, **arguments).tokens, plain)
    each = engines[0].generate([1] * 20, temperature=[temperature, 1, 1], **arguments).tokens
    assert torch.equal(each[:, :1], ours[:, :1])
    assert not torch.equal(each, ours)


def test_a_temperature_in_float16_divides_the_logits(model):
    arguments = {"dtype": "float16", "seed": 1, "top_k": 9}
    ours = model.generate([1] * 20, temperature=0.5, **arguments).tokens
    assert torch.equal(ours, divided_head(model, 0.5).generate([1] * 20, **arguments).tokens)


@pytest.mark.parametrize("backend", BACKENDS)
def test_guidance_per_scale(model, backend):
    engine = Engine(model.var, model.vae, backend=backend)
    arguments = {"seed": 0, "top_p": 0.9}
    ramp = engine.generate(LABELS, cfg=3.0, **arguments)
    listed = engine.generate(LABELS, cfg=[0.0, 1.5, 3.0], **arguments)
    assert torch.equal(ramp.images, listed.images)
    none = engine.generate(LABELS, cfg=[0, 0, 0], **arguments)
    assert torch.equal(none.images, engine.generate(LABELS, cfg=0, **arguments).images)
    assert none.stats.kv_allocated_bytes * 2 == listed.stats.kv_allocated_bytes
    # Guidance at the first scale, which a single number never gives.
    first = engine.generate(LABELS, cfg=[4.0, 0.0, 0.0], top_k=1)
    labels, tokens = torch.tensor(LABELS), torch.zeros(3, 14, dtype=torch.int64)
    cond, uncond = (
        engine.forced_logits(x, tokens)[:, 0] for x in (labels, torch.full_like(labels, -1))
    )
    assert torch.equal(first.tokens[:, 0], (5 * cond - 4 * uncond).argmax(-1))
    assert not torch.equal(first.tokens[:, 0], cond.argmax(-1))


def test_no_class_is_minus_one_or_the_number_of_classes(model):
    for name in ("generate", "forced_logits"):
        function = getattr(model.engine(), name)
        rest = [torch.zeros(2, 14, dtype=torch.int64)] if name == "forced_logits" else []
        options = {} if rest else {"seed": 0}
        a, b, c = (function(torch.tensor(x), *rest, **options) for x in ([-1, 5], [5, -1], [0, 1]))
        if name == "generate":
            assert a.labels.tolist() == [5, 5]
            a, b, c = a.images, b.images, c.images
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


# --- log-probabilities --------------------------------------------------------------------------


@pytest.mark.parametrize("cfg", [0.0, 2.0, [0.0, 1.0, 0.0]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_log_probs_equal_the_teacher_forced_pass_bit_by_bit(model, backend, dtype, cfg):
    engine = Engine(model.var, model.vae, backend=backend, dtype=dtype)
    arguments = {"cfg": cfg, "depth": 2}
    result = engine.generate(
        LABELS, seed=3, top_k=5, temperature=0.7, log_probs=True, max_batch=2, **arguments
    )
    assert (result.log_probs.shape, result.log_probs.dtype) == ((3, 14), torch.float32)
    plain = engine.generate(LABELS, seed=3, top_k=5, temperature=0.7, max_batch=2, **arguments)
    assert plain.log_probs is None
    assert torch.equal(plain.images, result.images)
    forced = engine.forced_log_probs(result.labels, result.tokens, max_batch=2, **arguments)
    assert torch.equal(forced, result.log_probs)
    logits = torch.cat(
        [
            engine.forced_logits(result.labels[part], result.tokens[part], depth=2)
            for part in (slice(2), slice(2, 3))
        ]
    )
    expected = logits.log_softmax(-1).gather(-1, result.tokens.unsqueeze(-1)).squeeze(-1)
    if cfg == 0:
        assert torch.equal(result.log_probs, expected)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(result.log_probs, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_log_probs_are_those_of_the_training_pass(name):
    golden, engine = golden_engine(name)
    label, tokens = golden.tensors["label"], golden.tensors["tokens_in"]
    expected = golden.tensors["logits_full"].log_softmax(-1)
    expected = expected.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    ours = engine.forced_log_probs(label, tokens)
    torch.testing.assert_close(ours, expected, atol=2e-4, rtol=0)
    # Of an edited image: kept and drawn tokens alike.
    mask = torch.arange(tokens.shape[1]) % 2
    edited = engine.generate(label, seed=0, tokens=tokens, mask=mask, log_probs=True)
    forced = engine.forced_log_probs(label, edited.tokens, cfg=1.5)
    assert torch.equal(edited.log_probs, forced)


@pytest.mark.skipif(not triton_interprets(), reason="needs TRITON_INTERPRET=1")
def test_temperature_and_log_probs_in_triton(model):
    engine = Engine(model.var, model.vae, backend="triton")
    arguments = {"seed": 3, "temperature": [0.5, 1, 2], "log_probs": True, "cfg": [1.0, 0.0, 2.0]}
    result = engine.generate(LABELS, **arguments)
    expected = Engine(model.var, model.vae, backend="cpu").generate(LABELS, **arguments)
    assert torch.equal(result.tokens, expected.tokens)
    forced = engine.forced_log_probs(result.labels, result.tokens, cfg=arguments["cfg"])
    assert torch.equal(forced, result.log_probs)
    torch.testing.assert_close(result.log_probs, expected.log_probs, atol=1e-4, rtol=0)


# --- graphs and memory --------------------------------------------------------------------------


def test_graphs_are_recorded_per_temperature_and_guidance_and_never_for_edits(
    model, given, monkeypatch
):
    recorder = Repeater()
    monkeypatch.setattr("variant.engine.engine.new_recorder", lambda device: recorder)
    captured, eager = Engine(model.var, model.vae), Engine(model.var, model.vae, capture=False)
    edit = {"tokens": given, "mask": torch.arange(14) < 5}
    calls = [
        ({"temperature": 0.5}, True),
        ({"temperature": 2.0}, True),
        ({"temperature": [1.0, 0.5, 2.0]}, True),
        ({"cfg": [3.0, 0.0, 2.0]}, True),
        ({"cfg": [3.0, 0.0, 1.0]}, True),
        ({}, True),
        ({"cfg": 0.5}, True),  # replays the recording of the call before
        ({"more_smooth": True}, False),
        ({"log_probs": True}, False),
        (edit, False),
    ]
    for seed in (0, 1):
        for call, recorded in calls:
            ours = captured.generate(LABELS, seed=seed, decode=False, **call)
            expected = eager.generate(LABELS, seed=seed, decode=False, **call)
            assert torch.equal(ours.tokens, expected.tokens)
            assert ours.stats.captured == recorded
    assert recorder.recorded == 6


def test_the_tensors_of_a_request_count_as_memory(monkeypatch):
    _, engine = golden_engine("plain")
    plan = CachePlan(engine.var.layout, engine.var.schedule(None), 16)
    # The decoder would need more than the logits.
    monkeypatch.setattr("variant.engine.memory._decoded_image_bytes", lambda vae: 0)
    one = engine.image_bytes(plan)
    monkeypatch.setattr("variant.engine.engine.free_bytes", lambda device: 3 * one)
    arguments = {"seed": 0, "decode": False}
    assert engine.generate([1] * 3, **arguments).stats.batches == 1
    assert engine.generate([1] * 3, more_smooth=True, **arguments).stats.batches == 2


class Living(TorchDispatchMode):
    """The largest sum of bytes of the storages made inside, alive at one time."""

    def __init__(self):
        super().__init__()
        self.sizes, self.largest = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.sizes:
                    self.sizes[storage.data_ptr()] = storage.nbytes()
                    weakref.finalize(storage, self.sizes.pop, storage.data_ptr(), None)
        self.largest = max(self.largest, sum(self.sizes.values()))
        return result


def test_living_tensors_are_counted():
    with Living() as living:
        kept = torch.zeros(1000)
        view = kept.view(10, 100)[2:] + 1
        del kept
        torch.cat([view[:2].clone(), view[:0]])
    assert living.largest == 4 * (1000 + 800)


@pytest.mark.parametrize(
    "arguments",
    [{"more_smooth": True}, {"temperature": 0.5}, {"more_smooth": True, "temperature": 0.5}],
)
@pytest.mark.parametrize("log_probs", [False, True])
def test_no_more_memory_than_planned_is_used_for_the_logits(model, arguments, log_probs):
    images, tokens, entries, width = 4, 64, 512, 8
    sampling = Sampling(2.0, 40, 0.9, 0, **arguments)
    drawer = Drawer(
        ScaleLayout.from_patch_nums((1, 8)),
        Engine(model.var, model.vae, backend="cpu")._launchers(None),
        head=torch.nn.Linear(width, entries).requires_grad_(False),
        codes_VE=torch.randn(entries, 4),
        sampling=sampling,
        image_ids_B=torch.arange(images),
        log_probs=log_probs,
    )
    h_RTC = torch.randn(2 * images, tokens, width)
    with Living() as living:
        drawer.draw(h_RTC, 1)
    planned = 2 * (4 + 8) + extra_logit_bytes(sampling, log_probs)
    used = living.largest / (images * tokens * entries)
    assert planned / 4 < used <= planned


@pytest.mark.parametrize("cfg", [1.5, 0, (0, 2, 0)])
@pytest.mark.parametrize(
    "draw",
    [
        {"seed": 0},
        {"seed": 0, "temperature": 0.7},
        {"generator": 1},
        {"generator": 1, "temperature": 2.0},
    ],
)
def test_log_probs_are_of_the_rows_of_the_teacher_forced_pass(model, monkeypatch, draw, cfg):
    # Products of other rows may differ in their last bits, on some processors.
    monkeypatch.setattr("variant.engine.drawing.LOGITS_BYTES", 9 * 24 * 100)
    engine, rows = Engine(model.var, model.vae), []
    head = engine._weights().head

    def recorded(h_RTC):
        rows.append(tuple(h_RTC.shape[:2]))
        return head(h_RTC)

    monkeypatch.setattr(engine._weights(), "head", recorded)
    draw = dict(draw)
    if "generator" in draw:
        draw["generator"] = torch.Generator().manual_seed(1)
    labels = [0, 1, 2, 3, 4]
    result = engine.generate(labels, cfg=cfg, log_probs=True, **draw)
    drawn = rows.copy()
    rows.clear()
    forced = engine.forced_log_probs(labels, result.tokens, cfg=cfg)
    assert rows == drawn
    assert len(rows) > 3  # the head ran in parts
    assert torch.equal(forced, result.log_probs)
    if "generator" in draw:
        draw["generator"].manual_seed(1)
    assert torch.equal(engine.generate(labels, cfg=cfg, **draw).tokens, result.tokens)


ARRAYS = {
    "reversed": lambda array: array[..., ::-1].copy()[..., ::-1],
    "the other byte order": lambda array: array.astype(array.dtype.newbyteorder()),
    "objects": lambda array: array.astype(object),
    "transposed": lambda array: array.T.copy().T,
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("form", [*ARRAYS, "read-only"])
def test_arrays_of_numpy_in_every_memory_order(model, given, form):
    def array(tensor):
        plain = tensor.numpy()
        if form != "read-only":
            return ARRAYS[form](plain)
        plain = plain.copy()
        plain.setflags(write=False)
        return plain

    labels, ids, mask = torch.tensor([1, 2, 0]), torch.arange(3), torch.zeros(6, 8).bool()
    mask[:, 3:] = True
    expected = model.generate(labels, seed=3, image_ids=ids, tokens=given, mask=mask)
    result = model.generate(
        array(labels), seed=3, image_ids=array(ids), tokens=array(given), mask=array(mask)
    )
    assert torch.equal(result.tokens, expected.tokens)


def test_labels_that_no_64_bits_hold_are_refused(model):
    for labels in (np.array([2**64 - 1], np.uint64), torch.tensor([2**64 - 1], dtype=torch.uint64)):
        with pytest.raises(TypeError, match="labels must be integers below 2\\^63; got larger"):
            model.generate(labels)
    small = np.array([1, 2], np.uint64)
    assert torch.equal(model.generate(small, seed=0).tokens, model.generate([1, 2], seed=0).tokens)


def test_a_square_map_as_wide_as_the_tokens_are_many(model, given):
    total = given.shape[1]
    square, wide = torch.zeros(total, total), torch.zeros(2 * total, 2 * total)
    square[:, total // 2 :], wide[:, total:] = 1, 1
    one, other = (
        model.generate(LABELS, seed=3, tokens=given, mask=mask).tokens for mask in (square, wide)
    )
    assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels_B": [99]}, "labels must be in .*; got 99"),
        ({"labels_B": [1, 2]}, r"tokens_BL must be \(2, 14\); got \(1, 14\)"),
        ({"tokens_BL": torch.full((1, 14), 24)}, r"tokens_BL must be in \[0, 24\); got 24"),
        ({"depth": 9}, "depth must be an integer"),
        ({"depth": 2, "bridge": 9}, "bridge must be an integer"),
        ({"kv_dtype": "fp4"}, "kv_dtype must be"),
    ],
)
def test_refusals_of_forced_log_probs_name_it(model, changes, message):
    arguments = {"labels_B": [1], "tokens_BL": torch.zeros(1, 14, dtype=torch.int64), **changes}
    with pytest.raises(ValueError, match=f"^forced_log_probs: {message}"):
        model.engine().forced_log_probs(**arguments)
