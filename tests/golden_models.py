"""The golden files: inputs and outputs of the original VAR code on small random models.

``tests/golden/NAME.json`` holds a configuration and the state-dict shapes, ``NAME.safetensors``
the inputs and outputs. Weights are not stored; ``benchmarks/golden_weights.py`` fills them by a
fixed rule.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.golden_weights import FOLDER, NAMES, golden_configs, golden_weight
from variant.engine.engine import Engine
from variant.models.config import VARConfig, VQVAEConfig
from variant.models.var import VAR
from variant.models.vqvae import VQVAE

__all__ = ["NAMES", "Golden", "golden_engine", "golden_models", "load_golden"]

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
        key: _built(key, shape, patch_nums)
        if key.endswith(BUILT)
        else golden_weight(key, tuple(shape))
        for key, shape in shapes.items()
    }


@cache
def load_golden(name: str) -> Golden:
    """The golden model of that name; treat its tensors as read-only."""
    described, var_config, vae_config = golden_configs(name)
    patch_nums = list(vae_config.patch_nums)
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


@cache
def _shared_models(name: str) -> tuple[Golden, VAR, VQVAE]:
    return golden_models(name)


def golden_engine(name: str, **options: Any) -> tuple[Golden, Engine]:
    """A golden file and a new engine of its models, which all engines of that name share."""
    golden, var, vae = _shared_models(name)
    return golden, Engine(var, vae, **options)
