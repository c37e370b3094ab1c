"""config.json of a model folder: sizes of both models, without weights and without torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from variant.errors import UserError
from variant.models.class_names import check_class_names
from variant.models.config import VARConfig, VQVAEConfig, check_pair_of_configs
from variant.paths import path_kind, read_json, shown

CONFIG_NAME = "config.json"
FORMAT = "variant-1"
# Ends a refusal of what may be a file or a folder of the original code.
OTHER_FILES = (
    "Weights of the original code or of a trainer: "
    "VARiant.from_var_checkpoint, or `variant convert`"
)


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """config.json of a model folder.

    Raises:
        UserError: not a model folder, or config.json is of another format.
    """
    path = Path(folder) / CONFIG_NAME
    if path_kind(path) is None:
        raise UserError(
            f"{shown(folder)}: is not a model folder: it has no {CONFIG_NAME}. Expected a folder "
            'written by save_pretrained or `variant train`, or "digits" or "fashion-mnist". '
            f"{OTHER_FILES}"
        )
    config = read_json(path)
    if not isinstance(config, dict):
        raise UserError(
            f"{path}: must hold an object with the sizes of a model; it holds another value"
        )
    if config.get("format") != FORMAT:
        value = config.get("format")
        found = f"it has none. {OTHER_FILES}" if value is None else f"got {str(value)[:100]!r}"
        raise UserError(f'{path}: "format" must be "{FORMAT}"; {found}')
    return config


def configs_in(folder: str | os.PathLike[str]) -> tuple[VARConfig, VQVAEConfig]:
    """The configurations of both models of a folder; weights are not read.

    Raises:
        UserError: config.json is missing, of another format, or holds an invalid value, or the two
            models are no pair.
    """
    path, config = Path(folder) / CONFIG_NAME, read_config(folder)
    for key in ("var", "vae"):
        if not isinstance(config.get(key), dict):
            raise UserError(f'{path}: must hold the sizes of a model under "{key}"; it has none')
    try:
        var = VARConfig.from_dict(_with_names(config["var"], config))
        vae = VQVAEConfig.from_dict(config["vae"])
        check_pair_of_configs(var, vae)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {error}") from error
    return var, vae


def _with_names(var: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """The sizes of the transformer, with the class names where older files have them."""
    try:
        names = check_class_names("", config.get("classes"), var["num_classes"])
    except (KeyError, TypeError, ValueError):  # none, or a key of the same name for something else
        return var
    return {"class_names": names, **var}
