"""What a training run begins with, and what is refused before it costs anything."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from variant.checkpoints.model_folder import CONFIG_NAME
from variant.data.sources import data_inputs, open_data
from variant.errors import UserError
from variant.files import read_pickle
from variant.training.optim import OptimSection
from variant.training.recipe import Recipe

FORMAT = "variant-train-2"
# What a checkpoint holds besides its format and kind.
CONTENTS = {
    "recipe": dict,
    "inputs": dict,
    "step": int,
    "total_steps": int,
    "seconds": float,
    "module": dict,
    "optimizer": dict,
    "scaler": dict,
    "sums": dict,
    "history": list,
    "random": dict,
}
# What a run was trained on besides its recipe; a resumed run must find the same.
INPUTS = {
    "num_train": "number of training images",
    "num_held_out": "number of held-out images",
    "data_sha256": "image files or labels",
    "vae_sha256": "VQ-VAE weights",
}


def read_last(path: Path, kind: str) -> dict[str, Any]:
    """A run's checkpoint; its tensors are not checked here.

    Raises:
        UserError: missing, damaged, or not a checkpoint of this kind.
    """
    state = read_pickle(path)
    if state.get("format") != FORMAT or state.get("kind") != kind:
        raise UserError(
            f'{path}: is not a checkpoint of this program: "format" and "kind" must be "{FORMAT}" '
            f'and "{kind}"; got {state.get("format")!r} and {state.get("kind")!r}'
        )
    wrong = [name for name, form in CONTENTS.items() if not isinstance(state.get(name), form)]
    if wrong:
        raise UserError(f"{path}: is damaged: {', '.join(wrong)} missing or of another type")
    return state


class RunSetup:
    """What a run begins with: its data and, when it is resumed, its checkpoint.

    Making one refuses all that can be refused before weights are read and images are encoded.

    Attributes:
        data: opened.  inputs: what identifies them.  last: path of the checkpoint.
        state: the checkpoint's contents, None for a new run.
    Raises:
        UserError: a run or another model is there and resume was not asked for, or no run is there
            to resume; the checkpoint is damaged, or of another recipe or other data; the folder
            cannot be written; data, precision and batch size do not go together.
    """

    def __init__(
        self,
        kind: str,
        recipe: Recipe,
        optim: OptimSection,
        folder: Path,
        device: torch.device,
        resume: bool,
    ) -> None:
        self.last = folder / f"{kind}-last.pt"
        if not resume and self.last.exists():
            raise UserError(
                f"{folder}: already holds a run; continue it with --resume, or choose another "
                "folder"
            )
        if not resume and (folder / CONFIG_NAME).exists() and not (folder / "var-last.pt").exists():
            raise UserError(
                f"{folder}: holds a model ({CONFIG_NAME}) but no run that made it; choose another "
                "folder"
            )
        if resume and not self.last.exists():
            raise UserError(f"{folder}: holds no run to resume ({self.last.name} is not there)")
        if optim.precision == "fp16" and device.type == "cpu":
            raise UserError(
                f'{recipe.name}: precision "fp16" needs a GPU, because its loss scaling does; '
                'use "bf16" or "fp32" on a CPU'
            )
        self.state = read_last(self.last, kind) if resume else None
        if self.state is not None and self.state["recipe"] != recipe.to_dict():
            raise UserError(
                f"{self.last}: was written by another recipe or seed; resume with the same ones"
            )
        vae = recipe.vae
        self.data = open_data(recipe.data, vae.image_size, vae.in_channels, recipe.seed)
        if self.data.num_train < optim.batch_size:
            raise UserError(
                f"{recipe.name}: batch_size must be at most the number of training images "
                f"({self.data.num_train}); got {optim.batch_size}"
            )
        self.inputs: dict[str, Any] = {}
        for name, value in data_inputs(self.data).items():
            self.record_input(name, value)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from None

    def record_input(self, name: str, value: Any) -> None:
        """Record what the run is trained on.  Raises: UserError, where the checkpoint's differs."""
        self.inputs[name] = value
        if self.state is not None and self.state["inputs"].get(name) != value:
            raise UserError(
                f"{self.last}: was trained with another {INPUTS[name]}; resume with the same "
                f"(it was {self.state['inputs'].get(name)}, now it is {value})"
            )
