"""Images from IDX files, the format of MNIST and its relatives.

A file holds a magic number (two zeros, the type of the values, the number of axes), the size of
each axis as a big-endian 32-bit integer, and the values. Images have the axes (image, row, column),
labels one; both are unsigned bytes. Files may be compressed with gzip.
Source: http://yann.lecun.com/exdb/mnist

Axes: B images, I channels, Y X pixels, N images of a part.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from variant.data.augment import distort
from variant.data.bad_items import BadItem
from variant.data.config import DataSection
from variant.data.file_stamps import FileStamps
from variant.data.images import HELD_OUT_SEED, STREAM_AUGMENT, Indices, stream
from variant.engine.memory import check_fits
from variant.errors import UserError
from variant.models.class_names import check_class_names
from variant.paths import open_regular, path_kind, shown
from variant_kernels.wording import counted

UNSIGNED_BYTE = 0x08
GZIP, GZIP_ENDING = b"\x1f\x8b", ".gz"
# deflate's best: a compressed file cannot hold more than this many times its own size.
MAX_RATIO = 1032
CHUNK = 2**24  # bytes that are read at once

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
FASHION_MNIST_PACKAGE = "dataset-fashion-mnist"
FASHION_MNIST_FILES = {
    "train": "train-images-idx3-ubyte.gz",
    "train_labels": "train-labels-idx1-ubyte.gz",
    "held_out": "t10k-images-idx3-ubyte.gz",
    "held_out_labels": "t10k-labels-idx1-ubyte.gz",
}
FASHION_MNIST_CLASSES = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)


def read_idx(path: str | os.PathLike[str], axes: int) -> np.ndarray:
    """The values of an IDX file of unsigned bytes, plain or compressed with gzip.

    Args:
        axes: that it must have: 3 for images, 1 for labels.
    Raises:
        UserError: missing, no IDX file, other values or axes, cut off or too long, or larger than
            the free memory.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        compressed = file.read(len(GZIP)) == GZIP
        file.seek(0)
        # gzip.open would close the file too early on errors.
        opened = cast("BinaryIO", gzip.GzipFile(fileobj=file)) if compressed else file
        try:
            return _read(shown(path), opened, axes, size * (MAX_RATIO if compressed else 1))
        except (EOFError, zlib.error, OSError, MemoryError) as error:
            raise UserError(
                f"{shown(path)}: cannot be read: {error or type(error).__name__}"
            ) from None


def _read(where: str, file: BinaryIO, axes: int, most: int) -> np.ndarray:
    """The values.  Args: most: bytes that the file can hold at the utmost."""
    magic = file.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0":
        raise UserError(f"{where}: is no IDX file: it must begin with two zero bytes")
    if magic[2] != UNSIGNED_BYTE or magic[3] != axes:
        raise UserError(
            f"{where}: must hold unsigned bytes with {axes} axes (magic number 0x08{axes:02x}); "
            f"got 0x{magic[2]:02x}{magic[3]:02x}"
        )
    header = file.read(4 * axes)
    if len(header) < 4 * axes:
        raise UserError(f"{where}: ends within its header")
    shape = np.frombuffer(header, ">u4").tolist()
    expected = math.prod(shape)
    if expected == 0:
        raise UserError(f"{where}: must not be empty; its sizes are {tuple(shape)}")
    too_short = (
        f"{where}: is cut off: its sizes {tuple(shape)} need {counted(expected, 'byte')} of values"
    )
    if expected > most:
        raise UserError(too_short)
    check_fits(where, "its values", expected, torch.device("cpu"))
    values = bytearray()
    while len(values) < expected:
        chunk = file.read(min(CHUNK, expected - len(values)))
        if not chunk:
            raise UserError(f"{too_short}; it has {len(values):,}")
        values += chunk
    if file.read(1):
        raise UserError(f"{where}: is longer than its sizes {tuple(shape)} say")
    return np.frombuffer(values, np.uint8).reshape(shape)


def paths_of(section: DataSection) -> dict[str, str]:
    """The four files of a section, by its keys; those of Debian's package where it names them.

    Raises:
        UserError: the package is not installed.
    """
    if section.dataset is None:
        return {name: cast("str", getattr(section, name)) for name in FASHION_MNIST_FILES}
    paths = {name: str(FASHION_MNIST / file) for name, file in FASHION_MNIST_FILES.items()}
    for path in paths.values():
        if path_kind(path) is None:
            raise UserError(
                f"{path}: no such file; install Debian's package {FASHION_MNIST_PACKAGE} (apt "
                f"install {FASHION_MNIST_PACKAGE}), or give the four files as "
                f"{', '.join(FASHION_MNIST_FILES)} in place of dataset"
            )
    return paths


def labels_beside(images: Path) -> Path | None:
    """The file of labels that goes with a file of images, as MNIST names them; None if none does.

    ``train-images-idx3-ubyte.gz`` has ``train-labels-idx1-ubyte.gz``, with or without ".gz".
    """
    name = images.name.removesuffix(GZIP_ENDING)
    if "images" not in name or "idx3" not in name:
        return None
    return _either(images.parent, name.replace("images", "labels").replace("idx3", "idx1"))


def files_in(folder: Path) -> dict[str, str]:
    """The files of MNIST's names in a folder by their keys in a data section; {} if none is there.

    Raises:
        UserError: some are there and others are not.
    """
    wanted = {key: name.removesuffix(GZIP_ENDING) for key, name in FASHION_MNIST_FILES.items()}
    found = {key: _either(folder, name) for key, name in wanted.items()}
    missing = [wanted[key] for key, path in found.items() if path is None]
    if missing and len(missing) < len(found):
        raise UserError(
            f"{shown(folder)}: has files of MNIST's names, but not {missing[0]} or "
            f"{missing[0]}{GZIP_ENDING}"
        )
    return {key: str(path) for key, path in found.items() if path is not None}


def section_of(folder: Path) -> DataSection | None:
    """The data section of a folder that holds the four files of MNIST's names; None of another.

    Raises:
        UserError: the folder holds some of the files.
    """
    files = files_in(folder)
    if not files:
        return None
    if folder.resolve() == FASHION_MNIST.resolve():
        return DataSection("idx", dataset="fashion-mnist")
    train, held_out = files["train"], files["held_out"]
    return DataSection("idx", train, held_out, files["train_labels"], files["held_out_labels"])


def _either(folder: Path, name: str) -> Path | None:
    for path in (folder / name, folder / f"{name}{GZIP_ENDING}"):
        if path.is_file():
            return path
    return None


class IdxData:
    """Images of two pairs of IDX files; implements :class:`variant.data.images.ImageData`.

    Images are padded with zeros to the model's image size; both sides get as much. Training images
    are flipped and distorted as the section says. The order of held-out images is random and fixed.

    pixels: rows and columns of the training images before they are padded.
    """

    def __init__(self, section: DataSection, image_size: int, channels: int, seed: int) -> None:
        self.section, self.channels, self.seed = section, channels, seed
        self.image_size = image_size
        paths = paths_of(section)
        self._train, self.train_labels = self._pair(paths["train"], paths["train_labels"])
        images, labels = self._pair(paths["held_out"], paths["held_out_labels"])
        order = np.random.default_rng(HELD_OUT_SEED).permutation(len(images))
        self._held_out, self.held_out_labels = images[order], labels[torch.from_numpy(order)]
        self.num_train, self.num_held_out = len(self._train), len(self._held_out)
        self.pixels: tuple[int, int] = self._train.shape[1:]
        self.classes, self.classes_from = self._names(paths)
        self.num_classes = len(self.classes)

    def train(self, indices: Indices, epoch: int) -> tuple[Tensor, Tensor]:
        index = np.asarray(indices)
        images = self._padded(self._train[index])
        section = self.section
        draws_N6 = torch.from_numpy(_draws(self.seed, epoch, self.num_train)[index])
        strengths = (section.rotate, section.zoom, section.shift, section.shear)
        if any(strengths):
            rotate, zoom, shift, shear = strengths
            images = distort(
                images, draws_N6[:, :5], rotate=rotate, zoom=zoom, shift=shift, shear=shear
            )
        flipped = draws_N6[:, 5] < 2 * section.hflip - 1
        images = torch.where(flipped.view(-1, 1, 1, 1), images.flip(3), images)
        return self._to_range(images), self.train_labels[torch.from_numpy(index)]

    def held_out(self, indices: Indices) -> tuple[Tensor, Tensor]:
        index = np.asarray(indices)
        images = self._padded(self._held_out[index])
        return self._to_range(images), self.held_out_labels[torch.from_numpy(index)]

    def take_bad(self) -> tuple[BadItem, ...]:
        return ()

    def digest(self) -> str:
        """SHA-256 of all values."""
        return hashlib.sha256("\n".join(self.class_digests().values()).encode()).hexdigest()

    def class_digests(self) -> dict[str, str]:
        """SHA-256 of images and labels of each part."""
        hashes: dict[str, Any] = {}
        for part, images, labels in (
            ("train", self._train, self.train_labels),
            ("held_out", self._held_out, self.held_out_labels),
        ):
            hashes[part] = hashlib.sha256(str(images.shape).encode())
            hashes[part].update(np.ascontiguousarray(images).data)
            hashes[part].update(labels.numpy().tobytes())
        return {part: sha256.hexdigest() for part, sha256 in hashes.items()}

    def file_stamps(self) -> FileStamps:
        return FileStamps()  # the digest covers the contents

    def _pair(self, images: str, labels: str) -> tuple[np.ndarray, Tensor]:
        images_NYX, labels_N = read_idx(images, 3), read_idx(labels, 1)
        if len(images_NYX) != len(labels_N):
            raise UserError(
                f"{shown(labels)}: must have a label for each of the "
                f"{counted(len(images_NYX), 'image')} in {shown(images)}; it has {len(labels_N):,}"
            )
        if max(images_NYX.shape[1:]) > self.image_size:
            raise UserError(
                f"{shown(images)}: its images must be at most as large as the model's, "
                f"{self.image_size} x {self.image_size}; they are "
                f"{images_NYX.shape[2]} x {images_NYX.shape[1]} pixels"
            )
        return images_NYX, torch.from_numpy(labels_N.astype(np.int64))

    def _names(self, paths: dict[str, str]) -> tuple[list[str], str]:
        """The names of the classes: given, of the data set, or the labels themselves; and which."""
        names, origin = self.section.class_names, "names in data.class_names"
        if self.section.dataset:
            names, origin = FASHION_MNIST_CLASSES, f'classes of dataset "{self.section.dataset}"'
        labels = {"train_labels": self.train_labels, "held_out_labels": self.held_out_labels}
        highest = {key: int(values.max()) for key, values in labels.items()}
        count = len(names) or highest["train_labels"] + 1
        for key, high in highest.items():
            if high >= count:
                what = "the names of its classes" if names else "the labels in the training part"
                raise UserError(
                    f"{shown(paths[key])}: its labels must be below {count}, by {what}; the "
                    f"highest is {high}"
                )
        if not names:
            names = tuple(str(label) for label in range(count))
            origin = f"labels up to {count - 1} in {shown(paths['train_labels'])}"
        return list(check_class_names("data", names, count)), origin

    def _padded(self, images_NYX: np.ndarray) -> Tensor:
        """Images (B, 1, Y, X) in [0, 1] of the model's size."""
        rows, columns = (self.image_size - side for side in images_NYX.shape[1:])
        padding = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
        return F.pad(torch.from_numpy(images_NYX).float() / 255, padding).unsqueeze(1)

    def _to_range(self, images: Tensor) -> Tensor:
        return (images.clamp(0, 1) * 2 - 1).expand(-1, self.channels, -1, -1)


@lru_cache(maxsize=2)
def _draws(seed: int, epoch: int, count: int) -> np.ndarray:
    """Numbers in [-1, 1) of every image, (count, 6), so that one does not depend on the others."""
    draws = stream(seed, epoch, STREAM_AUGMENT).uniform(-1, 1, (count, 6))
    draws.flags.writeable = False
    return draws
