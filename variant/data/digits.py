"""The data of the digits model: scikit-learn's handwritten digits.

1,797 scans of 8x8 pixels with values 0..16 (UCI "Optical Recognition of Handwritten Digits"). A
tenth is held out. Training images are enlarged scans: the area means of an image give its scan.

Axes: B images, I channels, Y X pixels, N scans.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from variant.data.augment import distort
from variant.data.bad_items import BadItem
from variant.data.config import DataSection
from variant.data.file_stamps import FileStamps
from variant.data.images import STREAM_AUGMENT, Indices, stream
from variant.errors import UserError

SIDE = 8
LEVELS = 16
NUM_CLASSES = 10
SPLIT_SEED = 0
# Images are distorted at this many times the size of the scans. At the size of the scans,
# interpolation would blur strokes, which are one pixel wide.
FINE = 4


@dataclass(frozen=True)
class Scans:
    """Images (N, 8, 8), float32 in [0, 1], and labels (N,), int64, of both parts of the data."""

    train_images: Tensor
    train_labels: Tensor
    held_out_images: Tensor
    held_out_labels: Tensor

    @property
    def images(self) -> Tensor:
        """All scans, training part first."""
        return torch.cat((self.train_images, self.held_out_images))

    @property
    def labels(self) -> Tensor:
        """Labels of all scans, training part first."""
        return torch.cat((self.train_labels, self.held_out_labels))


@cache
def load_scans() -> Scans:
    """The scans; the same tenth of them is held out in every run.

    Raises:
        UserError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("the digits need scikit-learn: pip install scikit-learn") from error
    digits: Any = load_digits()
    images = torch.from_numpy(digits.images).float() / LEVELS
    labels = torch.from_numpy(digits.target).long()
    order = torch.from_numpy(np.random.default_rng(SPLIT_SEED).permutation(len(images)))
    held_out, train = order[: len(order) // 10], order[len(order) // 10 :]
    return Scans(images[train], labels[train], images[held_out], labels[held_out])


def enlarge(scans_NYX: Tensor, size: int) -> Tensor:
    """Smooth images (N, 1, size, size) in [0, 1] whose means over areas are the scans.

    Bicubic interpolation, then eight corrections by the difference between scan and area means.
    Clamping to [0, 1] leaves an error of about 1 %.

    Args:
        size: a multiple of 8, pixels.
    """
    scans = scans_NYX.unsqueeze(1)
    images = F.interpolate(scans, size=(size, size), mode="bicubic")
    for _ in range(8):
        error = scans - shrink(images.clamp(0, 1)).unsqueeze(1)
        images = images.clamp(0, 1) + F.interpolate(error, size=(size, size), mode="nearest")
    return images.clamp(0, 1)


def shrink(images_BIYX: Tensor) -> Tensor:
    """Scans (B, 8, 8) from images of any size: the mean over channels, then over areas."""
    return F.adaptive_avg_pool2d(images_BIYX.float().mean(dim=1, keepdim=True), SIDE).squeeze(1)


class DigitsData:
    """Enlarged scans; implements :class:`variant.data.images.ImageData`."""

    def __init__(self, section: DataSection, image_size: int, channels: int, seed: int) -> None:
        if image_size % SIDE:
            raise UserError(
                f"data: digits need images whose side is a multiple of {SIDE}; the VQ-VAE's are "
                f"{image_size}"
            )
        self.section, self.channels, self.seed = section, channels, seed
        scans = load_scans()
        self.num_train, self.num_held_out = len(scans.train_labels), len(scans.held_out_labels)
        self.num_classes = NUM_CLASSES
        self.classes = [str(digit) for digit in range(NUM_CLASSES)]
        self.classes_from = 'digits of data.kind "digits"'
        self.train_labels, self.held_out_labels = scans.train_labels, scans.held_out_labels
        self.image_size = image_size
        self._fine = enlarge(scans.train_images, SIDE * FINE)
        self._train = enlarge(scans.train_images, image_size)
        self._held_out = enlarge(scans.held_out_images, image_size)

    def train(self, indices: Indices, epoch: int) -> tuple[Tensor, Tensor]:
        index = torch.as_tensor(np.asarray(indices), dtype=torch.int64, device="cpu")
        # Drawn for all scans, so that an image does not depend on the other indices.
        draws = stream(self.seed, epoch, STREAM_AUGMENT).uniform(-1, 1, (self.num_train, 5))
        images = distort(
            self._fine[index],
            torch.from_numpy(draws)[index],
            rotate=self.section.rotate,
            zoom=self.section.zoom,
            shift=self.section.shift,
            shear=self.section.shear,
        )
        images = F.adaptive_avg_pool2d(images, self.image_size)
        return self._to_range(images), self.train_labels[index]

    def held_out(self, indices: Indices) -> tuple[Tensor, Tensor]:
        index = torch.as_tensor(np.asarray(indices), dtype=torch.int64, device="cpu")
        return self._to_range(self._held_out[index]), self.held_out_labels[index]

    def take_bad(self) -> tuple[BadItem, ...]:
        return ()

    def digest(self) -> str:
        """SHA-256 of all scans and labels."""
        scans = load_scans()
        values = (scans.images * LEVELS).to(torch.uint8).numpy().tobytes()
        return hashlib.sha256(values + scans.labels.numpy().tobytes()).hexdigest()

    def class_digests(self) -> dict[str, str]:
        return {}

    def file_stamps(self) -> FileStamps:
        return FileStamps()  # the digest covers the contents

    def scans(self) -> Tensor:
        """The training scans without augmentation, (N, I, Y, X) in [-1, 1]."""
        return self._to_range(self._train)

    def _to_range(self, images: Tensor) -> Tensor:
        return (images.clamp(0, 1) * 2 - 1).expand(-1, self.channels, -1, -1)
