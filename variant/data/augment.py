"""Augmentation of training images: RandAugment, random distortion. Mixup is in samples.py.

Every function takes its random generator, or random numbers, as an argument. The augmentation of an
image is therefore a function of (seed, epoch, image), independent of batches and workers.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

MAX_MAGNITUDE = 30.0  # ours: as many as torchvision's bins; the paper gives only "9"
GREY = (128, 128, 128)


def _affine(image: Image.Image, a: float, b: float, c: float, d: float, e: float, f: float):
    return image.transform(image.size, Image.Transform.AFFINE, (a, b, c, d, e, f), fillcolor=GREY)


def _enhance(kind: Callable[[Image.Image], ImageEnhance._Enhance]):
    return lambda image, strength, sign: kind(image).enhance(1 + sign * 0.9 * strength)


# name: (image, strength in [0, 1], sign) -> image. The operations are those of RandAugment; their
# ranges, reached at strength 1, are ours.
RAND_AUGMENT_OPS: dict[str, Callable[[Image.Image, float, int], Image.Image]] = {
    "identity": lambda image, strength, sign: image,
    "autocontrast": lambda image, strength, sign: ImageOps.autocontrast(image),
    "equalize": lambda image, strength, sign: ImageOps.equalize(image),
    "rotate": lambda image, strength, sign: image.rotate(sign * 30 * strength, fillcolor=GREY),
    "solarize": lambda image, strength, sign: ImageOps.solarize(image, int(256 * (1 - strength))),
    "color": _enhance(ImageEnhance.Color),
    "posterize": lambda image, strength, sign: ImageOps.posterize(image, 8 - round(4 * strength)),
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear_x": lambda image, strength, sign: _affine(image, 1, sign * 0.3 * strength, 0, 0, 1, 0),
    "shear_y": lambda image, strength, sign: _affine(image, 1, 0, 0, sign * 0.3 * strength, 1, 0),
    "translate_x": lambda image, strength, sign: _affine(
        image, 1, 0, sign * 0.45 * strength * image.width, 0, 1, 0
    ),
    "translate_y": lambda image, strength, sign: _affine(
        image, 1, 0, 0, 0, 1, sign * 0.45 * strength * image.height
    ),
}


def rand_augment(
    image: Image.Image, rng: np.random.Generator, num_ops: int, magnitude: float
) -> Image.Image:
    """Apply ``num_ops`` operations, drawn uniformly, each with a random sign.

    Source: RandAugment, arXiv 1909.13719.

    Args:
        image: RGB.  magnitude: of the operations, in [0, 30].
    """
    names = list(RAND_AUGMENT_OPS)
    for _ in range(num_ops):
        op = RAND_AUGMENT_OPS[names[int(rng.integers(len(names)))]]
        image = op(image, magnitude / MAX_MAGNITUDE, 1 if rng.random() < 0.5 else -1)
    return image


def distort(
    images_BIYX: Tensor,
    draws_B5: Tensor,
    *,
    rotate: float,
    zoom: float,
    shift: float,
    shear: float,
) -> Tensor:
    """Rotate, scale, shift and shear each image; pixels from outside the image are 0.

    Args:
        images_BIYX: float32.
        draws_B5: uniform numbers in [-1, 1]: angle, zoom, shear, shift right, shift down.
        rotate: degrees.  zoom: share of the size.  shift: share of the width.  shear: slope.
    """
    angle, size, slope, right, down = draws_B5.float().unbind(1)
    angle = angle * math.radians(rotate)
    size, slope = 1 + size * zoom, slope * shear
    # In grid_sample's coordinates, from -1 to 1, a shift by the whole width is 2.
    row_x = torch.stack((angle.cos() / size, (slope - angle.sin()) / size, 2 * shift * right), 1)
    row_y = torch.stack((angle.sin() / size, angle.cos() / size, 2 * shift * down), 1)
    grid = F.affine_grid(torch.stack((row_x, row_y), 1), list(images_BIYX.shape), False)
    return F.grid_sample(images_BIYX, grid, align_corners=False)
