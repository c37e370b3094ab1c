"""Loading and saving of a model: folders, the Hugging Face Hub, files of the original code."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin
from torch import nn

from variant.checkpoints.locate import check_path, fetched, locate
from variant.checkpoints.model_card import model_card
from variant.checkpoints.model_folder import load_model, save_model
from variant.checkpoints.original_var import load_original
from variant.engine.cast_models import check_pair
from variant.models.placement import WEIGHT_DTYPES, check_device, check_dtype
from variant.models.var import VAR
from variant.models.vqvae import VQVAE
from variant_kernels.arguments import boolean, instance
from variant_kernels.dispatch.request import dtype_name

Value = TypeVar("Value")


class PretrainedPair(nn.Module, PyTorchModelHubMixin):
    """A VAR and its VQ-VAE that are loaded and saved together; :class:`variant.VARiant` generates.

    Args:
        var, vae: models with the same codebook and layout; their weights are shared, not copied.
    Raises:
        TypeError: one of the two is of another class.
        ValueError: the codebooks or layouts of the two differ.
    """

    def __init__(self, var: VAR, vae: VQVAE) -> None:
        super().__init__()
        check_pair(var, vae)
        self.var = var
        self.vae = vae
        self.extra: dict[str, Any] = {}  # further keys of config.json

    @classmethod
    def from_pretrained(  # type: ignore[override]  # dtype and device in place of model_kwargs
        cls,
        name: str | os.PathLike[str],
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | int | None = None,
        torch_dtype: torch.dtype | str | None = None,
        map_location: torch.device | str | int | None = None,
        strict: bool = True,
        subfolder: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> Self:
        """A model folder, a repository of the Hugging Face Hub, or a model of this package.

        Args:
            name: "digits" and "fashion-mnist" are in this package. An existing path is preferred
                to one of these and to a Hub id of the same spelling.
            dtype: of the transformer's weights, itself or its name; None or "auto" keeps that of
                the file, of several the widest.
            device: of both models; None is the CPU.
            torch_dtype, map_location: other names of dtype and device.
            strict: False lets weights be missing (they are initialised) or unexpected, and warns.
            subfolder: of the folder or repository, in which the model lies.
            revision, token, cache_dir, force_download, local_files_only: as in the Hub's mixin;
                for a Hub id only.
        Returns:
            The model in eval mode.
        Raises:
            TypeError, ValueError: an argument of a wrong type or value, a device that is not
                there, or two names of one argument with different values.
            UserError: there is no such model, or a file is damaged or of another format.
        """
        op = "from_pretrained"
        cast_to = _dtype(op, dtype, torch_dtype)
        place = _device(op, device, map_location)
        folder = locate(
            check_path(op, "name", name),
            instance(op, "subfolder", "" if subfolder is None else subfolder, str),
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
        )
        strict = boolean(op, "strict", strict)
        var, vae, config = load_model(folder, cast_to, place, strict=strict)
        model = cls(var, vae).eval()
        model.extra = {k: v for k, v in config.items() if k not in ("format", "var", "vae")}
        return model

    def save_pretrained(  # type: ignore[override]  # extra in place of config
        self,
        folder: str | os.PathLike[str],
        extra: Mapping[str, Any] | None = None,
        *,
        config: Mapping[str, Any] | None = None,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: Mapping[str, Any] | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Write ``config.json``, ``model.safetensors`` and a model card, ``README.md``.

        :meth:`from_pretrained` reads them. A README.md that this method did not write is kept. Of
        several saves into one folder at once, by threads or processes, each waits for the one
        before, and the last one counts.

        Args:
            extra: further keys of config.json, e.g. how the model was trained; plain values.
            config: the same; the Hub's mixin uses this name.
            repo_id: of the Hub; None is the name of the folder.
            push_to_hub: upload the folder too; other keywords are those of :meth:`push_to_hub`.
            model_card_kwargs: ``model_id``, the name of the model in the card.
        Returns:
            The URL of the commit on the Hub, or None if nothing was uploaded.
        Raises:
            TypeError, ValueError: extra holds what config.json cannot; nothing is written, and the
                model keeps the entries that it had.
            UserError: the folder cannot be written.
        """
        op = "save_pretrained"
        check_path(op, "folder", folder)
        merged = dict(self.extra)
        for name, entries in (("config", config), ("extra", extra)):
            merged |= instance(op, name, {} if entries is None else entries, Mapping)
        card = {} if model_card_kwargs is None else model_card_kwargs
        model_id = instance(op, "model_card_kwargs", card, Mapping).get("model_id") or repo_id
        save_model(folder, self.var, self.vae, merged, model_id)
        self.extra = merged  # after success: a refused save must not spoil later ones
        if not push_to_hub:
            return None
        return self.push_to_hub(repo_id or Path(folder).resolve().name, **push_to_hub_kwargs)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:  # type: ignore[override]
        """Upload weights, config and card to the Hub; options as in the Hub's mixin.

        Returns:
            The URL of the commit.
        """
        options["model_card_kwargs"] = {
            "model_id": repo_id,
            **(options.get("model_card_kwargs") or {}),
        }
        return super().push_to_hub(repo_id, **options)

    def generate_model_card(self, *_: Any, model_id: str = "this model", **__: Any) -> ModelCard:
        """The card that :meth:`save_pretrained` writes."""
        dtype = dtype_name(self.var.head.weight.dtype)
        training = self.extra.get("training")
        return ModelCard(model_card(self.var.config, self.vae.config, model_id, dtype, training))

    @classmethod
    def from_var_checkpoint(
        cls,
        var_path: str | os.PathLike[str],
        vae_path: str | os.PathLike[str],
        *,
        weights: str | None = None,
        num_heads: int | None = None,
        patch_nums: Sequence[int] | None = None,
        norm_eps: float | None = None,
        cond_drop_rate: float | None = None,
        drop_path_rate: float | None = None,
        quant_resi: float | None = None,
        using_znorm: bool | None = None,
        beta: float | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | int | None = None,
        torch_dtype: torch.dtype | str | None = None,
        map_location: torch.device | str | int | None = None,
        strict: bool = True,
    ) -> Self:
        """A model from files of the original repository; sizes are read from tensor shapes.

        Each file is a ``.pth`` state dict (loaded with ``weights_only=True``, which runs no code),
        a checkpoint of a trainer with the state dict under any name and prefix, a ``.safetensors``
        file or the index of its shards, or the output of ``save_pretrained`` of the original's Hub
        class: a folder, or its Hub id.

        The settings below are in no tensor. Those that the files hold (config.json, the ``args`` of
        a trainer checkpoint) are used; the others are arguments, and what is not given is assumed
        as the original's default, with one warning that names it.

        Args:
            weights: of a file with several state dicts: "model", "ema", or the name of an entry,
                such as "trainer/var_ema"; None is the plain model, with a warning.
            num_heads: in no tensor only without ``attn_l2_norm``; else one per 64 channels.
            patch_nums: sides of the token maps, in no tensor only without ``lvl_1L``.
            norm_eps: epsilon of the layer normalisations; else 1e-6.
            cond_drop_rate, drop_path_rate: of training; else 0.1 and 0.
            quant_resi: weight of the VQ-VAE's residual convolutions; else 0.5.
            using_znorm: nearest codes by cosine; else False.
            beta: weight of the VQ-VAE's commitment loss; else 0.25.
            dtype: of the transformer's weights, itself or its name; None keeps that of the file,
                of several the widest.
            device: of both models; None is the CPU.
            torch_dtype, map_location: other names of dtype and device.
            strict: False lets weights be missing (they are initialised) or unexpected, and warns;
                those that tell the sizes must be there.
        Returns:
            The model in eval mode.
        Raises:
            TypeError, ValueError: an argument of a wrong type or value, a device that is not
                there, or two names of one argument with different values.
            UserError: a file is missing, damaged or of another format, or contradicts a setting.
        """
        op = "from_var_checkpoint"
        cast_to = _dtype(op, dtype, torch_dtype)
        place = _device(op, device, map_location)
        models = load_original(
            fetched(check_path(op, "var_path", var_path)),
            fetched(check_path(op, "vae_path", vae_path)),
            num_heads,
            cast_to,
            place,
            weights=weights,
            strict=boolean(op, "strict", strict),
            patch_nums=patch_nums,
            norm_eps=norm_eps,
            cond_drop_rate=cond_drop_rate,
            drop_path_rate=drop_path_rate,
            quant_resi=quant_resi,
            using_znorm=using_znorm,
            beta=beta,
        )
        return cls(*models).eval()


def _dtype(
    op: str, dtype: torch.dtype | str | None, torch_dtype: torch.dtype | str | None
) -> torch.dtype | None:
    """The dtype of weights by either name."""
    return _one_of(
        op,
        ("dtype", check_dtype(op, dtype, dtypes=WEIGHT_DTYPES)),
        ("torch_dtype", check_dtype(op, torch_dtype, name="torch_dtype", dtypes=WEIGHT_DTYPES)),
    )


def _device(
    op: str,
    device: torch.device | str | int | None,
    map_location: torch.device | str | int | None,
) -> torch.device | None:
    """The device of models by either name."""
    return _one_of(
        op,
        ("device", check_device(op, device)),
        ("map_location", check_device(op, map_location, name="map_location")),
    )


def _one_of(
    op: str, one: tuple[str, Value | None], other: tuple[str, Value | None]
) -> Value | None:
    """The value of an argument that has two names.  Raises: ValueError, if both differ."""
    if one[1] is not None and other[1] is not None and one[1] != other[1]:
        raise ValueError(
            f"{op}: {other[0]} is another name of {one[0]}; got {other[1]} and {one[1]}, give one"
        )
    return other[1] if one[1] is None else one[1]
