"""Parameters counted from configurations are those of the modules."""

import dataclasses

import pytest
import torch

from variant.models.config import VARConfig, VQVAEConfig
from variant.models.parameter_count import var_parameters, vqvae_parameters
from variant.models.presets import VAR_PRESETS, vqvae_of
from variant.models.var import VAR
from variant.models.vqvae import VQVAE

SMALL_VAR = VARConfig(4, 32, 2, 5, (1, 2, 3), 24, 8, mlp_ratio=2.5)
SMALL_VAE = VQVAEConfig(24, 8, 32, (1, 2, 2), num_res_blocks=1, patch_nums=(1, 2, 3))


def parameters(kind, config):
    with torch.device("meta"):
        return sum(p.numel() for p in kind(config).parameters())


@pytest.mark.parametrize("name", VAR_PRESETS)
def test_presets(name):
    config = VAR_PRESETS[name]
    assert var_parameters(config) == parameters(VAR, config)
    assert vqvae_parameters(vqvae_of(config)) == parameters(VQVAE, vqvae_of(config))


@pytest.mark.parametrize(
    "changes",
    [{}, {"shared_aln": True}, {"attn_l2_norm": False}, {"patch_nums": (2, 3)}],
)
def test_transformers(changes):
    config = dataclasses.replace(SMALL_VAR, **changes)
    assert var_parameters(config) == parameters(VAR, config)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_res_blocks": 3},
        {"ch_mult": (1,)},
        {"ch_mult": (1, 1, 2, 4)},
        {"in_channels": 1},
        {"share_quant_resi": 0},
        {"share_quant_resi": 1},
        {"quant_resi": 0.0},
        {"quant_conv_ks": 1},
    ],
)
def test_vqvaes(changes):
    config = dataclasses.replace(SMALL_VAE, **changes)
    assert vqvae_parameters(config) == parameters(VQVAE, config)
