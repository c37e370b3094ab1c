"""Held-out images as tokens, for the losses of a search.

Axes: N images, L tokens of all scales.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from variant.data.config import DataSection
from variant.data.encode import encode_images
from variant.data.idx import labels_beside, section_of
from variant.data.samples import Source
from variant.data.shards import MANIFEST_NAME
from variant.data.sources import open_source
from variant.data.token_source import TokenSource
from variant.errors import UserError
from variant.paths import path_kind, shown
from variant.supernet import VARiant
from variant.training.initial_weights import tokenizer_sha256
from variant.training.recipe import load_recipe
from variant_kernels.wording import counted

PART = 64  # images that are read at once


@dataclass(frozen=True)
class HeldOut:
    """labels_N, tokens_NL: int64 on the CPU.  name: of the data, for printing."""

    labels_N: Tensor
    tokens_NL: Tensor
    name: str

    def halves(self) -> tuple[HeldOut, HeldOut]:
        """Every second image from the first on, and every second from the second on."""
        first, second = (
            HeldOut(self.labels_N[start::2], self.tokens_NL[start::2], self.name)
            for start in (0, 1)
        )
        return first, second


def held_out(model: VARiant, data: str, count: int) -> HeldOut:
    """The first held-out images of a data set, encoded by the model's VQ-VAE.

    Args:
        data: a recipe's name or TOML file, whose held-out images are taken; a folder with one
            sub-folder of images per class; a folder of token shards; a folder of IDX files with
            MNIST's names, or one file of images with the file of its labels beside it.
        count: images; fewer where there are fewer.
    Warns:
        RuntimeWarning: its classes have other names than the model's, or another order.
    Raises:
        UserError: no such data, of other classes or sizes than the model's, tokens of another
            VQ-VAE, or fewer than two images.
    """
    source = _open(model, data)
    config = model.var.config
    if source.num_classes != config.num_classes:
        raise UserError(
            f"{shown(data)}: must have the {counted(config.num_classes, 'class')} of the model; "
            f"it has {source.num_classes} ({source.classes_from})"
        )
    _warn_of_names(data, source.classes, config.class_names)
    count = min(count, source.num_held_out)
    if count < 2:
        raise UserError(
            f"{shown(data)}: must have two held-out images or more; it has {source.num_held_out}"
        )
    labels, tokens = [], []
    for start in range(0, count, PART):
        samples = source.held_out(range(start, min(start + PART, count)))
        labels.append(samples.labels_B)
        if samples.tokens_BL is None:
            images = samples.images.to(model.var.pos_start.device)
            tokens.append(encode_images(model.vae, images).cpu())
        else:
            tokens.append(samples.tokens_BL)
    return HeldOut(
        torch.cat(labels), torch.cat(tokens), f"{counted(count, 'held-out image')} of {data}"
    )


def _warn_of_names(data: str, classes: Sequence[str], expected: Sequence[str]) -> None:
    """Warns: RuntimeWarning, if labels may mean other classes than the model was trained with.

    Numbers are the names of classes that have none.
    """
    numbers = [str(label) for label in range(len(classes))]
    if not expected or numbers in ([*classes], [*expected]) or [*classes] == [*expected]:
        return
    label = next(
        n for n, pair in enumerate(zip(classes, expected, strict=True)) if len({*pair}) > 1
    )
    warnings.warn(
        f"search: class {label} of {shown(data)} is {shown(classes[label])}, that of the model "
        f"{shown(expected[label])}: the losses are right only if both are the same class",
        RuntimeWarning,
        stacklevel=3,
    )


def _open(model: VARiant, data: str) -> Source:
    vae, seed = model.vae.config, 0
    if path_kind(data) == "folder":
        if path_kind(os.path.join(data, MANIFEST_NAME)) is not None:
            section = DataSection(kind="tokens", tokens=data)
        else:
            section = section_of(Path(data))
            section = section or DataSection(kind="folder", train=data, held_out=data)
    elif path_kind(data) == "file" and (labels := labels_beside(Path(data))) is not None:
        section = DataSection("idx", data, data, str(labels), str(labels))
    else:
        try:
            recipe = load_recipe(data)
        except UserError as error:
            raise UserError(
                "search: --data must name a folder of images, a folder of token shards, a folder "
                f"or a file of IDX images, or a recipe, whose held-out images are taken; {error}"
            ) from None
        section, seed = recipe.data, recipe.seed
    source = open_source(
        section, vae.image_size, vae.in_channels, seed, mixed=section.kind == "tokens"
    )
    if isinstance(source, TokenSource):
        source.check(shown(data), vae)
        sha256 = tokenizer_sha256(model.vae)
        if source.manifest.vae_sha256 != sha256:  # tokens that mean other images to this model
            source.refuse_vae(sha256, "model")
    return source
