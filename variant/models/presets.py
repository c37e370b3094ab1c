"""Sizes of the published VAR models, for planning without weights.

Source: the original VAR repository and its paper (arXiv 2404.02905): width 64 times depth, one
head per 64 channels; the 512x512 model shares its adaptive layer norms' projection.
"""

from __future__ import annotations

from variant.models.config import VARConfig, VQVAEConfig

PATCH_NUMS_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
PATCH_NUMS_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)

# The paper's bridge zone in its main tables.
PAPER_BRIDGE = 6


def _var(
    depth: int, patch_nums: tuple[int, ...] = PATCH_NUMS_256, *, shared_aln: bool = False
) -> VARConfig:
    return VARConfig(
        depth=depth,
        embed_dim=64 * depth,
        num_heads=depth,
        num_classes=1000,
        patch_nums=patch_nums,
        vocab_size=4096,
        vae_channels=32,
        drop_path_rate=0.1 * depth / 24,
        bridge=PAPER_BRIDGE,
        shared_aln=shared_aln,
    )


VAR_PRESETS = {
    "var-d16": _var(16),
    "var-d20": _var(20),
    "var-d24": _var(24),
    "var-d30": _var(30),
    "var-d36-512": _var(36, PATCH_NUMS_512, shared_aln=True),
}


def vqvae_of(config: VARConfig) -> VQVAEConfig:
    """The published VQ-VAE (160 channels, 16-fold downsampling) for a preset's token maps."""
    return VQVAEConfig(vocab_size=4096, z_channels=32, ch=160, patch_nums=config.patch_nums)
