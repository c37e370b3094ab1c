"""The codebook while the VQ-VAE trains."""

import copy
import dataclasses
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
import torch
from tiny_runs import CPU, metrics, quiet, steps_of

from variant.models.vqvae import VQVAE
from variant.training.code_entropy import entropy_term
from variant.training.code_use import CodeUse, HeldOutUse
from variant.training.codebook import CodebookTraining, kmeans_means, revive_codes
from variant.training.distributed import Ranks
from variant.training.logging_section import LoggingSection
from variant.training.meters import Meters
from variant.training.vae_task import VAETask, train_vae


class ThreadRanks(Ranks):
    """Ranks that are threads of this process."""

    def __init__(self, rank, size, values, gate):
        super().__init__(rank, size)
        self.values, self.gate = values, gate

    def added(self, values):
        self.values[self.rank] = values
        self.gate.wait()
        total = sum(self.values[1:], self.values[0])
        self.gate.wait()
        return total

    def sums(self, values):
        return self.added(torch.tensor(values, dtype=torch.float64)).tolist()


def on_ranks(size, work):
    """The results of ``work(ranks)`` of each of some ranks at once."""
    values, gate = [None] * size, Barrier(size, timeout=30)
    with ThreadPoolExecutor(size) as pool:
        ranks = [ThreadRanks(rank, size, values, gate) for rank in range(size)]
        return list(pool.map(work, ranks))


@pytest.fixture
def module(recipe):
    torch.manual_seed(0)
    return VQVAE(recipe.vae)


@pytest.fixture
def images():
    return torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_revived_codes_are_used_afterwards(module, images):
    torch.nn.init.constant_(module.quantize.embedding.weight[1:], 100.0)
    assert module.encode(images).unique().numel() == 1
    assert revive_codes(module, images, np.random.default_rng(0)).sum() == 7
    assert module.encode(images).unique().numel() > 3


def test_revival_encodes_as_few_images_at_once_as_a_step(recipe, module, images, monkeypatch):
    encoded, features = [], VQVAE.features

    def watched(self, images_BIYX):
        encoded.append(len(images_BIYX))
        return features(self, images_BIYX)

    monkeypatch.setattr(VQVAE, "features", watched)

    def codes(accumulate):
        own, training = copy.deepcopy(module), recipe.vae_training
        optim = dataclasses.replace(training.optim, accumulate=accumulate)
        training = dataclasses.replace(training, optim=optim)
        changed = dataclasses.replace(recipe, vae_training=training)
        CodebookTraining(own, changed, 4, print).revive(images, 0)
        return own.quantize.embedding.weight.detach()

    torch.testing.assert_close(codes(3), codes(1), rtol=1e-5, atol=1e-6)
    assert encoded == [3, 3, 2, 8]
    codes(12)
    assert encoded[4:] == [1] * 8  # fewer images than parts


@pytest.mark.parametrize(("every_code", "kmeans"), [(False, 0), (True, 0), (True, 3)])
@pytest.mark.parametrize("size", [2, 3])
def test_several_processes_move_the_codes_that_one_moves(module, images, size, every_code, kmeans):
    torch.nn.init.constant_(module.quantize.embedding.weight[3:], 100.0)

    def revived(ranks):
        own = copy.deepcopy(module)
        rng = np.random.default_rng(4)
        part = images[ranks.share(len(images))]
        moves = {"every_code": every_code, "kmeans": kmeans}
        is_moved = revive_codes(own, part, rng, ranks=ranks, **moves)
        return is_moved.tolist(), own.quantize.embedding.weight.detach()

    is_moved, expected = revived(Ranks())
    assert sum(is_moved) == 8 if every_code else 5 <= sum(is_moved) < 8
    results = on_ranks(size, revived)
    assert [result[0] for result in results] == [is_moved] * size
    assert torch.equal(results[0][1], results[-1][1])
    torch.testing.assert_close(results[0][1], expected, rtol=1e-5, atol=1e-5)


def trained_use(module, ranks, parts, images, steps=3):
    """Running mean and measured values after some steps, without an optimiser."""
    own, meters = copy.deepcopy(module).train(), Meters(torch.device("cpu"))
    use = CodeUse(own.quantize, ranks, meters.add)
    own.quantize.on_scale = lambda rest, tokens, k: use.add(tokens, k)
    for step in range(steps):
        share = images.roll(step, 0)[ranks.share(len(images))]
        for part in share.tensor_split(parts):
            own(part, 2 if step == 1 else None)
        use.end_step()
    return own.quantize.ema_vocab_hit_SV, meters.means(ranks.sums)


def test_the_use_of_codes_is_that_of_the_batch_whatever_parts_and_processes(module, images):
    module.train()
    with torch.no_grad():
        revive_codes(module, images, np.random.default_rng(0), every_code=True)
    hits, values = trained_use(module, Ranks(), 1, images)
    alone = copy.deepcopy(module)
    for step in range(3):
        alone(images.roll(step, 0), 2 if step == 1 else None)
    assert torch.equal(hits, alone.quantize.ema_vocab_hit_SV)  # that of a loop of one's own
    assert hits.sum(1) == pytest.approx([8, 8 * 4, 8 * 16], rel=1e-5)
    for ranks_hits, ranks_values in on_ranks(2, lambda r: trained_use(module, r, 2, images)):
        torch.testing.assert_close(ranks_hits, hits, rtol=1e-5, atol=0)
        assert ranks_values == pytest.approx(values)
    assert values["codes_used/2"] > values["codes_used/0"] >= 1 / 8
    assert values["codes_perplexity/2"] <= 8 * values["codes_used/2"]


def test_a_held_out_image_counts_once():
    tokens = torch.tensor([[0], [1], [1], [3], [2]])

    def use(ranks, batch=2, tokens=tokens):
        own = ranks.share(len(tokens))
        counted = HeldOutUse(own, (1, 4), torch.device("cpu"))
        for start in range(0, 4, batch):  # one part more than some process has images for
            part = np.arange(own.start, own.stop)[start : start + batch]
            part = part if len(part) else np.arange(1)
            counted.add(part, [tokens[part]])
        return counted.values(ranks)

    # The first of three processes has none of two images.
    two = on_ranks(3, lambda ranks: use(ranks, tokens=tokens[:2]))
    assert two[0] == pytest.approx({"codes_used/0": 2 / 4, "codes_perplexity/0": 2})
    expected = 0.4**-0.4 * 0.2**-0.6
    assert on_ranks(2, use)[1] == on_ranks(3, use)[0]
    assert on_ranks(2, use)[1] == pytest.approx({"codes_used/0": 1, "codes_perplexity/0": expected})


def test_a_run_reports_the_use_of_its_codes_at_each_scale(recipe, tmp_path):
    console = quiet()
    recipe = dataclasses.replace(recipe, logging=LoggingSection(every=1))
    train_vae(recipe, tmp_path, console=console, device=CPU)
    lines = steps_of(tmp_path, "vae")
    for name in ("codes_used", "codes_perplexity"):
        assert all(f"{name}/0" in line for line in lines)
        rows = [entry["held_out_by_scale"][name] for entry in metrics(tmp_path, "vae")]
        assert rows[-1] == [lines[-1][f"held_out_by_scale/{name}/{k}"] for k in range(3)]
    assert 0 < lines[-1]["codes_used/2"] <= 1 < lines[-1]["codes_perplexity/2"] <= 8
    assert "codes used " in console.file.getvalue()
    assert "held out by scale: codes_used " in console.file.getvalue()


def test_kmeans_finds_clusters_and_leaves_a_mean_without_vectors_where_it_is():
    centers = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    noise = torch.randn(90, 2, generator=torch.Generator().manual_seed(0)) * 0.1
    vectors = centers.repeat(30, 1) + noise
    start = torch.cat((vectors[:3], torch.full((1, 2), 99.0)))
    means = kmeans_means(vectors, start, 5)
    expected = torch.stack([vectors[k::3].mean(0) for k in range(3)])
    torch.testing.assert_close(means[:3], expected, rtol=0, atol=1e-5)
    assert means[3].tolist() == [99.0, 99.0]
    directions = kmeans_means(vectors[1:3] * 7, torch.tensor([[2.0, 0.1]]), 1, is_normalised=True)
    assert directions.norm().item() == pytest.approx(1)


def test_kmeans_starts_the_codes_of_a_run_nearer_to_its_features(recipe, module, images):
    with torch.no_grad():
        vectors = module.quantize.residual_vectors(module.features(images), 2)

    def error(kmeans):
        own = copy.deepcopy(module)
        revive_codes(own, images, np.random.default_rng(0), every_code=True, kmeans=kmeans)
        return torch.cdist(vectors, own.quantize.embedding.weight).min(1)[0].square().sum().item()

    assert error(8) < 0.9 * error(0)
    changed = dataclasses.replace(recipe.vae_training, revive_every=0, kmeans=8)
    started = CodebookTraining(module, dataclasses.replace(recipe, vae_training=changed), 4, print)
    assert started.revives_at(0)
    assert not started.revives_at(1)


def codes_and_vectors():
    generator = torch.Generator().manual_seed(2)
    shapes = ((6, 3), (5, 3))
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


def test_the_entropy_term_has_its_definition_and_gradient_and_adds_up_over_processes():
    vectors, codes = (t.requires_grad_() for t in codes_and_vectors())
    spread = (codes[:, None] - codes[None]).square().sum(2).mean().item()

    def term(vectors, codes):
        logits = -torch.cdist(vectors, codes).square() / (0.3 * spread)
        choice = logits.softmax(1)
        mean = choice.mean(0)
        return -(choice * choice.log()).sum(1).mean() + (mean * mean.log()).sum()

    torch.testing.assert_close(entropy_term(vectors, codes, 0.3), term(vectors, codes))
    # The unit of the temperature has no gradient, so the codes are checked against its definition.
    assert torch.autograd.gradcheck(lambda v: entropy_term(v, codes, 0.3), vectors)
    expected = torch.autograd.grad(term(vectors, codes), (vectors, codes))
    torch.testing.assert_close(
        torch.autograd.grad(entropy_term(vectors, codes, 0.3), (vectors, codes)), expected
    )

    def of_rank(ranks):
        part = vectors[slice(0, 4) if ranks.is_first else slice(4, 6)]
        value = entropy_term(part, codes, 0.3, ranks) * len(part) / 6
        return value.detach(), torch.autograd.grad(value, (vectors, codes))

    parts = on_ranks(2, of_rank)
    torch.testing.assert_close(parts[0][0] + parts[1][0], term(vectors, codes).detach())
    for index in range(2):
        torch.testing.assert_close(parts[0][1][index] + parts[1][1][index], expected[index])


def test_all_codes_alike_and_sure_choices_have_the_lowest_entropy_term():
    codes = 5 * torch.eye(4)
    even = entropy_term(codes.repeat(3, 1), codes, 0.01)
    assert even.item() == pytest.approx(-np.log(4), abs=1e-4)
    assert entropy_term(codes[:1].repeat(3, 1), codes, 0.01).item() == pytest.approx(0, abs=1e-4)
    unsure = entropy_term(torch.zeros(3, 4), codes, 0.01)
    assert unsure.item() == pytest.approx(0, abs=1e-4)
    assert torch.isfinite(entropy_term(codes, torch.zeros(4, 4), 0.01))  # codes that are all one


def test_codes_far_from_the_origin_have_the_entropy_of_codes_near_it():
    vectors, codes = codes_and_vectors()
    expected = entropy_term(vectors, codes, 0.3)
    far = entropy_term((vectors + 1000).float(), (codes + 1000).float(), 0.3)
    torch.testing.assert_close(far.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("entropy", "accumulate"), [(0.5, 2), (0.5, 1), (0.0, 2)])
def test_a_run_says_that_each_part_of_a_batch_has_an_entropy_term_of_its_own(
    recipe, module, entropy, accumulate
):
    optim = dataclasses.replace(recipe.vae_training.optim, accumulate=accumulate)
    training = dataclasses.replace(recipe.vae_training, entropy=entropy, optim=optim)
    changed = dataclasses.replace(recipe, vae_training=training)
    notes = VAETask(module, None, changed, CPU, steps=1).notes
    assert ["a batch has 2 parts" in note for note in notes] == [True] * (
        entropy > 0 and accumulate > 1
    )


def test_a_run_with_an_entropy_term_reports_it_and_trains_by_it(recipe, tmp_path):
    def trained(out, entropy):
        training = dataclasses.replace(recipe.vae_training, entropy=entropy, kmeans=2)
        changed = dataclasses.replace(
            recipe, vae_training=training, logging=LoggingSection(every=1)
        )
        train_vae(changed, tmp_path / out, console=quiet(), device=CPU)
        return steps_of(tmp_path / out, "vae")

    without, with_it = trained("without", 0.0), trained("with", 0.5)
    assert "loss/entropy" not in without[0]
    parts = with_it[0]["loss/reconstruction"] + with_it[0]["loss/quantization"]
    assert with_it[0]["loss/loss"] == pytest.approx(parts + 0.5 * with_it[0]["loss/entropy"])
    assert with_it[-1]["loss/reconstruction"] != without[-1]["loss/reconstruction"]
