"""Small models with zone weights, for tests."""

from __future__ import annotations

import dataclasses

import torch
from small_models import small_model
from torch import Tensor

from variant.models.var import VAR
from variant.models.zones import is_zone_key
from variant.supernet import VARiant

KINDS = {
    "adaln": {"zone_weights": "adaln"},
    "lora": {"zone_weights": "lora", "lora_rank": 3},
    "lora alone": {"zone_weights": "lora", "lora_rank": 3, "zone_adaln": False},
    "copies": {"zone_weights": "copies"},
}
VARIATIONS = [{}, {"shared_aln": True}, {"attn_l2_norm": False}]
LABELS = torch.tensor([1, 4])


def zone_model(kind: str, **options) -> VARiant:
    """A small model, its zone weights and its layers far from where they start."""
    model = small_model(**KINDS[kind], **options)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.var.blocks.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.1)
    return model


def teacher_input(model: VARiant, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Teacher input and tokens of as many images as there are LABELS."""
    generator = torch.Generator().manual_seed(seed)
    tokens_BL = torch.randint(24, (len(LABELS), 14), generator=generator)
    return model.vae.teacher_input(tokens_BL), tokens_BL


def full_network(model: VARiant) -> VAR:
    """A model without zone weights that has the weights of the full network."""
    config = dataclasses.replace(
        model.var.config, zone_weights="shared", lora_rank=0, zone_adaln=True
    )
    var = VAR(config).eval()
    state = {k: v for k, v in model.var.state_dict().items() if not is_zone_key(k)}
    var.load_state_dict(state, strict=True)
    return var
