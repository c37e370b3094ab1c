"""Opening and identifying the data of a recipe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from variant.data.config import DataSection
from variant.data.digits import DigitsData
from variant.data.idx import IdxData
from variant.data.images import FolderData, ImageData
from variant.data.samples import ImageSource, Source
from variant.data.token_source import TokenSource
from variant.errors import UserError

KINDS: dict[str, Callable[[DataSection, int, int, int], ImageData]] = {
    "digits": DigitsData,
    "folder": FolderData,
    "idx": IdxData,
}


def open_data(section: DataSection, image_size: int, channels: int, seed: int) -> ImageData:
    """Open the images of a recipe's section.

    Args:
        image_size: side of the images, pixels.  channels: 1 or 3.  seed: of order and augmentation.
    Raises:
        UserError: a folder is missing or empty, or the two folders have different classes;
            a file is missing or damaged; scikit-learn is not installed.
    """
    if section.kind not in KINDS:
        raise UserError(f'data: kind "{section.kind}" has no images, which this needs')
    return KINDS[section.kind](section, image_size, channels, seed)


def open_source(
    section: DataSection, image_size: int, channels: int, seed: int, *, mixed: bool = True
) -> Source:
    """The samples of a recipe's section; arguments and errors of :func:`open_data`.

    Args:
        mixed: whether training samples are mixed, if the section says so.
    """
    if section.kind == "tokens" and mixed:
        return TokenSource(section, seed)
    data = open_data(section, image_size, channels, seed)
    return ImageSource(data, seed, section.mixup if mixed else 0.0, section.max_bad)


def classes_problem(num_classes: int, source: Source | ImageData) -> str | None:
    """Why a recipe's data are not those of its model, of so many classes; None if they are."""
    if num_classes == source.num_classes:
        return None
    return (
        f"model.num_classes must be {source.num_classes}, as many as the data has "
        f"({source.classes_from}); got {num_classes}"
    )


def data_inputs(source: Source | ImageData) -> dict[str, Any]:
    """Numbers that identify the data of a run: of images in both parts, and a digest.

    The digest of folders covers relative paths, labels and sizes of the files, not the place of the
    folders, and their contents only by :mod:`variant.data.file_stamps`; that of digits covers the
    scans.
    """
    return {
        "num_train": source.num_train,
        "num_held_out": source.num_held_out,
        "data_sha256": source.digest(),
    }


def differing_classes(old: object, new: dict[str, str]) -> list[str]:
    """Keys of :func:`class_digests` whose files differ between two data sets, sorted."""
    before = old if isinstance(old, dict) else {}
    return sorted(str(key) for key in {**before, **new} if before.get(key) != new.get(key))
