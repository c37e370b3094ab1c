"""The golden files: inputs and outputs of the original VAR code on small random models.

``tests/golden/NAME.json`` holds a configuration and the state-dict shapes, ``NAME.safetensors``
the inputs and outputs. Weights are not stored; :func:`load_golden` fills them by a fixed rule.
"""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from variant.config import VARConfig, VQVAEConfig
from variant.transformer import VAR
from variant.vqvae import VQVAE

FOLDER = Path(__file__).parent / "golden"
NAMES = ("plain", "shared_aln", "no_l2norm")
UNSCALED = ("embed", "pos_", "class_emb", "ada_gss")
# Buffers that the original model fills when it is built.
BUILT = ("lvl_1L", "attn_bias_for_masking", "zero_k_bias", "ema_vocab_hit_SV")


@dataclass(frozen=True)
class Golden:
    """One golden model; the states hold every key of the original's state dicts."""

    json: dict[str, Any]
    tensors: dict[str, Tensor]
    var_config: VARConfig
    vae_config: VQVAEConfig
    var_state: dict[str, Tensor]
    vae_state: dict[str, Tensor]


def fill(key: str, shape: list[int]) -> Tensor:
    """The weights of one key, float32, drawn from the key's own checksum."""
    rng = np.random.default_rng(zlib.crc32(key.encode()))
    z = rng.standard_normal(shape, dtype=np.float32)
    if key.endswith("scale_mul_1H11"):
        filled = math.log(4) + 0.1 * z
    elif len(shape) >= 2:
        spread = 0.5 if any(part in key for part in UNSCALED) else math.prod(shape[1:]) ** -0.5
        filled = z * np.float32(spread)
    elif key.endswith("weight") and "norm" in key:
        filled = 1 + 0.1 * z
    else:
        filled = 0.1 * z
    return torch.from_numpy(np.asarray(filled, dtype=np.float32))


def _built(key: str, shape: list[int], patch_nums: list[int]) -> Tensor:
    scale_L = torch.repeat_interleave(
        torch.arange(len(patch_nums)), torch.tensor([side * side for side in patch_nums])
    )
    if key.endswith("lvl_1L"):
        return scale_L[None]
    if key.endswith("attn_bias_for_masking"):
        hidden = scale_L[:, None] < scale_L[None, :]
        return torch.zeros(shape).masked_fill(hidden, -torch.inf)
    return torch.zeros(shape)


def _state(shapes: dict[str, list[int]], patch_nums: list[int]) -> dict[str, Tensor]:
    return {
        key: _built(key, shape, patch_nums) if key.endswith(BUILT) else fill(key, shape)
        for key, shape in shapes.items()
    }


@cache
def load_golden(name: str) -> Golden:
    """The golden model of that name; treat its tensors as read-only."""
    described = json.loads((FOLDER / f"{name}.json").read_text())
    vae = dict(described["vae"])
    patch_nums = vae.pop("v_patch_nums")
    vae_config = VQVAEConfig(**vae, patch_nums=patch_nums)
    subnet = described["subnet"]
    var_config = VARConfig(
        **described["var"],
        vocab_size=vae_config.vocab_size,
        vae_channels=vae_config.z_channels,
        subnets={subnet["depth"]: tuple(subnet["active_layers_flexible"])},
        bridge=subnet["bridge"],
    )
    return Golden(
        json=described,
        tensors=load_file(FOLDER / f"{name}.safetensors"),
        var_config=var_config,
        vae_config=vae_config,
        var_state=_state(described["var_state"], patch_nums),
        vae_state=_state(described["vae_state"], patch_nums),
    )


def golden_models(name: str, device: str = "cpu") -> tuple[Golden, VAR, VQVAE]:
    """A golden file and both models with its weights, in eval mode; new ones at every call."""
    golden = load_golden(name)
    var, vae = VAR(golden.var_config).eval(), VQVAE(golden.vae_config).eval()
    var.load_state_dict(golden.var_state, strict=True)
    vae.load_state_dict(golden.vae_state, strict=True)
    return golden, var.to(device), vae.to(device)
