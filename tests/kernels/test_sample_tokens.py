"""sample_tokens: filters against the original's torch calls, draws against chi-square."""

import pytest
import torch
from compare import DEVICE, backends_for, cases, moved, name_of
from scipy import stats

from tests.robustness.forked import option
from variant_kernels import sample_tokens
from variant_kernels.cuda_ops import library
from variant_kernels.dispatch.support import triton_interprets
from variant_kernels.ops import sample_tokens as op

BACKENDS = backends_for(op.sample_tokens_op.backends, torch.float32)
CASES = cases(op.sample_tokens_op.backends)


def fewer_if_interpreted(backend, many, few, nightly=None):
    """Triton's interpreter and the emulation of CUDA take some 20 ms a row.

    nightly: the number for the emulation, and for both in ``make nightly``; None is ``few``.
    """
    nightly = few if nightly is None else nightly
    if backend == "triton" and triton_interprets():
        return nightly if option("LARGE_DRAWS", 0) else few
    return nightly if backend == "cuda" and library.is_emulated() else many


def original_probabilities(logits, guidance, top_k=0, top_p=0.0):
    """The original's sequence of torch calls (guidance, top-k, top-p), written out plainly."""
    cond, uncond = logits.float().chunk(2)
    guided = (1 + guidance) * cond - guidance * uncond
    if top_k:
        threshold = guided.topk(min(top_k, guided.shape[-1]), dim=-1)[0].amin(-1, keepdim=True)
        guided = guided.masked_fill(guided < threshold, -torch.inf)
    if top_p:
        ascending, order = guided.sort(dim=-1, descending=False, stable=True)
        drop = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        drop[..., -1] = False
        guided = guided.masked_fill(drop.scatter(-1, order, drop), -torch.inf)
    return guided.softmax(-1)


@pytest.mark.parametrize(("backend", "dtype"), CASES, ids=name_of)
def test_with_a_generator_it_draws_what_multinomial_draws(backend, dtype):
    for logits, filters in op.sample_inputs(dtype, torch.Generator().manual_seed(1)):
        for guidance in (0.0, 1.3):
            (logits,) = moved(logits)
            probs = original_probabilities(logits, guidance, **filters)
            first, second = (torch.Generator(DEVICE).manual_seed(7) for _ in range(2))
            expected = torch.multinomial(
                probs.flatten(0, 1), 1, replacement=True, generator=first
            ).view(probs.shape[:2])
            ours = sample_tokens(
                logits, guidance=guidance, generator=second, backend=backend, **filters
            )
            assert torch.equal(ours, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "filters", [{}, {"top_k": 5}, {"top_p": 0.7}, {"top_k": 9, "top_p": 0.9}], ids=str
)
def test_draws_follow_the_distribution(backend, filters):
    generator = torch.Generator().manual_seed(2)
    logits = 1.5 * torch.randn(2, 1, 16, generator=generator)
    probs = original_probabilities(logits, 0.8, **filters)[0, 0]
    draws = fewer_if_interpreted(backend, 100_000, 100, nightly=500)
    rows = torch.cat([half.expand(20, draws // 20, 16) for half in logits.split(1)])
    options = {"guidance": 0.8, "seed": 3, **filters}
    tokens = sample_tokens(*moved(rows), backend=backend, **options)
    if draws < 500:  # too few for frequencies: they are those of the reference, one by one
        assert torch.equal(tokens.cpu(), sample_tokens(rows, backend="reference", **options))
        return
    counts = tokens.flatten().cpu().bincount(minlength=16)
    assert not counts[probs == 0].any()
    kept = probs > 0
    expected = probs[kept].double() / probs[kept].double().sum() * draws
    assert stats.chisquare(counts[kept].numpy(), expected.numpy()).pvalue > 1e-4


def test_uniform_numbers_are_uniform_and_independent_of_each_key():
    """10^5 numbers along each key: Kolmogorov-Smirnov, and no correlation between neighbours."""
    along_position = op.uniform(5, torch.tensor([3]), 0, 100_000)[0]
    along_image = op.uniform(5, torch.arange(100_000), 7, 1)[:, 0]
    along_seed = torch.stack(
        [op.uniform(seed, torch.tensor([0]), 0, 1)[0, 0] for seed in range(2000)]
    )
    for numbers in (along_position, along_image, along_seed):
        assert stats.kstest(numbers.numpy(), "uniform").pvalue > 1e-4
        pairs = torch.corrcoef(torch.stack((numbers[:-1], numbers[1:])))
        assert pairs[0, 1].abs() < 5 / len(numbers) ** 0.5


def test_philox_gives_the_published_words():
    """Known answers of Philox4x32-10 from the Random123 distribution."""
    ones = 0xFFFFFFFF
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
    for counter, key, expected in (
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones,) * 4, (ones,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (*pi, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ):
        words = op.philox_4x32(tuple(torch.tensor([word]) for word in counter), key)
        assert [int(word) for word in words] == list(expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_depends_on_seed_image_and_position_only(backend):
    generator = torch.Generator().manual_seed(4)
    cond, uncond, ids = moved(
        *torch.randn(2, 6, 9, 100, generator=generator),
        torch.tensor([5, 2**40 + 1, 0, 17, 3, 2]),
    )
    options = {"guidance": 1.0, "top_p": 0.9, "seed": 2**61 + 5, "backend": backend}
    whole = sample_tokens(torch.cat((cond, uncond)), image_ids=ids, **options)
    (order,) = moved(torch.randperm(6, generator=generator))
    shuffled = sample_tokens(
        torch.cat((cond[order], uncond[order])), image_ids=ids[order], **options
    )
    assert torch.equal(shuffled, whole[order])
    part = sample_tokens(
        torch.cat((cond[2:4, 3:], uncond[2:4, 3:])), image_ids=ids[2:4], position=3, **options
    )
    assert torch.equal(part, whole[2:4, 3:])
    other = sample_tokens(
        torch.cat((cond, uncond)), image_ids=ids, **{**options, "seed": 2**61 + 6}
    )
    assert not torch.equal(other, whole)


@pytest.mark.parametrize(
    ("backend", "dtype"), [case for case in CASES if case[0] != "reference"], ids=name_of
)
def test_backends_differ_in_at_most_one_draw_in_100_000(backend, dtype):
    batch, tokens = fewer_if_interpreted(backend, (64, 256), (4, 20))
    generator = torch.Generator().manual_seed(5)
    differ = total = 0
    for filters in ({}, {"top_k": 100}, {"top_p": 0.9}, {"top_k": 200, "top_p": 0.96}):
        logits = (2 * torch.randn(batch, tokens, 1024, generator=generator)).to(dtype)
        options = {"guidance": 2.0, "seed": 9, **filters}
        ours = sample_tokens(*moved(logits), backend=backend, **options).cpu()
        differ += int((ours != sample_tokens(logits, backend="reference", **options)).sum())
        total += ours.numel()
    assert differ <= max(1, total // 100_000), f"{differ} of {total}"


def hard_rows(entries, generator):
    """Rows for which bisection is difficult or slow, (rows, entries)."""
    noise = torch.randn(entries, generator=generator)
    masked = torch.where(noise < 0.5, -torch.inf, noise)
    return torch.stack(
        (
            noise,
            torch.zeros(entries),
            noise.sign(),  # two values
            (2 * noise).round(),  # many ties
            torch.where(noise > 0, 0.0, -0.0),
            masked,
            torch.where(noise < 0.5, -1e9, noise),
            torch.where(noise < 2.5, -torch.inf, noise),  # fewer left than top_k asks for
            1e30 * noise,
            1e-40 * noise,  # subnormal
            noise.abs().pow(-3).clamp(max=1e6),  # a few far above the rest
            torch.arange(entries) * 2.0**-20,
            1000.0 + 1e-4 * noise,
        )
    )


@pytest.mark.parametrize(
    "filters",
    [
        {"top_k": k, "top_p": p}
        # No p whose 1 - p is a whole number of equal shares: there rounding decides.
        for k, p in ((1, 0), (7, 0), (100, 0.893), (300, 0.957), (514, 0.493), (0, 0.999), (0, 0.3))
    ],
    ids=str,
)
@pytest.mark.parametrize("entries", [515, 64])
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_hard_rows_are_cut_as_the_reference_cuts_them(backend, filters, entries):
    rows = hard_rows(entries, torch.Generator().manual_seed(10))
    draws = rows.unsqueeze(1).expand(-1, fewer_if_interpreted(backend, 200, 1), -1)
    logits = torch.cat((draws, draws))
    options = {"guidance": 0.0, "seed": 4, **filters}
    ours = sample_tokens(*moved(logits), backend=backend, **options).cpu()
    reference = sample_tokens(logits, backend="reference", **options)
    for row, (a, b) in enumerate(zip(ours, reference, strict=True)):
        # 200 draws show most kept entries; if the kept sets differ, many draws differ.
        assert int((a != b).sum()) <= 1, f"row {row}"


def exactly_kept(row, top_k, top_p):
    """Indices of the kept and of the dropped entries, ascending by value; sorted in float64."""
    order = row.double().sort(stable=True)
    kept = torch.ones(len(row), dtype=torch.bool)
    if 0 < top_k < len(row):
        kept &= order.values >= order.values[-top_k]
    if top_p:
        mass = (kept * (order.values - order.values[-1]).exp()).cumsum(0)
        kept &= mass > (1 - top_p) * mass[-1]
        kept[-1] = True
    return order.indices[kept], order.indices[~kept]


@pytest.mark.parametrize(
    "filters", [(7, 0), (100, 0.893), (300, 0.957), (514, 0.493), (0, 0.999), (0, 0.3)], ids=str
)
@pytest.mark.parametrize("entries", [515, 64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_least_kept_entry_can_be_drawn_and_the_next_cannot(backend, filters, entries):
    """An exponential near zero draws its entry, unless the filters dropped it."""
    top_k, top_p = filters
    rows, exponentials, expected = [], [], []
    for row in hard_rows(entries, torch.Generator().manual_seed(11)):
        kept, dropped = exactly_kept(row, top_k, top_p)
        # An entry with almost no probability is not drawn for any exponential.
        kept = kept[(row[kept] - row.max()).exp() > 1e-6]
        for indices, drawn in ((kept[:1], True), (dropped[-1:], False)):
            for entry in indices.tolist():
                rows.append(row)
                exponentials.append(torch.ones(entries).index_fill(0, torch.tensor(entry), 1e-30))
                expected.append((entry, drawn))
    logits, exponentials = torch.stack(rows).unsqueeze(0), torch.stack(exponentials)
    ours = op.sample_tokens_op.backends[backend].forward(
        logits_2BTV=moved(torch.cat((logits, logits)))[0],
        guidance=0.0,
        top_k=top_k,
        top_p=top_p,
        seed=0,
        image_ids_B=moved(torch.zeros(1, dtype=torch.int64))[0],
        position=0,
        exponential_RV=moved(exponentials)[0],
    )
    for token, (entry, drawn) in zip(ours.flatten().tolist(), expected, strict=True):
        assert (token == entry) == drawn


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_guidance_unconditional_rows_are_not_looked_at(backend):
    (cond,) = moved(torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(6)))
    poisoned = torch.cat((cond, torch.full_like(cond, torch.nan)))
    doubled = torch.cat((cond, cond))
    options = {"guidance": 0.0, "seed": 1, "backend": backend}
    assert torch.equal(sample_tokens(poisoned, **options), sample_tokens(doubled, **options))


@pytest.mark.parametrize("backend", BACKENDS)
def test_top_k_keeps_ties_and_top_p_never_drops_the_largest(backend):
    draws = fewer_if_interpreted(backend, 4000, 20, nightly=50)
    logits = moved(torch.tensor([3.0, 1.0, 3.0, 3.0, 0.0]))[0].expand(2, draws, 5)
    tokens = sample_tokens(logits, guidance=0.0, top_k=1, seed=0, backend=backend)
    assert set(tokens.unique().tolist()) == {0, 2, 3}
    tiny = sample_tokens(logits, guidance=0.0, top_p=1e-9, seed=0, backend=backend)
    # Equal logits are ordered by index: the last of the largest is never dropped.
    assert tiny.unique().tolist() == [3]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_rows_that_nothing_can_be_drawn_from_are_named(backend, poison):
    logits = torch.zeros(4, 3, 10)
    logits[1, 2, 5] = poison
    with pytest.raises(ValueError, match="logits_2BTV of image 1, token 2 must be free of NaN"):
        sample_tokens(logits, guidance=1.0, seed=0, backend=backend)


@pytest.mark.skipif(not triton_interprets(), reason="a GPU kernel without the check of values")
@pytest.mark.parametrize("drawn", [False, True], ids=["seed", "generator"])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.0), (5, 0.0), (0, 0.9), (5, 0.9)])
def test_the_triton_kernel_gives_token_0_where_nothing_can_be_drawn(top_k, top_p, drawn):
    from variant_kernels.triton_ops.sample_tokens import launch_sample_tokens

    logits = torch.randn(2, 5, 33, generator=torch.Generator().manual_seed(0))
    logits[0, 0, 3], logits[0, 1, 4] = torch.nan, torch.inf
    logits[0, 2], logits[0, 3] = -torch.inf, torch.nan
    logits[0, 4, 0] = -torch.inf
    tokens = launch_sample_tokens(
        logits_2BTV=logits,
        guidance=0.0,
        top_k=top_k,
        top_p=top_p,
        seed=1,
        image_ids_B=torch.arange(1),
        position=0,
        exponential_RV=torch.ones(5, 33) if drawn else None,
    )
    assert tokens[0, :4].tolist() == [0, 0, 0, 0]
    assert tokens[0, 4] > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_passes(backend):
    inputs = op.sample_inputs(torch.float32, torch.Generator().manual_seed(7))
    for logits, filters in inputs[: fewer_if_interpreted(backend, 4, 3, nightly=4)]:
        arguments = (filters.get("top_k", 0), filters.get("top_p", 0.0), 3, None, 2, None, backend)
        torch.library.opcheck(op.sample_tokens_op.overload, (*moved(logits), 1.5, *arguments))


def test_without_seed_draws_follow_torchs_default_generator():
    logits = torch.zeros(2, 50, 100)
    torch.manual_seed(1)
    first = sample_tokens(logits, guidance=1.0)
    second = sample_tokens(logits, guidance=1.0)
    torch.manual_seed(1)
    assert torch.equal(sample_tokens(logits, guidance=1.0), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"guidance": -1.0}, "guidance must be a finite number >= 0; got -1"),
        (
            {"guidance": 1.0, "top_k": -1},
            r"top_k must be an integer in \[0, 2\^31 - 1\] \(0 keeps all\); got -1",
        ),
        ({"guidance": 1.0, "top_p": 1.2}, r"top_p must be a finite number in \[0, 1\]"),
        ({"guidance": 1.0, "seed": -3}, r"seed must be an integer in \[0, 2\^63 - 1\]; got -3"),
        ({"guidance": 1.0, "position": -1}, r"position must be an integer in \[0, 4294967293\]"),
        ({"guidance": 1.0, "image_ids": torch.arange(3)}, r"image_ids must be \(2,\)"),
        ({"guidance": 1.0, "seed": 1, "generator": torch.Generator()}, "exclude each other"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        sample_tokens(torch.zeros(4, 3, 10), **arguments)
    with pytest.raises(ValueError, match="even number of rows"):
        sample_tokens(torch.zeros(3, 3, 10), guidance=1.0)


def test_uniform_numbers_are_the_first_words_of_philox():
    seed, ids, position = 5 + 2**40, torch.tensor([3, 3 + 2**33, 2**32 - 1]), 2**32 - 2
    drawn = op.uniform(seed, ids, position, 2)
    assert drawn.shape == (3, 2)
    for image, number in enumerate(ids.tolist()):
        for token in range(2):
            counter = (position + token, 0, number % 2**32, number // 2**32)
            key = (seed % 2**32, seed // 2**32)
            w0, w1, _, _ = op.philox_4x32(tuple(map(torch.tensor, counter)), key)
            bits = (int(w0) >> 5) * 2**26 + (int(w1) >> 6)
            assert drawn[image, token].item() == bits / 2**53


@pytest.mark.parametrize(
    ("draw", "logits", "token"),
    [
        (0.0, [-torch.inf, 0.0, 0.0], 1),  # what is left out has no mass at the lower end,
        (1.0, [0.0, 0.0, -torch.inf], 1),  # nor at the upper, where a product is rounded up
        (0.0, [0.0, 0.0, 0.0], 0),
        (0.5, [0.0, 0.0, -torch.inf], 1),
        (0.49, [0.0, 0.0, -torch.inf], 0),
    ],
)
def test_the_ends_of_the_distribution_are_entries_that_are_kept(monkeypatch, draw, logits, token):
    monkeypatch.setattr(
        op, "uniform", lambda seed, ids, position, tokens: torch.full((len(ids), tokens), draw)
    )
    logits_2BTV = torch.tensor(logits).expand(2, 2, 3)
    drawn = sample_tokens(logits_2BTV, guidance=0.0, seed=0, backend="reference")
    assert drawn.tolist() == [[token, token]]


def test_guidance_and_filters_by_hand():
    logits = torch.tensor([[[1.0, 2.0, 3.0]], [[0.0, 1.0, 5.0]]])
    assert op.guide(logits, 0.0).tolist() == [[[1, 2, 3]]]
    assert op.guide(logits, 2.0).tolist() == [[[3, 4, -1]]]
    row, none = torch.log(torch.tensor([[[0.4, 0.1, 0.2, 0.3]]])), -torch.inf
    kept = [
        (op.filter_logits(row, k, p)[0, 0] > none).tolist()
        for k, p in ((0, 0), (1, 0), (2, 0), (4, 0), (9, 0), (0, 0.05), (0, 0.65), (0, 1))
    ]
    every, first = [True] * 4, [True, False, False, False]
    two = [True, False, False, True]
    assert kept == [every, first, two, every, every, first, two, every]
    # The second filter looks at what the first leaves: 4/9, 3/9 and 2/9.
    assert (op.filter_logits(row, 3, 0.7)[0, 0] > none).tolist() == two
    assert (op.filter_logits(row, 0, 0.75)[0, 0] > none).tolist() == [True, False, True, True]
    # What reaches 1 - top_p exactly is dropped.
    assert (op.filter_logits(torch.zeros(1, 1, 2), 0, 0.5)[0, 0] > none).tolist() == [False, True]


def test_a_request_has_the_entries_of_a_row():
    request = op._request(torch.zeros(2, 3, 7, dtype=torch.float16))
    assert (request.row_width, request.dtypes) == (7, (torch.float16,))


def test_no_token_is_a_result_and_no_entry_is_none():
    assert sample_tokens(torch.zeros(2, 0, 4), guidance=0.0, seed=0).shape == (1, 0)
    assert sample_tokens(torch.zeros(2, 3, 1), guidance=0.0, seed=0).tolist() == [[0, 0, 0]]
    for shape in ((2, 3, 0), (3, 3, 4)):
        with pytest.raises(ValueError, match=r"an even number of rows .* and V >= 1; got \("):
            sample_tokens(torch.zeros(shape), guidance=0.0, seed=0)
    fake = op._fake(torch.zeros(4, 3, 7, device="meta"))
    assert (fake.shape, fake.dtype) == ((2, 3), torch.int64)


def test_what_is_not_given_is_a_seed_of_63_bits_and_the_number_of_the_image():
    def launched(**given):
        return op._launch(
            lambda **arguments: arguments, {"logits_2BTV": torch.zeros(6, 1, 2)} | given
        )

    seeds = [launched(seed=None, image_ids=None)["seed"] for _ in range(20)]
    assert len(set(seeds)) == 20
    assert 2**60 < max(seeds) < 2**63
    assert launched(seed=3, image_ids=None)["image_ids_B"].tolist() == [0, 1, 2]
    ids = torch.tensor([5, 6, 7])
    assert launched(seed=3, image_ids=ids)["image_ids_B"] is ids


def test_a_generator_draws_from_the_exponential_distribution_of_rate_1():
    logits, generator = torch.randn(4, 3, 5), torch.Generator().manual_seed(1)
    drawn = op.draw_exponential(logits, generator)
    expected = torch.empty(6, 5).exponential_(generator=generator.manual_seed(1))
    assert torch.equal(drawn, expected)
    tokens = sample_tokens(
        logits, guidance=0.0, generator=generator.manual_seed(1), backend="reference"
    )
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens.flatten(), (logits[:2].softmax(-1).view(6, 5) / drawn).argmax(-1))
