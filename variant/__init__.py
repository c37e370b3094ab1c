"""VARiant: one set of VAR weights that runs at any depth."""

from variant.config import VARConfig, VQVAEConfig
from variant.engine import Engine
from variant.errors import UserError
from variant.sampling import Generation, PartialResult, Stats
from variant.supernet import VARiant
from variant.transformer import VAR
from variant.vqvae import VQVAE

__all__ = [
    "VAR",
    "VQVAE",
    "Engine",
    "Generation",
    "PartialResult",
    "Stats",
    "UserError",
    "VARConfig",
    "VARiant",
    "VQVAEConfig",
]
