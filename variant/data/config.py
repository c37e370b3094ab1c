"""The data section of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import ConfigDict

from variant.models.config import STRICT, require, require_plain_numbers

MAX_WORKERS = 1024  # threads


@dataclass(frozen=True)
class DataSection:
    """The source of the images and the augmentation of training images.

    kind: "digits" (scikit-learn's scans) or "folder" (one sub-folder of images per class).
    train, held_out: folders, for kind "folder".
    copies: number of augmented copies of each image that are tokenized before training; 0 tokenizes
        newly augmented images in every epoch. Must be 0 with mixup.
    rotate, zoom, shift, shear: largest random distortion, for kind "digits": degrees, share of the
        size, share of the width, slope.
    hflip: probability of a horizontal flip, for kind "folder".
    randaugment_ops, randaugment_magnitude: number of operations and their magnitude in [0, 30], for
        kind "folder" (arXiv 1909.13719).
    mixup: alpha of the Beta distribution (arXiv 1710.09412); 0 turns mixup off.
    workers: number of threads that read images, for kind "folder".
    """

    kind: Literal["digits", "folder"]
    train: str | None = None
    held_out: str | None = None
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

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    def __post_init__(self) -> None:
        require_plain_numbers(self)
        for name in ("copies", "rotate", "shift", "shear", "randaugment_ops", "mixup"):
            require(getattr(self, name) >= 0, f"{name} must be >= 0", getattr(self, name))
        require(0 <= self.hflip <= 1, "hflip must be in [0, 1]", self.hflip)
        require(0 <= self.zoom < 1, "zoom must be in [0, 1)", self.zoom)
        magnitude = self.randaugment_magnitude
        require(0 <= magnitude <= 30, "randaugment_magnitude must be in [0, 30]", magnitude)
        require(
            1 <= self.workers <= MAX_WORKERS, f"workers must be in [1, {MAX_WORKERS}]", self.workers
        )
        require(
            not (self.copies and self.mixup),
            "copies must be 0 with mixup, which mixes the pixels of every batch",
            self.copies,
        )
        foreign = {
            "digits": {"hflip": 0, "randaugment_ops": 0, "train": None, "held_out": None},
            "folder": {"rotate": 0, "zoom": 0, "shift": 0, "shear": 0},
        }
        for name, unset in foreign[self.kind].items():
            value = getattr(self, name)
            require(value == unset, f'{name} is not for kind "{self.kind}"', value)
        if self.kind == "folder":
            require(
                self.train is not None and self.held_out is not None,
                'train and held_out must name folders for kind "folder"',
                (self.train, self.held_out),
            )
