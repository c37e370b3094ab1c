"""The draw of one scale: in parts of the memory's size, with given tokens, mixtures and noise."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch

from variant.engine.arguments import GivenTokens
from variant.engine.drawing import (
    Drawer,
    extra_logit_bytes,
    gumbel_noise,
    token_log_probs,
)
from variant.engine.generation import Sampling
from variant_kernels import ScaleLayout
from variant_kernels.ops.sample_tokens import filter_logits, guide, philox_4x32

LAYOUT = ScaleLayout.from_patch_nums((1, 2, 3))
IMAGES, WIDTH, ENTRIES = 5, 6, 7
CODES = torch.randn(ENTRIES, 3, generator=torch.Generator().manual_seed(0))
HEAD = torch.randn(WIDTH, ENTRIES, generator=torch.Generator().manual_seed(1))


class Calls:
    """A head and launchers that record what they are called with."""

    def __init__(self):
        self.rows, self.samples, self.dtypes = [], [], []

    def head(self, h_RTC):
        self.rows.append(tuple(h_RTC.shape[:2]))
        return h_RTC @ HEAD

    def sample(self, **arguments):
        self.samples.append(arguments)
        return arguments["logits_2BTV"].chunk(2)[0].argmax(-1)

    def sample_float32(self, **arguments):
        self.dtypes.append(arguments["logits_2BTV"].dtype)
        return self.sample(**arguments)


def drawer_of(calls, given=None, log_probs=False, **sampling):
    return Drawer(
        layout=LAYOUT,
        launchers=SimpleNamespace(sample=calls.sample, sample_float32=calls.sample_float32),
        head=calls.head,
        codes_VE=CODES,
        sampling=Sampling(**{"seed": 3, "cfg": 2.0} | sampling),
        image_ids_B=torch.arange(10, 10 + IMAGES),
        given=given,
        log_probs=log_probs,
    )


def hidden(scale, sequences=2 * IMAGES):
    generator = torch.Generator().manual_seed(scale)
    return torch.randn(sequences, LAYOUT.tokens[scale], WIDTH, generator=generator)


def test_bytes_of_what_a_plain_draw_does_not_need():
    bytes_of = {
        (smooth, log_probs, temperature): extra_logit_bytes(
            Sampling(seed=0, more_smooth=smooth, temperature=temperature), log_probs
        )
        for smooth in (False, True)
        for log_probs in (False, True)
        for temperature in (1.0, 0.5)
    }
    # 96 of a smooth draw, 12 of log-probabilities; 16 of a temperature, or for its place.
    assert bytes_of == {
        (False, False, 1.0): 0, (False, False, 0.5): 16,
        (False, True, 1.0): 28, (False, True, 0.5): 28,
        (True, False, 1.0): 96, (True, False, 0.5): 112,
        (True, True, 1.0): 124, (True, True, 0.5): 124,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("images_of_memory", "rows"),
    [
        # Of 5 images, with two sequences for each.
        (5, [10]), (4.99, [8, 2]), (2, [4, 4, 2]), (1.99, [2] * 5), (0.5, [2] * 5), (9, [10]),
    ],
)  # fmt: skip
def test_the_head_runs_on_as_many_images_as_its_memory_holds(monkeypatch, images_of_memory, rows):
    one = LAYOUT.tokens[1] * ENTRIES * 2 * 4  # both sequences of an image, float32
    monkeypatch.setattr("variant.engine.drawing.LOGITS_BYTES", int(one * images_of_memory))
    calls = Calls()
    drawn = drawer_of(calls).draw(hidden(1), 1)
    assert calls.rows == [(count, 4) for count in rows]
    # Conditional and unconditional sequences of the same images, in their order.
    assert torch.equal(drawn.tokens_BT, (hidden(1)[:IMAGES] @ HEAD).argmax(-1))
    assert (drawn.codes_BTE, drawn.log_probs_BT) == (None, None)
    ids = torch.cat([call["image_ids_B"] for call in calls.samples])
    assert ids.tolist() == [10, 11, 12, 13, 14]
    halves = [call["logits_2BTV"].chunk(2) for call in calls.samples]
    logits = torch.cat([torch.cat(part) for part in zip(*halves, strict=True)])
    torch.testing.assert_close(logits, hidden(1) @ HEAD)
    for call in calls.samples:
        assert (call["seed"], call["position"], call["guidance"]) == (3, 1, 1.0)
        assert (call["top_k"], call["top_p"], call["exponential_RV"]) == (0, 0.0, None)


@pytest.mark.parametrize(("log_probs", "rows"), [(False, [10]), (True, [4, 4, 2])])
def test_a_generator_draws_for_all_images_at_once(monkeypatch, log_probs, rows):
    one = LAYOUT.tokens[1] * ENTRIES * (2 * 4 + 28 * log_probs)
    monkeypatch.setattr("variant.engine.drawing.LOGITS_BYTES", 2 * one)
    calls, generator = Calls(), torch.Generator().manual_seed(5)
    drawer = drawer_of(calls, log_probs=log_probs, seed=None, generator=generator)
    drawn = drawer.draw(hidden(1), 1)
    assert calls.rows == [(count, 4) for count in rows]
    [call] = calls.samples
    torch.testing.assert_close(call["logits_2BTV"], hidden(1) @ HEAD)
    assert (call["seed"], call["exponential_RV"].shape) == (0, (IMAGES * 4, ENTRIES))
    if log_probs:
        logits = hidden(1)[:IMAGES] @ HEAD
        expected = logits.log_softmax(-1).gather(-1, drawn.tokens_BT[..., None])[..., 0]
        torch.testing.assert_close(drawn.log_probs_BT, expected)


def test_unconditional_logits_of_weight_0_are_not_computed():
    for scale, cfg, rows in ((0, 2.0, 5), (2, 2.0, 10), (2, (0, 0, 0), 5), (0, (1, 0, 0), 10)):
        calls = Calls()
        drawn = drawer_of(calls, cfg=cfg, log_probs=True).draw(hidden(scale), scale)
        assert calls.rows == [(rows, LAYOUT.tokens[scale])]
        [call] = calls.samples
        assert call["logits_2BTV"].shape == (10, LAYOUT.tokens[scale], ENTRIES)
        assert call["position"] == LAYOUT.offsets[scale]
        logits = hidden(scale)[:IMAGES] @ HEAD
        torch.testing.assert_close(call["logits_2BTV"][:IMAGES], logits)
        torch.testing.assert_close(drawn.log_probs_BT, token_log_probs(logits, drawn.tokens_BT))


def test_parts_of_unguided_sequences_and_of_all_results(monkeypatch):
    drawer = drawer_of(Calls(), cfg=0, log_probs=True, more_smooth=True)
    whole = drawer.draw(hidden(1, IMAGES), 1)
    one = LAYOUT.tokens[1] * ENTRIES * (2 * 4 + 124)
    for images, rows in ((2, [2, 2, 1]), (0.5, [1] * 5)):
        monkeypatch.setattr("variant.engine.drawing.LOGITS_BYTES", int(one * images))
        calls = Calls()
        drawn = drawer_of(calls, cfg=0, log_probs=True, more_smooth=True).draw(hidden(1, IMAGES), 1)
        assert calls.rows == [(count, 4) for count in rows]
        assert torch.equal(drawn.tokens_BT, whole.tokens_BT)
        torch.testing.assert_close(drawn.codes_BTE, whole.codes_BTE)
        torch.testing.assert_close(drawn.log_probs_BT, whole.log_probs_BT)


def test_a_temperature_divides_the_logits_in_float32():
    calls = Calls()
    drawer_of(calls, temperature=(1.0, 0.5, 1.0)).draw(hidden(1), 1)
    assert calls.dtypes == [torch.float32]
    torch.testing.assert_close(calls.samples[0]["logits_2BTV"], hidden(1) @ HEAD / 0.5)
    drawer_of(calls, temperature=(1.0, 0.5, 1.0)).draw(hidden(2), 2)
    assert len(calls.dtypes) == 1
    torch.testing.assert_close(calls.samples[1]["logits_2BTV"], hidden(2) @ HEAD)


def test_given_tokens_stay_where_they_are_kept():
    tokens = torch.full((IMAGES, 14), 6)
    keep = torch.zeros(IMAGES, 14, dtype=torch.bool)
    keep[:, :5], keep[2, 7] = True, True
    given = GivenTokens(tokens, keep, frozenset({0, 1}))
    calls = Calls()
    for scale in (0, 1):  # nothing is drawn
        drawn = drawer_of(calls, given).draw(hidden(scale), scale)
        assert torch.equal(drawn.tokens_BT, tokens[:, LAYOUT.slice(scale)])
    assert calls.rows == calls.samples == []
    plain = drawer_of(calls).draw(hidden(2), 2).tokens_BT
    for smooth in (False, True):
        drawn = drawer_of(calls, given, more_smooth=smooth).draw(hidden(2), 2)
        expected = plain.clone()
        expected[2, 2] = 6
        assert torch.equal(drawn.tokens_BT, expected)
        if smooth:
            assert torch.equal(drawn.codes_BTE[2, 2], CODES[6])
            assert not torch.equal(drawn.codes_BTE[2, 3], CODES[plain[2, 3]])
    # Their log-probabilities need the logits, and no draw.
    calls = Calls()
    drawn = drawer_of(calls, given, log_probs=True).draw(hidden(1), 1)
    assert (len(calls.rows), calls.samples) == (1, [])
    logits = hidden(1)[:IMAGES] @ HEAD
    torch.testing.assert_close(drawn.log_probs_BT, token_log_probs(logits, drawn.tokens_BT))
    # A generator draws in its order, also where nothing is to be drawn.
    generator = torch.Generator().manual_seed(5)
    before = generator.get_state()
    drawer_of(calls, given, seed=None, generator=generator).draw(hidden(0), 0)
    assert not torch.equal(generator.get_state(), before)


@pytest.mark.parametrize(
    ("scale", "progress", "temperature"), [(0, 0, 0.27), (1, 0.5, 0.27 * 0.525), (2, 1, 0.0135)]
)
def test_mixtures_are_sharper_from_scale_to_scale(scale, progress, temperature):
    drawer = drawer_of(Calls(), more_smooth=True, top_k=3, top_p=0.9)
    drawn = drawer.draw(hidden(scale), scale)
    tokens = LAYOUT.tokens[scale]
    kept = filter_logits(guide(hidden(scale) @ HEAD, float(scale)), 3, 0.9)
    noise = gumbel_noise(3, drawer.image_ids_B, LAYOUT.offsets[scale], tokens, ENTRIES)
    weights = ((kept * (1 + progress) + noise) / temperature).softmax(-1)
    torch.testing.assert_close(drawn.codes_BTE, weights @ CODES, rtol=1e-4, atol=1e-5)


def test_a_model_of_one_scale_mixes_at_the_first_temperature():
    drawer = drawer_of(Calls(), more_smooth=True)
    drawer = dataclasses.replace(drawer, layout=ScaleLayout.from_patch_nums((2,)))
    noise = gumbel_noise(3, drawer.image_ids_B, 0, 4, ENTRIES)
    weights = ((guide(hidden(1) @ HEAD, 0.0) + noise) / 0.27).softmax(-1)
    codes = drawer.draw(hidden(1), 0).codes_BTE
    torch.testing.assert_close(codes, weights @ CODES, rtol=1e-4, atol=1e-5)


def test_mixtures_of_a_generator_take_its_numbers():
    drawn = [
        drawer_of(Calls(), more_smooth=True, seed=None,
                  generator=torch.Generator().manual_seed(seed)).draw(hidden(1), 1)
        for seed in (1, 1, 2)
    ]  # fmt: skip
    assert torch.equal(drawn[0].codes_BTE, drawn[1].codes_BTE)
    assert not torch.equal(drawn[0].codes_BTE, drawn[2].codes_BTE)
    generator = torch.Generator().manual_seed(1)
    torch.empty(IMAGES * 4, ENTRIES).exponential_(generator=generator)  # of the tokens
    noise = -torch.empty(IMAGES, 4, ENTRIES).exponential_(generator=generator).log()
    kept = guide(hidden(1) @ HEAD, 1.0)
    weights = ((kept * 1.5 + noise) / (0.27 * 0.525)).softmax(-1)
    torch.testing.assert_close(drawn[0].codes_BTE, weights @ CODES, rtol=1e-4, atol=1e-5)


def test_noise_is_of_the_seed_the_image_and_the_position():
    ids = torch.tensor([3, 3 + 2**32, -1])
    noise = gumbel_noise(5 + 2**40, ids, 2, 3, 6)
    assert noise.shape == (3, 3, 6)
    assert noise.dtype == torch.float32
    assert noise.unique().numel() == noise.numel()
    # Entries and positions do not depend on how many are asked for.
    assert torch.equal(gumbel_noise(5 + 2**40, ids[1:2], 3, 1, 4), noise[1:2, 1:2, :4])
    for other in (5, 6 + 2**40, 5 + 2**41):
        assert not (gumbel_noise(other, ids, 2, 3, 6) == noise).any()


def test_noise_is_of_the_words_of_philox_that_the_draw_leaves():
    """Entry v takes word v % 4 of block 1 + v // 4 of its position; the draw takes block 0."""
    seed, ids, position = 5 + 2**40, torch.tensor([3, 3 + 2**33]), 2
    noise = gumbel_noise(seed, ids, position, 2, 6)
    for image, token, entry in ((0, 0, 0), (1, 1, 3), (0, 1, 4), (1, 0, 5)):
        number = int(ids[image])
        counter = (position + token, 1 + entry // 4, number % 2**32, number // 2**32)
        words = philox_4x32(tuple(map(torch.tensor, counter)), (seed % 2**32, seed // 2**32))
        uniform = (int(words[entry % 4]) + 0.5) / 2**32
        expected = -math.log(-math.log(uniform))
        assert noise[image, token, entry].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("word", [0, 2**32 - 1])
def test_noise_of_the_least_and_the_largest_word_is_a_number(monkeypatch, word):
    def philox(counter, key):
        return (torch.full_like(counter[0], word),) * 4

    monkeypatch.setattr("variant.engine.drawing.philox_4x32", philox)
    noise = gumbel_noise(0, torch.zeros(1, dtype=torch.int64), 0, 1, 1).item()
    assert noise == pytest.approx(-math.log(-math.log((word + 0.5) / 2**32)), rel=1e-6)


def test_noise_has_the_moments_of_the_gumbel_distribution():
    noise = gumbel_noise(0, torch.arange(40), 0, 25, 100).double()  # 100,000 numbers
    # Five standard errors: mean sd/sqrt(n), variance sqrt(4.4)*var/sqrt(n) (kurtosis 5.4).
    assert noise.mean() == pytest.approx(0.57721566, abs=5 * 1.2825 / math.sqrt(1e5))
    assert noise.var() == pytest.approx(math.pi**2 / 6, abs=5 * 2.1 * 1.645 / math.sqrt(1e5))


def test_log_probabilities_are_of_the_float32_logits():
    logits = torch.tensor([[[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]]], dtype=torch.bfloat16)
    log_probs = token_log_probs(logits, torch.tensor([[2, 1]]))
    assert log_probs.dtype == torch.float32
    expected = [2 - math.log(1 + math.e + math.e**2), -math.log(math.e**3 + 2)]
    torch.testing.assert_close(log_probs, torch.tensor([expected]))
