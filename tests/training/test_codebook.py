"""The codebook while the VQ-VAE trains."""

import copy
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
import torch

from variant.models.vqvae import VQVAE
from variant.training.codebook import revive_codes
from variant.training.distributed import Ranks


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
