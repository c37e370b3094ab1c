"""New layers where other code has switched torch's initialisation off."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from variant.models.config import VARConfig, VQVAEConfig
from variant.models.discriminator import PatchDiscriminator
from variant.models.initialised import conv2d, initialised
from variant.models.var import VAR
from variant.models.vqvae import VQVAE
from variant.training.classifier import Classifier

PATCH_NUMS = (1, 2, 3)


@contextmanager
def switched_off(monkeypatch):
    """As after an import of the original code: a new layer keeps what the memory held."""

    def garbage(layer):
        for tensor in (*layer.parameters(), *layer.buffers()):
            tensor.data.fill_(77)

    with monkeypatch.context() as patch:
        for kind in (nn.Linear, nn.Conv2d, nn.BatchNorm2d, nn.LayerNorm):
            patch.setattr(kind, "reset_parameters", garbage)
        yield


def vqvae(**options):
    return VQVAE(
        VQVAEConfig(
            vocab_size=8, z_channels=4, ch=32, ch_mult=(1, 2), patch_nums=PATCH_NUMS, **options
        )
    )


def var(**options):
    return VAR(
        VARConfig(
            depth=3,
            embed_dim=32,
            num_heads=2,
            num_classes=3,
            patch_nums=PATCH_NUMS,
            vocab_size=8,
            vae_channels=4,
            **options,
        )
    )


MAKERS = {
    "vqvae": vqvae,
    "shared": lambda: vqvae(share_quant_resi=1),
    "classifier": lambda: Classifier(3, (8, 16)),
    "discriminator": lambda: PatchDiscriminator(3, 8, 2),
    "linear": lambda: initialised(nn.Linear(3, 5)),
    "linear without bias": lambda: initialised(nn.Linear(3, 5, bias=False)),
    "convolution": lambda: conv2d(3, 5, 3, stride=2),
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_model_has_the_same_weights_as_ever(monkeypatch, name):
    torch.manual_seed(0)
    expected = MAKERS[name]().state_dict()
    with switched_off(monkeypatch):
        torch.manual_seed(0)
        found = MAKERS[name]().state_dict()
    if name == "discriminator":  # its own initialisation, after torch's has drawn
        assert all(value.abs().max() < 2 for value in found.values())
        return
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize(
    "options",
    [{}, {"shared_aln": True, "attn_l2_norm": False}]
    + [
        {"zone_weights": kind, "subnets": {2: (0, 2)}, "bridge": 1} | more
        for kind, more in (("copies", {}), ("adaln", {}), ("lora", {"lora_rank": 2}))
    ],
    ids=str,
)
def test_a_transformer_initialises_every_weight_itself(monkeypatch, options):
    with switched_off(monkeypatch):
        model = var(**options)
    assert all(value.abs().max() < 7 for value in model.parameters())
