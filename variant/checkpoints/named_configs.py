"""Configs of a model by name: a preset without weights, or a model. Imports no torch."""

from __future__ import annotations

import os

from variant.checkpoints.config_file import configs_in
from variant.checkpoints.locate import locate
from variant.errors import UserError
from variant.models.config import VARConfig, VQVAEConfig
from variant.models.presets import VAR_PRESETS, vqvae_of


def is_preset(name: str) -> bool:
    """Whether the name is a preset without weights. A folder of that name takes precedence."""
    return name in VAR_PRESETS and not os.path.exists(name)


def configs_of(name: str) -> tuple[VARConfig, VQVAEConfig]:
    """Configs of a preset or of a model; no weights are read.

    Raises:
        UserError: there is no such model or preset, or its config.json is invalid.
    """
    if is_preset(name):
        return VAR_PRESETS[name], vqvae_of(VAR_PRESETS[name])
    try:
        folder = locate(name)
    except UserError as error:
        raise UserError(f"{error}; presets: {', '.join(VAR_PRESETS)}") from error
    return configs_in(folder)
