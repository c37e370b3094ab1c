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
from variant.training.code_use import CodeUse, HeldOutUse
from variant.training.codebook import revive_codes
from variant.training.distributed import Ranks
from variant.training.logging_section import LoggingSection
from variant.training.meters import Meters
from variant.training.vae_task import train_vae


class ThreadRanks(Ranks):
    """Ranks that are threads of this process."""

    def __init__(self, rank, size, values, barrier):
        super().__init__(rank, size)
        self.values, self.barrier = values, barrier

    def added(self, values):
        self.values[self.rank] = values
        self.barrier.wait()
        total = sum(self.values[1:], self.values[0])
        self.barrier.wait()
        return total

    def sums(self, values):
        return self.added(torch.tensor(values, dtype=torch.float64)).tolist()


def on_ranks(size, work):
    """The results of ``work(ranks)`` of each of some ranks at once."""
    values, barrier = [None] * size, Barrier(size, timeout=30)
    with ThreadPoolExecutor(size) as pool:
        ranks = [ThreadRanks(rank, size, values, barrier) for rank in range(size)]
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
    assert revive_codes(module, images, np.random.default_rng(0)) == 7
    assert module.encode(images).unique().numel() > 3


@pytest.mark.parametrize("every_code", [False, True])
@pytest.mark.parametrize("size", [2, 3])
def test_several_processes_move_the_codes_that_one_moves(module, images, size, every_code):
    torch.nn.init.constant_(module.quantize.embedding.weight[3:], 100.0)

    def revived(ranks):
        own = copy.deepcopy(module)
        rng = np.random.default_rng(4)
        part = images[ranks.share(len(images))]
        count = revive_codes(own, part, rng, ranks=ranks, every_code=every_code)
        return count, own.quantize.embedding.weight.detach()

    count, expected = revived(Ranks())
    assert count == 8 if every_code else 5 <= count < 8
    results = on_ranks(size, revived)
    assert [result[0] for result in results] == [count] * size
    assert torch.equal(results[0][1], results[-1][1])
    torch.testing.assert_close(results[0][1], expected, rtol=1e-5, atol=1e-5)


def trained_use(module, ranks, parts, images, steps=3):
    """Running mean and measured values after some steps, without an optimiser."""
    own, meters = copy.deepcopy(module).train(), Meters(torch.device("cpu"))
    use = CodeUse(own.quantize, ranks, meters.add)
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

    def use(ranks, batch=2):
        own = ranks.share(len(tokens))
        counted = HeldOutUse(own, (1, 4), torch.device("cpu"))
        for start in range(0, 4, batch):  # one part more than some process has images for
            part = np.arange(own.start, own.stop)[start : start + batch]
            part = part if len(part) else np.arange(1)
            counted.add(part, [tokens[part]])
        return counted.values(ranks)

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
