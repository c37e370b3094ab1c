"""The models in a checkpoint of a training run, without its data."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from variant.checkpoints.model_folder import build
from variant.errors import UserError
from variant.models.var import VAR
from variant.models.vqvae import VQVAE
from variant.paths import path_kind, shown
from variant.training.checkpoint_folder import is_checkpoint_folder, read_into
from variant.training.checkpointer import Checkpointer
from variant.training.initial_weights import find_vae, is_tokenizer, load_vae, named_weights
from variant.training.recipe import Recipe
from variant.training.resume_rules import read_recipe
from variant.training.state_tensors import EMA, MODULE

WEIGHTS = ("model", "ema")


def find_checkpoint(path: Path) -> Path:
    """The checkpoint of a transformer at a path, or the newest of a run's folder.

    Raises:
        UserError: there is none.
    """
    kind = path_kind(path)
    if kind == "folder" and not is_checkpoint_folder(path):
        newest = Checkpointer(path, "var").files.newest()
        if newest is None:
            raise UserError(
                f"{shown(path)}: holds no checkpoint of a transformer: neither var-last.pt nor "
                "var-step-*"
            )
        return newest
    if kind is None:
        raise UserError(f"{shown(path)}: no such checkpoint")
    return path


def models_of(
    checkpoint: Path,
    *,
    weights: str | None = None,
    vae: Path | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[VAR, VQVAE, dict[str, Any]]:
    """Both models of a checkpoint, in eval mode, and the entries of config.json besides.

    Args:
        checkpoint: of :func:`find_checkpoint`.
        weights: "model" or "ema", the moving average; None takes the weights, with a warning if
            there is an average too.
        vae: the file or folder of the VQ-VAE; None is the one in the run's folder or recipe.
        dtype: of the transformer's weights; None keeps float32.
    Raises:
        UserError: the checkpoint is damaged or has no such weights; there is no VQ-VAE, or it is
            not the one of the training.
    """
    saved = Checkpointer(checkpoint.parent, "var").read_from(checkpoint)
    averaged = _is_average(saved, weights, str(checkpoint))
    recipe = read_recipe(saved["recipe"], str(checkpoint))
    if vae is not None:
        source = named_weights("vae", str(vae))
    else:
        source = find_vae(recipe, checkpoint.parent)
    own = load_vae(recipe, source)
    if not is_tokenizer(saved["inputs"].get("vae_sha256"), own, source):
        raise UserError(
            f"{checkpoint}: was trained with another VQ-VAE than {source.path}; give the file of "
            "the training's as --vae"
        )
    state = _weights(checkpoint, saved, averaged=averaged)
    names = saved["inputs"].get("class_names") or {}
    config = dataclasses.replace(recipe.var_config, class_names=tuple(names.values()))
    var = build(VAR, config, state, str(checkpoint), dtype=dtype)
    return (
        var.eval(),
        own.eval(),
        {"training": _facts(saved, recipe, averaged)},
    )


def _is_average(saved: Mapping[str, Any], weights: str | None, where: str) -> bool:
    has_average = saved.get("ema") is not None
    if weights not in (None, *WEIGHTS):
        raise UserError(f'{where}: the weights must be "model" or "ema"; got {weights!r:.60}')
    if weights == "ema" and not has_average:
        raise UserError(f"{where}: has no moving average of the weights; its ema.decay is 0")
    if weights is None and has_average:
        warnings.warn(
            f"{where}: took the weights; the checkpoint also has their moving average. Give "
            "--weights ema or --weights model to choose",
            stacklevel=3,
        )
    return weights == "ema"


def _weights(checkpoint: Path, saved: Mapping[str, Any], *, averaged: bool) -> dict[str, Tensor]:
    module, average = saved["module"], saved.get("ema") or {} if averaged else {}
    if not is_checkpoint_folder(checkpoint):
        return {**module, **average}
    tensors = {MODULE + name: torch.empty_like(v, device="cpu") for name, v in module.items()}
    averages = {EMA + name: torch.empty_like(v, device="cpu") for name, v in average.items()}
    read_into(checkpoint, tensors | averages)
    return {
        **{name.removeprefix(MODULE): value for name, value in tensors.items()},
        **{name.removeprefix(EMA): value for name, value in averages.items()},
    }


def _facts(saved: Mapping[str, Any], recipe: Recipe, averaged: bool) -> dict[str, Any]:
    what = "their moving average (EMA)" if averaged else "those"
    return {
        "recipe": recipe.name,
        "seed": recipe.seed,
        "settings": recipe.to_dict(),
        "steps": saved["step"],
        "steps_of_the_complete_run": saved["total_steps"],
        "weights": f"{what} of step {saved['step']}",
    }
