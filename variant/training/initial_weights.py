"""The weights that a run starts from: a trained VQ-VAE, a pretrained transformer.

Both may come from a file of the original repository or of a trainer, or from a model folder of this
program, a packaged model or a repository of the Hub.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from variant.checkpoints.config_file import CONFIG_NAME, configs_in, read_config
from variant.checkpoints.locate import FILE_ENDINGS, locate
from variant.checkpoints.model_folder import load_model, load_state
from variant.checkpoints.original_var import read_original
from variant.checkpoints.sharded import INDEX_ENDING, find_weights, shards_beside
from variant.differences import listed
from variant.errors import UserError
from variant.models.config import VARConfig, VQVAEConfig
from variant.models.var import VAR
from variant.models.vqvae import VQVAE
from variant.models.zones import is_zone_key, reset_zone_weights
from variant.paths import file_sha256, path_kind
from variant.training.checkpointer import Checkpointer
from variant.training.recipe import Recipe, recipe_key
from variant.training.resume_rules import read_recipe

# Keys of the configs that may differ from the recipe's: they do not change what the weights mean.
FREE_KEYS = {
    "var": (
        *("subnets", "bridge", "cond_drop_rate", "drop_path_rate", "class_names"),
        *("zone_weights", "lora_rank", "zone_adaln"),  # compared by themselves
    ),
    "vae": ("beta",),
}
# The key of each model in a trainer checkpoint of the original.
PARTS = {"var": "var_wo_ddp", "vae": "vae_local"}


@dataclass(frozen=True)
class Weights:
    """One model's weights, in a file or in a model folder of this program.

    Args:
        kind: "var" or "vae".
        path: the file, or the folder.
        is_model_folder: whether the path is a model folder, which tells the sizes of its model.
        entry: which of several state dicts in a file; see :class:`variant.training.recipe.Recipe`.
        config: of the run that has trained the weights; None where a file alone is known.
    """

    kind: str
    path: Path
    is_model_folder: bool = False
    entry: str | None = None
    config: VQVAEConfig | None = None

    def sha256(self) -> str:
        """SHA-256 of the file, or of the folder's weights.

        Raises:
            UserError: a file cannot be read.
        """
        file = find_weights(self.path) if self.path.is_dir() else self.path
        if file is None:
            raise UserError(f"{self.path}: holds no weights")
        if not file.name.endswith(INDEX_ENDING):
            return file_sha256(file)
        digests = [file_sha256(path) for path in (file, *shards_beside(file))]
        return hashlib.sha256("\n".join(digests).encode()).hexdigest()

    def load_into(self, module: nn.Module, recipe: Recipe) -> None:
        """Load the weights into a model of the recipe.

        Raises:
            UserError: they are missing or damaged, or do not fit the recipe; the message names the
                key that differs.
        """
        if not self.is_model_folder:
            if self.config is not None:
                self._refuse(recipe, self._differing(recipe, self.config))
            state = read_original(self.path, PARTS[self.kind], self.entry)
            _load(module, state, str(self.path))
            return
        if self.entry not in (None, "model"):
            raise UserError(
                f'{recipe.name}: model.weights_entry must be "model" for {self.path}, a model '
                f"folder, which has one set of weights; got {self.entry!r}"
            )
        self._compare(recipe)
        var, vae, _ = load_model(self.path)
        _load(module, (var if self.kind == "var" else vae).state_dict(), str(self.path))

    def _compare(self, recipe: Recipe) -> None:
        found_var, found_vae = configs_in(self.path)
        wrong = self._differing(recipe, found_var if self.kind == "var" else found_vae)
        if self.kind == "var":
            wrong += _wrong_zone_weights(found_var, recipe.var_config)
        self._refuse(recipe, wrong)

    def _differing(self, recipe: Recipe, found: VARConfig | VQVAEConfig) -> list[str]:
        """Why a model of this configuration does not fit the recipe."""
        own = recipe.var_config if self.kind == "var" else recipe.vae
        own_values: dict[str, Any] = own.to_dict()
        return [
            f"{recipe_key(self.kind, key)} must be {value!r}, as in the model; got "
            f"{own_values[key]!r}"
            for key, value in found.to_dict().items()
            if key not in FREE_KEYS[self.kind] and own_values[key] != value
        ]

    def _refuse(self, recipe: Recipe, wrong: list[str]) -> None:
        if wrong:
            raise UserError(
                f"{recipe.name}: cannot start from {self.path}: {listed(wrong, 5, '; ')}"
            )


def _wrong_zone_weights(found: VARConfig, own: VARConfig) -> list[str]:
    """Why the zone weights of a model do not fit a recipe; those of a recipe may be new."""
    if found.zone_weights == "shared":
        return []
    keys = ("zone_weights", "lora_rank", "zone_adaln")
    wrong = [
        f"schedule.{key} must be {getattr(found, key)!r}, as in the model; got "
        f"{getattr(own, key)!r}"
        for key in keys
        if getattr(found, key) != getattr(own, key)
    ]
    if found.subnets != own.subnets:
        wrong.append(
            f"the subnets must be those of the model's zone weights, {found.subnets}; got "
            f"{own.subnets}"
        )
    return wrong


def _load(module: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Load a state; zone weights that it does not hold start as those of its full network."""
    own = {key: value for key, value in module.state_dict().items() if is_zone_key(key)}
    is_new = bool(own) and not any(is_zone_key(key) for key in state)
    load_state(module, {**state, **own} if is_new else state, where)
    if is_new:
        reset_zone_weights(module)


def find_start(recipe: Recipe) -> Weights | None:
    """The weights that the recipe's transformer starts from; None starts at random.

    Raises:
        UserError: there is no such file or model.
    """
    name = recipe.model.weights
    return None if name is None else named_weights("var", name, recipe.model.weights_entry)


def find_vae(recipe: Recipe, folder: Path) -> Weights:
    """The weights of the VQ-VAE that tokenizes images.

    Those that the recipe names, else those of the VQ-VAE trained in ``folder``.

    Raises:
        UserError: ``folder`` holds no VQ-VAE, one whose training has not finished, or a damaged
            one; there is no file or model of the name in the recipe.
    """
    if recipe.vae_training.weights is not None:
        return named_weights("vae", recipe.vae_training.weights)
    return _of_run(folder)


def _of_run(folder: Path) -> Weights:
    """The VQ-VAE that `variant train-vae` has trained in a folder; UserError as `find_vae`."""
    checkpointer = Checkpointer(folder, "vae")
    path = checkpointer.best
    if not path.exists() and not checkpointer.exists:
        raise UserError(
            f"{folder}: holds no VQ-VAE; train one first with `variant train-vae` into the same "
            "folder, or name a file as vae_training.weights"
        )
    if not checkpointer.exists:
        last = checkpointer.last.name
        raise UserError(
            f"{path}: training may be incomplete: {last}, which records it, is missing; to "
            "use it as it is, name it as vae_training.weights"
        )
    saved = checkpointer.read()
    if saved["step"] < saved["total_steps"]:
        raise UserError(
            f"{folder}: the training of its VQ-VAE has not finished; finish it with `variant "
            "train-vae --resume`, or name a file as vae_training.weights"
        )
    checkpointer.check_best(saved)
    return Weights("vae", path, config=read_recipe(saved["recipe"], str(checkpointer.path)).vae)


def named_weights(kind: str, name: str, entry: str | None = None) -> Weights:
    """The file, the model folder or the run's folder of a name; a model of the Hub is downloaded.

    The VQ-VAE of a folder is that of its model, or the one that `variant train-vae` has trained
    there.

    Args:
        kind: "var" or "vae".  entry: which of several state dicts in a file.
    Raises:
        UserError: there is none, or its training has not finished.
    """
    path = Path(name)
    if path.is_file() or path.suffix in FILE_ENDINGS:
        return Weights(kind, path, entry=entry)  # a missing file is reported by its reader
    if kind == "vae" and is_vae_run(path):
        return _of_run(path)
    folder = locate(name)
    return Weights(kind, folder, is_model_folder=_is_model_folder(folder), entry=entry)


def is_vae_run(folder: Path) -> bool:
    """Whether a VQ-VAE is trained in a folder that holds no finished model."""
    is_folder = path_kind(folder) == "folder"
    return is_folder and not (folder / CONFIG_NAME).is_file() and Checkpointer(folder, "vae").exists


def _is_model_folder(folder: Path) -> bool:
    """Whether a folder is of this program; the original's Hub class writes a config.json too."""
    try:
        read_config(folder)
    except UserError:
        return False
    return True


# Modules of a VQ-VAE that images pass after their tokens are known.
AFTER_TOKENS = ("decoder.", "post_quant_conv.")


def tokenizer_sha256(vae: VQVAE) -> str:
    """SHA-256 of the weights that decide which tokens an image has, and what a transformer reads.

    It is the same for every file that holds them, and for every decoder.
    """
    sha256 = hashlib.sha256()
    for name, weight in sorted(vae.named_parameters()):
        if not name.startswith(AFTER_TOKENS):
            # As a training loads them, whatever the dtype of the model; numpy has no bfloat16.
            weight = weight.detach().to("cpu", torch.float32).contiguous()
            sha256.update(f"{name} {tuple(weight.shape)} {weight.dtype}\n".encode())
            sha256.update(weight.numpy().tobytes())
    return sha256.hexdigest()


def is_tokenizer(recorded: object, vae: VQVAE, weights: Weights) -> bool:
    """Whether a VQ-VAE, loaded from ``weights``, has a recorded :func:`tokenizer_sha256`.

    Earlier versions recorded the SHA-256 of the file.
    """
    return recorded == tokenizer_sha256(vae) or recorded == weights.sha256()


def load_vae(recipe: Recipe, weights: Weights) -> VQVAE:
    """The recipe's VQ-VAE with trained weights.

    Raises:
        UserError: as :meth:`Weights.load_into`.
    """
    module = VQVAE(recipe.vae)
    weights.load_into(module, recipe)
    return module


def load_start(module: VAR, recipe: Recipe, weights: Weights) -> None:
    """Load the weights that a transformer starts from.

    Raises:
        UserError: as :meth:`Weights.load_into`.
    """
    weights.load_into(module, recipe)
