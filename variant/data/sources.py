"""Opening the data that a recipe names."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from variant.data.config import DataSection
from variant.data.digits import LEVELS, DigitsData, load_scans
from variant.data.images import FolderData, ImageData


def open_data(section: DataSection, image_size: int, channels: int, seed: int) -> ImageData:
    """The data that a section of a recipe describes.

    Args:
        image_size: side of the images, pixels.  channels: 1 or 3.  seed: of order and augmentation.
    Raises:
        UserError: a folder that is missing, empty or disagrees with its partner; scikit-learn is
            not installed.
    """
    kind = DigitsData if section.kind == "digits" else FolderData
    return kind(section, image_size, channels, seed)


def data_inputs(data: ImageData) -> dict[str, Any]:
    """What identifies the data of a run: both numbers of images, and a digest.

    The digest is of relative paths and labels for folders (not of what the files hold), of the
    scans themselves for digits.
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
