"""Small random models for tests that generate, save and damage them."""

from __future__ import annotations

import torch

from variant.data.images import ImageData
from variant.data.samples import Source
from variant.data.sources import open_data, open_source
from variant.models.config import VARConfig, VQVAEConfig
from variant.models.var import VAR
from variant.models.vqvae import VQVAE
from variant.supernet import VARiant
from variant.training.recipe import Recipe


def small_model(seed: int = 0, **options) -> VARiant:
    """Four layers of width 32, three scales, 6x6 pixels; outputs differ from token to token."""
    torch.manual_seed(seed)
    settings = {"subnets": {2: (0, 3), 3: (0, 2, 3)}, "bridge": 1, **options}
    var = VAR(
        VARConfig(
            depth=4,
            embed_dim=32,
            num_heads=2,
            num_classes=5,
            patch_nums=(1, 2, 3),
            vocab_size=24,
            vae_channels=8,
            **settings,
        )
    )
    with torch.no_grad():
        var.head.weight.mul_(300)
    vae = VQVAE(
        VQVAEConfig(
            vocab_size=24,
            z_channels=8,
            ch=32,
            ch_mult=(1, 1),
            num_res_blocks=1,
            patch_nums=(1, 2, 3),
            share_quant_resi=2,
        )
    )
    return VARiant(var, vae).eval()


def open_recipe_data(recipe: Recipe) -> ImageData:
    """The data of a recipe at the image size of its VQ-VAE."""
    return open_data(recipe.data, recipe.vae.image_size, recipe.vae.in_channels, recipe.seed)


def open_recipe_source(recipe: Recipe) -> Source:
    """The samples of a recipe at the image size of its VQ-VAE."""
    return open_source(recipe.data, recipe.vae.image_size, recipe.vae.in_channels, recipe.seed)
