"""The data section of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, TypeAlias

from pydantic import ConfigDict, Field

from variant.models.class_names import check_class_names
from variant.models.config import STRICT, require, require_plain_numbers
from variant.models.ranges import (
    CountOrZero,
    NotNegative,
    Share,
    ShareBelowOne,
    check_ranges,
)

IDX_FILES = ("train", "train_labels", "held_out", "held_out_labels")
DISTORTION = ("rotate", "zoom", "shift", "shear")
# Keys of each kind that others do not have.
OWN_KEYS = {
    "digits": set(DISTORTION),
    "folder": {"train", "held_out", "hflip", "randaugment_ops", "randaugment_magnitude"},
    "idx": {*IDX_FILES, "dataset", "class_names", "hflip", *DISTORTION},
    "tokens": {"tokens"},
}
# Keys that change training images, and their values that change none.
AUGMENTATION = {
    "hflip": 0.0,
    "rotate": 0.0,
    "zoom": 0.0,
    "shift": 0.0,
    "shear": 0.0,
    "randaugment_ops": 0,
    "randaugment_magnitude": 0.0,
    "mixup": 0.0,
}
# Of them those that change each image by itself.
OF_EACH_IMAGE = tuple(name for name in AUGMENTATION if name != "mixup")

# Each operation is a pass over the image, and the papers use 2: a slip would run for days.
Operations: TypeAlias = Annotated[int, Field(ge=0, le=100)]
Magnitude: TypeAlias = Annotated[float, Field(ge=0, le=30, allow_inf_nan=False)]
Workers: TypeAlias = Annotated[int, Field(ge=0, le=1024)]


@dataclass(frozen=True)
class DataSection:
    """The source of the images and the augmentation of training images.

    kind: "digits" (scikit-learn's scans), "folder" (one sub-folder of images per class), "idx" (two
        pairs of files in MNIST's format) or "tokens" (shards that `variant tokenize` wrote).
    train: training images: a folder, for kind "folder"; a file, plain or compressed with gzip, for
        kind "idx".
    held_out: held-out images, likewise; they choose the best weights.
    train_labels: file of the training images' labels, for kind "idx".
    held_out_labels: file of the held-out images' labels, for kind "idx".
    dataset: "fashion-mnist" takes the four files of Debian's package dataset-fashion-mnist, for
        kind "idx".
    class_names: names of the classes in the order of their labels, for kind "idx"; those of folders
        are the names of the folders.
    tokens: folder of token shards, for kind "tokens". The keys that change images may stay as they
        were when the tokens were made; their files are not read.
    copies: number of augmented copies of each image that are tokenized before training; 0 tokenizes
        newly augmented images in every epoch. Must be 0 with mixup.
    rotate: largest random rotation in degrees, for kinds "digits" and "idx".
    zoom: largest random change of size, as a share of it, for kinds "digits" and "idx".
    shift: largest random shift, in units of the width, for kinds "digits" and "idx".
    shear: largest random shear, as a slope, for kinds "digits" and "idx".
    hflip: probability of a horizontal flip, for kinds "folder" and "idx".
    randaugment_ops: operations of RandAugment (arXiv 1909.13719) on each image, for kind "folder".
    randaugment_magnitude: magnitude of these operations.
    mixup: alpha of the Beta distribution (arXiv 1710.09412); 0 turns mixup off.
    workers: number of processes that read and augment images ahead of the training, for kind
        "folder"; with torchrun, of each rank. Evaluations read by as many threads. For kind
        "tokens" at most one process reads. 0: the training reads its images or tokens itself.
    max_bad: share of the samples that may be unreadable. Another one takes the place of each; above
        the share the run stops.
    """

    kind: Literal["digits", "folder", "idx", "tokens"]
    train: str | None = None
    held_out: str | None = None
    train_labels: str | None = None
    held_out_labels: str | None = None
    dataset: Literal["fashion-mnist"] | None = None
    class_names: tuple[str, ...] = ()
    tokens: str | None = None
    copies: CountOrZero = 0
    hflip: Share = 0.0
    rotate: NotNegative = 0.0
    zoom: ShareBelowOne = 0.0
    shift: NotNegative = 0.0
    shear: NotNegative = 0.0
    randaugment_ops: Operations = 0
    randaugment_magnitude: Magnitude = 0.0
    mixup: NotNegative = 0.0
    workers: Workers = 4
    max_bad: Share = 0.001

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    def __post_init__(self) -> None:
        require_plain_numbers(self)
        check_ranges(self)
        require(
            not (self.copies and self.mixup),
            "copies must be 0 with mixup, which mixes the pixels of every batch",
            self.copies,
        )
        if self.kind == "tokens":
            require(self.tokens is not None, 'kind "tokens" needs tokens, a folder', None)
            require(self.copies == 0, 'copies must be 0 for kind "tokens"', self.copies)
            return
        for name in sorted(set().union(*OWN_KEYS.values()) - OWN_KEYS[self.kind]):
            value = getattr(self, name)
            require(not value, f'{name} is not for kind "{self.kind}"', value)
        if self.kind == "folder":
            require(
                self.train is not None and self.held_out is not None,
                'train and held_out must name folders for kind "folder"',
                (self.train, self.held_out),
            )
        if self.kind == "idx":
            self._check_idx()

    @property
    def augmentation_of_images(self) -> dict[str, float]:
        """The values of the keys that change each training image by itself."""
        return {name: getattr(self, name) for name in OF_EACH_IMAGE}

    def _check_idx(self) -> None:
        files = [getattr(self, name) for name in IDX_FILES]
        require(
            not any(files) if self.dataset else all(files),
            f'kind "idx" needs either dataset, or all of {", ".join(IDX_FILES)}',
            (self.dataset, *files),
        )
        names = self.class_names
        require(not (self.dataset and names), "class_names must not be given with dataset", names)
        check_class_names("data", names, len(names))
