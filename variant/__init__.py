"""VARiant: one set of VAR weights that runs at any depth."""

from __future__ import annotations

from variant_kernels import __version__ as __version__

# In place of typing's, which type checkers read alike: the command line can install its handlers of
# signals only after this module, so it imports nothing.
TYPE_CHECKING = False

if TYPE_CHECKING:
    from variant.accelerate_original import accelerate
    from variant.engine.engine import Engine
    from variant.engine.generation import Generation, PartialResult, Sampling, Stats
    from variant.errors import UserError
    from variant.models.config import VARConfig, VQVAEConfig
    from variant.models.var import VAR
    from variant.models.vqvae import VQVAE
    from variant.schedule_files import load_schedule
    from variant.supernet import VARiant

# Imported at first use: `variant --help` must not wait for torch.
_MODULES = {
    "VAR": "models.var",
    "VQVAE": "models.vqvae",
    "Engine": "engine.engine",
    "Generation": "engine.generation",
    "PartialResult": "engine.generation",
    "Sampling": "engine.generation",
    "Stats": "engine.generation",
    "UserError": "errors",
    "VARConfig": "models.config",
    "VARiant": "supernet",
    # Not accelerate.py: a module of that name would hide the function.
    "accelerate": "accelerate_original",
    "VQVAEConfig": "models.config",
    "load_schedule": "schedule_files",
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
    "load_schedule",
]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'variant' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f"variant.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
