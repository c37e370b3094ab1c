"""Opening and identifying the data of a recipe."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from variant.data.config import DataSection
from variant.data.digits import LEVELS, DigitsData, load_scans
from variant.data.images import FolderData, ImageData


def open_data(section: DataSection, image_size: int, channels: int, seed: int) -> ImageData:
    """Open the data of a recipe's section.

    Args:
        image_size: side of the images, pixels.  channels: 1 or 3.  seed: of order and augmentation.
    Raises:
        UserError: a folder is missing or empty, or the two folders have different classes;
            scikit-learn is not installed.
    """
    kind = DigitsData if section.kind == "digits" else FolderData
    return kind(section, image_size, channels, seed)


def data_inputs(data: ImageData) -> dict[str, Any]:
    """Numbers that identify the data of a run: of images in both parts, and a digest.

    The digest of folders covers relative paths, labels and sizes of the files, not their contents
    and not the place of the folders; that of digits covers the scans.
    """
    if isinstance(data, FolderData):
        digest = data.digest()
    else:
        scans = load_scans()
        values = (scans.images * LEVELS).to(torch.uint8).numpy().tobytes()
        digest = hashlib.sha256(values + scans.labels.numpy().tobytes()).hexdigest()
    return {
        "num_train": data.num_train,
        "num_held_out": data.num_held_out,
        "data_sha256": digest,
    }


def class_digests(data: ImageData) -> dict[str, str]:
    """A digest of every class of folder data, by "train/CLASS" and "held_out/CLASS"."""
    return data.class_digests() if isinstance(data, FolderData) else {}


def differing_classes(old: object, new: dict[str, str]) -> list[str]:
    """Keys of :func:`class_digests` whose files differ between two data sets, sorted."""
    before = old if isinstance(old, dict) else {}
    return sorted(str(key) for key in {**before, **new} if before.get(key) != new.get(key))
