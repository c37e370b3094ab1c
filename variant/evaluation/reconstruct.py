"""Images encoded and decoded by a VQ-VAE: what its tokens keep of them.

Axes: B images, I channels, 3 colours, Y X pixels.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from variant.errors import UserError
from variant.evaluation.classifier import to_uint8
from variant.evaluation.image_sets import ImageSet
from variant.evaluation.paired import psnr_with_interval, squared_errors
from variant.models.vqvae import VQVAE
from variant.supernet import VARiant
from variant.training.checkpointer import Checkpointer
from variant.training.initial_weights import find_vae, is_vae_run, load_vae
from variant.training.resume_rules import read_recipe


def load_vqvae(name: str, device: str) -> VQVAE:
    """The VQ-VAE of a model, or the one that `variant train-vae` has trained in a folder.

    Raises:
        UserError: there is none; its training has not finished.
    """
    folder = Path(name)
    if not is_vae_run(folder):
        return VARiant.from_pretrained(name, device=device).vae
    run = Checkpointer(folder, "vae")
    recipe = read_recipe(run.read()["recipe"], str(run.path))
    return load_vae(recipe, find_vae(recipe, folder)).to(device).eval()


def reconstructions(name: str, vae: VQVAE, source: ImageSet) -> ImageSet:
    """Images, encoded and decoded by the VQ-VAE of this name.

    Raises:
        UserError: they are of another size than the model's, or coloured where it has gray ones.
    """
    config = vae.config
    size = tuple(source.read(range(1)).shape[2:])
    if size != (config.image_size, config.image_size):
        raise UserError(
            f"eval: {name} has images of {config.image_size} x {config.image_size} pixels; "
            f"{source.name} has {size[1]} x {size[0]}"
        )

    def read(indices: range) -> Tensor:
        originals = source.read(indices)
        if config.in_channels == 1 and not (originals == originals[:, :1]).all():
            raise UserError(f"eval: {name} has gray images; {source.name} holds coloured ones")
        return _as_pixels(vae.decode(_encode(vae, originals)))

    return ImageSet(f"reconstructions by {name}", source.count, source.labels, read)


def psnr_by_scales(
    vae: VQVAE, source: ImageSet, batch: int = 64
) -> dict[str, tuple[float, tuple[float, float] | None]]:
    """PSNR of images decoded from their first scales, in dB, by the side of the last one.

    Each with its interval, as :func:`variant.evaluation.paired.psnr_with_interval` gives them.
    """
    errors: list[list[Tensor]] = [[] for _ in vae.layout.shapes]
    for start in range(0, source.count, batch):
        images = source.read(range(start, min(start + batch, source.count)))
        for k, decoded in enumerate(vae.decode_by_scale(_encode(vae, images))):
            errors[k].append(squared_errors(images, _as_pixels(decoded)))
    names = [f"{height}x{width}" for height, width in vae.layout.shapes]
    values = (psnr_with_interval(torch.cat(parts)) for parts in errors)
    return dict(zip(names, values, strict=True))


def _encode(vae: VQVAE, images_B3YX: Tensor) -> Tensor:
    weight = vae.quant_conv.weight
    pixels = images_B3YX[:, : vae.config.in_channels].to(weight.device)
    return vae.encode((pixels.float() / 127.5 - 1).to(weight.dtype))


def _as_pixels(decoded_BIYX: Tensor) -> Tensor:
    """(B, 3, Y, X) uint8 of images in [0, 1]."""
    return to_uint8(2 * decoded_BIYX.to("cpu", torch.float32) - 1).contiguous()
