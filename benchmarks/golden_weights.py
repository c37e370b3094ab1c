"""The golden models without their recorded outputs: shapes from tests/golden, weights by rule.

The rule is that of the golden files: the checksum of each key seeds its tensor, so that a model is
the same on every machine.
"""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from variant.models.config import VARConfig, VQVAEConfig
from variant.models.var import VAR
from variant.models.vqvae import VQVAE

FOLDER = Path(__file__).parent.parent / "tests" / "golden"
NAMES = ("plain", "shared_aln", "no_l2norm")
HALF_SCALE = ("embed", "pos_", "class_emb", "ada_gss")
UNCHANGED = ("lvl_1L", "zero_k_bias", "ema_vocab_hit_SV")


def golden_weight(key: str, shape: tuple[int, ...]) -> Tensor:
    """One tensor of a golden model, float32."""
    generator = np.random.default_rng(zlib.crc32(key.encode()))
    z = torch.from_numpy(np.asarray(generator.standard_normal(shape, dtype=np.float32)))
    if key.endswith("scale_mul_1H11"):
        return math.log(4) + 0.1 * z
    if len(shape) < 2:
        return 1 + 0.1 * z if key.endswith("weight") and "norm" in key else 0.1 * z
    if any(part in key for part in HALF_SCALE):
        return 0.5 * z
    return z * np.float32(math.prod(shape[1:]) ** -0.5)


def golden_configs(name: str) -> tuple[dict[str, Any], VARConfig, VQVAEConfig]:
    """The content of tests/golden/NAME.json, and the configurations of both models."""
    description = json.loads((FOLDER / f"{name}.json").read_text())
    sizes, subnet = dict(description["vae"]), description["subnet"]
    vae_config = VQVAEConfig(patch_nums=sizes.pop("v_patch_nums"), **sizes)
    var_config = VARConfig(
        **description["var"],
        vocab_size=vae_config.vocab_size,
        vae_channels=vae_config.z_channels,
        subnets={subnet["depth"]: tuple(subnet["active_layers_flexible"])},
        bridge=subnet["bridge"],
    )
    return description, var_config, vae_config


def golden_model(name: str) -> tuple[VAR, VQVAE]:
    """The golden model of that name, in eval mode."""
    _, var_config, vae_config = golden_configs(name)
    return _filled(VAR(var_config)), _filled(VQVAE(vae_config))


@torch.no_grad()
def _filled(module: Any) -> Any:
    for key, tensor in module.state_dict().items():
        if not key.endswith(UNCHANGED):
            tensor.copy_(golden_weight(key, tuple(tensor.shape)))
    return module.eval().requires_grad_(False)
