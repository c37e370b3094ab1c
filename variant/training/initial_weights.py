"""The weights that a run starts from: a trained VQ-VAE, a pretrained transformer."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from variant.checkpoints.model_folder import load_state
from variant.checkpoints.original_var import read_original
from variant.checkpoints.sharded import find_weights
from variant.errors import UserError
from variant.models.config import VQVAEConfig
from variant.models.vqvae import VQVAE
from variant.training.checkpointer import Checkpointer


def find_vae(weights: str | None, folder: Path) -> Path:
    """The weights file of the VQ-VAE that tokenizes images.

    Args:
        weights: the file or model folder that the recipe names; None takes the VQ-VAE trained in
            ``folder``.
    Raises:
        UserError: ``folder`` holds no VQ-VAE, or one whose training has not finished.
    """
    if weights is not None:
        return _weights_file(Path(weights))
    checkpointer = Checkpointer(folder, "vae")
    path, last = checkpointer.best, checkpointer.last
    if not path.exists() and not last.exists():
        raise UserError(
            f"{folder}: holds no VQ-VAE; train one first with `variant train-vae` into the same "
            "folder, or name a file as vae_training.weights"
        )
    if not last.exists():
        raise UserError(
            f"{path}: training may be incomplete: {last.name}, which records it, is missing; to "
            "use it as it is, name it as vae_training.weights"
        )
    saved = checkpointer.read()
    if not path.exists() or saved["step"] < saved["total_steps"]:
        raise UserError(
            f"{folder}: the training of its VQ-VAE has not finished; finish it with `variant "
            "train-vae --resume`, or name a file as vae_training.weights"
        )
    return path


def load_vae(config: VQVAEConfig, path: Path) -> VQVAE:
    """A VQ-VAE with the weights of a file.

    Raises:
        UserError: the file is missing or damaged, or its weights do not fit the configuration.
    """
    module = VQVAE(config)
    load_state(module, read_weights(path, "vae_local"), str(path))
    return module


def read_weights(path: Path, part: str) -> dict[str, Tensor]:
    """One model's state dict from any file of weights, or from a model folder.

    Args:
        part: "var_wo_ddp" or "vae_local", the key of the model in a trainer checkpoint of the
            original.
    Raises:
        UserError: the file is missing, damaged or of another format.
    """
    return read_original(_weights_file(path), part)


def _weights_file(path: Path) -> Path:
    """The path itself, or the file of weights in a folder."""
    return (find_weights(path) or path) if path.is_dir() else path
