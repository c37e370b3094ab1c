"""The data section of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import ConfigDict

from variant.models.class_names import check_class_names
from variant.models.config import STRICT, require, require_plain_numbers
from variant.models.ranges import Share, check_ranges

MAX_WORKERS = 1024  # threads
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

MAX_OPS = 100  # of RandAugment on an image


@dataclass(frozen=True)
class DataSection:
    """The source of the images and the augmentation of training images.

    kind: "digits" (scikit-learn's scans), "folder" (one sub-folder of images per class), "idx" (two
        pairs of files in MNIST's format) or "tokens" (shards that `variant tokenize` wrote).
    train, held_out: folders, for kind "folder"; files of images, plain or compressed with gzip, for
        kind "idx".
    train_labels, held_out_labels: files of labels, for kind "idx".
    dataset: "fashion-mnist" takes the four files of Debian's package dataset-fashion-mnist, for
        kind "idx".
    class_names: names of the classes in the order of their labels, for kind "idx"; those of folders
        are the names of the folders.
    tokens: folder of token shards, for kind "tokens". The keys that change images may stay as they
        were when the tokens were made; their files are not read.
    copies: number of augmented copies of each image that are tokenized before training; 0 tokenizes
        newly augmented images in every epoch. Must be 0 with mixup.
    rotate, zoom, shift, shear: largest random distortion, for kinds "digits" and "idx": degrees,
        share of the size, share of the width, slope.
    hflip: probability of a horizontal flip, for kinds "folder" and "idx".
    randaugment_ops, randaugment_magnitude: number of operations and their magnitude in [0, 30], for
        kind "folder" (arXiv 1909.13719).
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
    copies: int = 0
    hflip: float = 0.0
    rotate: float = 0.0
    zoom: float = 0.0
    shift: float = 0.0
    shear: float = 0.0
    randaugment_ops: int = 0
    randaugment_magnitude: float = 0.0
    mixup: float = 0.0
    workers: int = 4
    max_bad: Share = 0.001

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    def __post_init__(self) -> None:
        require_plain_numbers(self)
        check_ranges(self)
        for name in ("copies", "rotate", "shift", "shear", "randaugment_ops", "mixup"):
            require(getattr(self, name) >= 0, f"{name} must be >= 0", getattr(self, name))
        require(0 <= self.hflip <= 1, "hflip must be in [0, 1]", self.hflip)
        require(0 <= self.zoom < 1, "zoom must be in [0, 1)", self.zoom)
        # Each is a pass over the image, and the papers use 2: a slip would run for days.
        limit = f"randaugment_ops must be at most {MAX_OPS}"
        require(self.randaugment_ops <= MAX_OPS, limit, self.randaugment_ops)
        magnitude = self.randaugment_magnitude
        require(0 <= magnitude <= 30, "randaugment_magnitude must be in [0, 30]", magnitude)
        require(
            0 <= self.workers <= MAX_WORKERS, f"workers must be in [0, {MAX_WORKERS}]", self.workers
        )
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
