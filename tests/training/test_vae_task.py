"""Training of the VQ-VAE."""

import numpy as np
import torch

from variant.models.vqvae import VQVAE
from variant.training.vae_task import revive_codes


def test_revived_codes_are_used_afterwards(recipe):
    torch.manual_seed(0)
    module = VQVAE(recipe.vae)
    torch.nn.init.constant_(module.quantize.embedding.weight[1:], 100.0)
    images = torch.rand(8, 3, 8, 8) * 2 - 1
    assert module.encode(images).unique().numel() == 1
    assert revive_codes(module, images, np.random.default_rng(0)) == 7
    assert module.encode(images).unique().numel() > 3
