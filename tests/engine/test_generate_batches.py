"""Batches as they are made: equal to one call, none kept, in float32 or 8 bits."""

import gc
import weakref
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from golden_models import golden_engine
from small_models import small_model
from test_cuda_graphs import Repeater

from variant.engine.engine import Engine
from variant.engine.images import to_pil, to_uint8
from variant_kernels.products import product_dtype

LABELS = [1, 2, 0, 4, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_the_batches_are_those_of_one_call(backend, dtype):
    model = small_model()
    engine = Engine(model.var, model.vae, backend=backend, dtype=dtype)
    arguments = {"seed": 3, "depth": 2, "top_k": 9, "max_batch": 2}
    whole = engine.generate(LABELS, **arguments)
    batches = list(engine.generate_batches(LABELS, **arguments))
    assert [len(batch.tokens) for batch in batches] == [2, 2, 1]
    for name in ("images", "tokens", "labels", "image_ids"):
        joined = torch.cat([getattr(batch, name) for batch in batches])
        assert torch.equal(joined, getattr(whole, name)), name
    assert whole.labels.tolist() == LABELS
    assert whole.image_ids.tolist() == [0, 1, 2, 3, 4]
    assert [batch.stats.batches for batch in batches] == [1, 1, 1]
    assert all(0 < b.stats.decode_seconds < b.stats.seconds for b in batches)
    assert whole.stats.batches == 3


def test_batches_with_ids_and_a_generator_are_those_of_one_call():
    model = small_model()

    def arguments():
        return {"generator": torch.Generator().manual_seed(7), "max_batch": 2}

    ids = [9, 8, 2**40, 6, 5]
    batches = list(model.generate_batches(LABELS, image_ids=ids, **arguments()))
    whole = model.generate(LABELS, image_ids=ids, **arguments())
    assert torch.equal(torch.cat([b.images for b in batches]), whole.images)
    assert [i for b in batches for i in b.image_ids.tolist()] == ids


@pytest.mark.parametrize("kind", [torch.tensor, np.array])
def test_the_callers_ids_and_tokens_are_copied(kind):
    model = small_model()
    tokens = model.generate(LABELS, seed=1).tokens
    mask = torch.arange(14) % 2

    def arguments():
        given = {"image_ids": kind([9, 8, 7, 6, 5]), "tokens": kind(tokens.tolist())}
        return given | {"mask": kind(mask.tolist()), "seed": 2, "max_batch": 2}

    expected = model.generate(LABELS, **arguments())
    mine = arguments()
    found = []
    for batch in model.generate_batches(LABELS, **mine):  # the arrays are used for something else
        found.append(batch)
        for name in ("image_ids", "tokens", "mask"):
            mine[name][...] = 0
    assert [i for batch in found for i in batch.image_ids.tolist()] == [9, 8, 7, 6, 5]
    assert torch.equal(torch.cat([batch.tokens for batch in found]), expected.tokens)
    result = model.generate(LABELS, **(mine := arguments()))
    mine["image_ids"] += 10
    assert result.image_ids.tolist() == [9, 8, 7, 6, 5]


def test_captured_batches_are_those_of_one_call(monkeypatch):
    monkeypatch.setattr("variant.engine.engine.new_recorder", lambda device: Repeater())
    model = small_model()
    captured, eager = Engine(model.var, model.vae), Engine(model.var, model.vae, capture=False)
    batches = list(captured.generate_batches(LABELS, seed=1, max_batch=2))
    expected = eager.generate(LABELS, seed=1, max_batch=2)
    assert all(batch.stats.captured for batch in batches)
    assert torch.equal(torch.cat([b.images for b in batches]), expected.images)


class Endless(Sequence):
    """Labels without a list behind them."""

    def __len__(self):
        return len(LABELS)

    def __getitem__(self, index):
        return LABELS[index]


@pytest.mark.parametrize(
    "labels",
    [tuple(LABELS), np.array(LABELS, np.int16), torch.tensor(LABELS, dtype=torch.uint8), Endless()],
    ids=["tuple", "numpy", "torch", "sequence"],
)
def test_labels_may_be_any_sequence(labels):
    model = small_model()
    expected = model.generate(LABELS, seed=0, max_batch=2).tokens
    batches = model.generate_batches(labels, seed=0, max_batch=2)
    assert torch.equal(torch.cat([batch.tokens for batch in batches]), expected)
    assert torch.equal(model.generate(range(5), seed=0).labels, torch.arange(5))


def test_no_batch_is_kept_while_the_next_is_generated():
    model = small_model()
    references, alive = [], []

    def on_scale(scale, partial):
        gc.collect()
        alive.append(sum(reference() is not None for reference in references))

    for batch in model.generate_batches([1] * 6, max_batch=2, seed=0, on_scale=on_scale):
        references.append(weakref.ref(batch.images))
        del batch
    assert (len(references), alive) == (3, [0] * 9)


def test_a_batch_is_saved_alone():
    for batch in small_model().generate_batches(LABELS, max_batch=2, seed=0):
        for name in ("images", "tokens", "labels", "image_ids"):
            tensor = getattr(batch, name)
            assert tensor.untyped_storage().nbytes() == tensor.nbytes, name


def test_a_loop_may_end_early():
    model = small_model()
    expected = model.generate(LABELS, seed=0).tokens
    for batch in model.generate_batches(LABELS, seed=0, max_batch=2):
        assert torch.equal(batch.tokens, expected[:2])
        break
    batches = model.generate_batches(LABELS, seed=0, max_batch=2)
    next(batches)
    batches.close()
    assert torch.equal(model.generate(LABELS, seed=0).tokens, expected)


def test_the_loop_runs_in_the_modes_of_its_caller():
    model = small_model()
    weight = torch.ones(3, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model.generate(LABELS, seed=0, max_batch=2)
        for number, batch in enumerate(model.generate_batches(LABELS, seed=0, max_batch=2)):
            assert torch.is_grad_enabled()
            assert (weight @ weight).dtype == torch.bfloat16
            assert torch.equal(batch.images, expected.images[2 * number : 2 * number + 2])
    # Calls of two loops, one batch of each in turn.
    pairs = zip(*(model.generate_batches(LABELS, seed=s, max_batch=2) for s in (0, 1)), strict=True)
    first, second = (torch.cat([b.tokens for b in row]) for row in zip(*pairs, strict=True))
    assert torch.equal(first, expected.tokens)
    assert torch.equal(second, model.generate(LABELS, seed=1, max_batch=2).tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_change_between_batches_count_from_then_on(dtype):
    model = small_model()
    engine = model.engine(dtype)
    before = engine.generate(LABELS, seed=0, max_batch=3).images
    seen = []
    for batch in engine.generate_batches(LABELS, seed=0, max_batch=3):
        seen.append(batch.images)
        with torch.no_grad():
            model.var.head.bias.add_(torch.arange(24.0))
            model.var.blocks[0].ffn.fc1.weight.mul_(1.5)
        after = engine.generate(LABELS, seed=0, max_batch=3).images
        if len(seen) == 1:
            assert torch.equal(batch.images, before[:3])
            assert not torch.equal(after[3:], before[3:])
            expected = after[3:]
    assert torch.equal(seen[1], expected)


def test_arguments_are_checked_at_the_call():
    _, engine = golden_engine("plain")
    with pytest.raises(ValueError, match="generate: labels must be in"):
        engine.generate_batches([99])
    with pytest.raises(ValueError, match="image_dtype must be one of float32, uint8; got 'int64'"):
        engine.generate_batches([1], image_dtype=torch.int64)
    with pytest.raises(TypeError, match="image_dtype must be one of"):
        engine.generate([1], image_dtype=8)


@pytest.mark.parametrize("image_dtype", [torch.uint8, "uint8"])
def test_8_bit_images_are_those_of_the_png_writer(image_dtype):
    model = small_model()
    exact = model.generate(LABELS, seed=0)
    rounded = model.generate(LABELS, seed=0, image_dtype=image_dtype)
    assert rounded.images.dtype == torch.uint8
    assert torch.equal(rounded.images.float(), (exact.images * 255).round())
    assert torch.equal(rounded.tokens, exact.tokens)
    for a, b, expected in zip(exact.pil(), rounded.pil(), rounded.images, strict=True):
        assert a.mode == "RGB"
        assert a.tobytes() == b.tobytes()
        assert np.array_equal(np.asarray(a), expected.permute(1, 2, 0).numpy())
    empty = model.engine().generate(1, seed=0, decode=False, image_dtype=image_dtype)
    assert (empty.images.shape, empty.images.dtype) == ((0, 3, 6, 6), torch.uint8)
    assert empty.pil() == []


def test_pixels_are_rounded_to_the_nearest_and_clamped():
    values = torch.tensor([-0.5, 0.0, 0.4999 / 255, 0.5001 / 255, 254.6 / 255, 1.0, 1.5])
    assert to_uint8(values).tolist() == [0, 0, 0, 1, 255, 255, 255]
    assert to_uint8(values.bfloat16()).dtype == torch.uint8
    (gray,) = to_pil(torch.full((1, 1, 2, 3), 0.2))
    assert (gray.size, gray.mode, gray.getpixel((2, 1))) == ((3, 2), "RGB", (51, 51, 51))
    with pytest.raises(ValueError, match=r"images must be \(B, 3 or 1, Y, X\); got \(2, 4, 4, 4\)"):
        to_pil(torch.zeros(2, 4, 4, 4))


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"image_dtype": "uint8"}])
def test_pixels_that_are_no_numbers_are_refused_and_not_painted_black(options):
    model = small_model()
    expected = model.generate(LABELS, seed=0, **options).images
    dtype = product_dtype("cpu", getattr(torch, options.get("dtype", "float32")))
    with torch.no_grad():
        model.vae.decoder.conv_out.bias[1] = torch.nan
    name, count = str(dtype).removeprefix("torch."), len(LABELS)
    text = f"the VQ-VAE's decoder must give numbers; got NaN in {count} of {count} images"
    with pytest.raises(ValueError, match=rf"^Engine: {text} \(computed in {name}\)") as caught:
        model.generate(LABELS, seed=0, **options)
    assert ("use float32" in str(caught.value)) == (dtype == torch.bfloat16)
    assert len(model.engine().generate(LABELS, seed=0, decode=False).tokens) == len(LABELS)
    with torch.no_grad():
        model.vae.decoder.conv_out.bias[1] = torch.inf  # clamped: as bright as can be
    bright = model.generate(LABELS, seed=0, **options).images
    assert bright[:, 1].eq(bright.max()).all()
    assert bright[:, 0].equal(expected[:, 0])
