"""VARiant: one set of VAR weights that runs at any depth."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from variant.config import VARConfig, VQVAEConfig
    from variant.engine import Engine
    from variant.errors import UserError
    from variant.live import accelerate
    from variant.sampling import Generation, PartialResult, Sampling, Stats
    from variant.supernet import VARiant
    from variant.transformer import VAR
    from variant.vqvae import VQVAE

# Imported at first use: `variant --help` must not wait for torch.
_HOME = {
    "VAR": "transformer",
    "VQVAE": "vqvae",
    "Engine": "engine",
    "Generation": "sampling",
    "PartialResult": "sampling",
    "Sampling": "sampling",
    "Stats": "sampling",
    "UserError": "errors",
    "VARConfig": "config",
    "VARiant": "supernet",
    "accelerate": "live",
    "VQVAEConfig": "config",
}

__all__ = [
    "VAR",
    "VQVAE",
    "Engine",
    "Generation",
    "PartialResult",
    "Sampling",
    "Stats",
    "UserError",
    "VARConfig",
    "VARiant",
    "VQVAEConfig",
    "accelerate",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'variant' has no attribute {name!r}")
    return getattr(importlib.import_module(f"variant.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
