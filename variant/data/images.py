"""The interface of image data, and images from folders.

The order of images and the augmentation of each are functions of (seed, epoch, index). A run can
therefore stop and resume at any step, and the number of workers does not change the images.

Axes: B images, I channels, Y X pixels, L tokens of all scales.
"""

from __future__ import annotations

import hashlib
import os
import struct
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import get_worker_info

from variant.data.augment import rand_augment
from variant.data.bad_items import BadItem
from variant.data.config import DataSection
from variant.data.file_stamps import FileStamps, file_stamps, file_stats
from variant.errors import UserError
from variant.models.class_names import is_name
from variant.paths import open_regular, shown

# Independent random streams of one (seed, epoch), one for each use.
STREAM_ORDER, STREAM_AUGMENT, STREAM_COPY, STREAM_MIXUP = 1, 2, 3, 4
STREAM_REPLACE = 7

HELD_OUT_SEED = 0  # of the order of held-out images, which is the same for every recipe
SAMPLE_SEED = 0  # of the sample of training images that is evaluated at the end
MAX_REPLACEMENTS = 8  # images that are tried in place of one
MAX_NAMED = 3  # of the images that are passed over

Indices = Sequence[int] | np.ndarray

# Exceptions of PIL for damaged files and for images that are suspiciously large.
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    OverflowError,
    MemoryError,
    struct.error,
    Image.DecompressionBombError,
)
WIDE_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
_FILTERS = Lock()
_told: set[str] = set()  # warnings that were given: an image is read in every epoch
SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".bmp")
# Pillow's names of the formats that files with these endings are taken to hold; folders in use have
# mixed them up. Not all that Pillow knows: for an EPS file it starts Ghostscript, a program that
# runs what the file says.
FORMATS = ("BMP", "DIB", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
# With those of images that are not read.
ALL_SUFFIXES = (
    *SUFFIXES,
    *(".avif", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jxl", ".pgm", ".ppm"),
    *(".tga", ".tif", ".tiff"),
)
MAX_PIXELS = 2**28  # of an image after resizing; only very long and narrow ones have more
# The EXIF tag of the orientation, and what turns each of its values upright.
ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def stream(seed: int, epoch: int, *which: int) -> np.random.Generator:
    """A random generator for one use; ``which`` ends with one of the STREAM constants."""
    return np.random.default_rng((seed, epoch, *which))


def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order in which an epoch visits its images, (count,) int64."""
    return stream(seed, epoch, STREAM_ORDER).permutation(count)


def sample_order(count: int) -> np.ndarray:
    """The order of training images whose first ones are evaluated at the end, (count,) int64."""
    return np.random.default_rng(SAMPLE_SEED).permutation(count)


class ImageData(Protocol):
    """Images in [-1, 1], float32 (B, I, Y, X), with labels (B,) int64.

    classes: names of the classes, in the order of their labels.
    classes_from: what their number comes from, for messages: a folder, a file, or a recipe's key.
    """

    num_train: int
    num_held_out: int
    num_classes: int
    classes: list[str]
    classes_from: str
    train_labels: Tensor
    held_out_labels: Tensor

    def train(self, indices: Indices, epoch: int) -> tuple[Tensor, Tensor]:
        """Training images, augmented as in that epoch."""
        ...

    def held_out(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """Held-out images, not augmented."""
        ...

    def take_bad(self) -> tuple[BadItem, ...]:
        """Files that could not be read since the last call, in whose place others were."""
        ...

    def digest(self) -> str:
        """SHA-256 that identifies the data, wherever it lies."""
        ...

    def class_digests(self) -> dict[str, str]:
        """SHA-256 of the parts of the data by name, for messages; {} where there are none."""
        ...

    def file_stamps(self) -> FileStamps:
        """What tells that files were replaced, where the digest does not read them."""
        ...


@contextmanager
def _key(name: str) -> Iterator[None]:
    """Within the block, an error of a folder also names the recipe's key."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def list_images(folder: str | Path) -> tuple[list[Path], list[int], list[str]]:
    """Files of a folder with one sub-folder per class: paths, labels, class names, all sorted.

    Hidden folders and files, whose names start with a dot, are passed over.

    Warns:
        RuntimeWarning: images are passed over: by their endings, or because they do not lie in the
            folder of a class but above or below one.
    Raises:
        UserError: no such folder, no sub-folders, a class without images, or an image that is no
            regular file.
    """
    folder = Path(folder)
    try:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder of images")
        classes = sorted(path.name for path in _visible(folder) if path.is_dir())
        if not classes:
            raise UserError(f"{folder}: must hold one sub-folder of images per class; it has none")
        unnameable = next((name for name in classes if not is_name(name)), None)
        if unnameable is not None:
            raise UserError(
                f"{folder}: the name of {shown(unnameable)} must be text in UTF-8 without control "
                "characters"
            )
        paths: list[Path] = []
        labels: list[int] = []
        over = [path for path in _visible(folder) if _is_image(path) and path.is_file()]
        for label, name in enumerate(classes):
            files: list[Path] = []
            for path in sorted(_visible(folder / name)):
                if path.suffix.lower() in SUFFIXES:
                    files.append(path)
                elif _is_image(path):
                    over.append(path)
                elif path.is_dir() and os.access(path, os.R_OK | os.X_OK):
                    over += sorted(inner for inner in _visible(path) if _is_image(inner))
            if not files:
                raise UserError(f"{folder / name}: holds no image ({', '.join(SUFFIXES)})")
            for path in files:
                if not path.is_file():
                    raise UserError(f"{path}: must be a regular file, as its name is an image's")
            paths += files
            labels += [label] * len(files)
    except OSError as error:
        raise UserError(f"{folder}: cannot be read: {error.strerror or error}") from None
    if over:
        where = ", and lies in the folder of its class"
        warnings.warn(passed_over(folder, over) + where, RuntimeWarning, stacklevel=2)
    return paths, labels, classes


def passed_over(folder: Path, over: Sequence[Path]) -> str:
    """A message that names some of the images of a folder that are not read."""
    names = ", ".join(shown(path.relative_to(folder)) for path in over[:MAX_NAMED])
    more = f" and {len(over) - MAX_NAMED:,} more" if len(over) > MAX_NAMED else ""
    return f"{shown(folder)}: passes over {names}{more}: an image ends in {', '.join(SUFFIXES)}"


def open_image(file: BinaryIO, name: str | Path) -> Image.Image:
    """``Image.open``, which reads the header, without its warning of many pixels.

    The content decides the format, not the ending, but only among :data:`FORMATS`.

    Args:
        name: of the file, which Pillow's warnings lack.
    """
    with _named_warnings(name):
        return Image.open(file, "r", FORMATS)


@contextmanager
def _named_warnings(name: str | Path) -> Iterator[None]:
    """Pillow's warnings in the block are given after it, once, with the name of the file.

    The filters of warnings are those of the process, and images are read by several threads: one
    thread at a time, so nothing that takes long belongs into the block.
    """
    heard: list[warnings.WarningMessage] = []
    try:
        with _FILTERS, warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            yield
    finally:
        for warning in heard:
            if "PIL" not in Path(warning.filename).parts:  # of another thread
                at = warning.filename, warning.lineno
                warnings.warn_explicit(warning.message, warning.category, *at)
            elif warning.category is not Image.DecompressionBombWarning:
                text = f"{shown(name)}: {' '.join(str(warning.message).split())}"
                if text not in _told:
                    _told.add(text)
                    warnings.warn(text, RuntimeWarning, stacklevel=4)


def wide_mode(image: Image.Image) -> str | None:
    """The mode of an image of more than 8 bits per channel; None of others.

    Of an image that was opened and not yet read: Pillow has no mode for 16 bits of several
    channels, and cuts them to 8 when it reads them.
    """
    if image.mode in WIDE_MODES:
        return image.mode
    raw = (tile[3] for tile in getattr(image, "tile", ()))
    return next((mode for mode in raw if isinstance(mode, str) and mode.endswith(";16B")), None)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in ALL_SUFFIXES


def _visible(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if not path.name.startswith(".")]


def upright(image: Image.Image, name: str | Path) -> Image.Image:
    """The image as its EXIF orientation says; without one, or with a damaged one, unchanged.

    Args:
        name: of the file, for a warning that its EXIF is damaged.
    """
    image.load()  # getexif reads the pixels of a PNG before it finds what follows them
    try:
        with _named_warnings(name):
            orientation = image.getexif().get(ORIENTATION)
    except UNREADABLE:
        return image
    turn = UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def opaque(image: Image.Image, name: str | Path) -> Image.Image:
    """The image of a file upright in RGB, its alpha left out."""
    image = upright(image, name)
    # Pillow warns of the alpha of a palette that is left out, without the file's name.
    image.info.pop("transparency", None)
    return image.convert("RGB")


class _Paths(Sequence[Path]):
    """Paths kept as text: a worker would take half a minute to unpickle a million of them."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._names = paths._names if isinstance(paths, _Paths) else [os.fspath(p) for p in paths]

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: Any) -> Any:
        names = self._names[index]
        return Path(names) if isinstance(names, str) else [Path(name) for name in names]


class FolderData:
    """Images from two folders with one sub-folder per class; implements :class:`ImageData`.

    Images are turned upright by their EXIF orientation, then scaled so that the shorter side is 9/8
    (ours) of the model's image size. Training images are cropped at random, flipped and
    RandAugmented; held-out images are cropped at the centre. The order of held-out images is random
    and fixed, so that the first few show all classes.

    In place of an image that cannot be read comes another of its class, which (seed, epoch, index)
    determine; :meth:`take_bad` names the image.
    """

    def __init__(self, section: DataSection, image_size: int, channels: int, seed: int) -> None:
        if section.train is None or section.held_out is None:
            raise UserError('data: train and held_out must name folders for kind "folder"')
        self.section, self.image_size, self.channels = section, image_size, channels
        self.seed = seed
        with _key("data.train"):
            self.paths, labels, classes = list_images(section.train)
        with _key("data.held_out"):
            self.held_out_paths, held_out_labels, others = list_images(section.held_out)
        if classes != others:
            differing = sorted(set(classes) ^ set(others))
            raise UserError(
                f"{section.held_out}: must have the classes of {section.train}; "
                f"only in one of them: {', '.join(differing[:5])}"
            )
        self.num_train, self.num_held_out = len(self.paths), len(self.held_out_paths)
        self.classes, self.num_classes = classes, len(classes)
        self.classes_from = f"sub-folders of {shown(section.train)}"
        self.train_labels = torch.tensor(labels, device="cpu")
        order = np.random.default_rng(HELD_OUT_SEED).permutation(self.num_held_out)
        self.held_out_paths = [self.held_out_paths[index] for index in order]
        self.held_out_labels = torch.tensor(held_out_labels, device="cpu")[torch.from_numpy(order)]
        self._bad: list[BadItem] = []
        self._pool: tuple[int, ThreadPoolExecutor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        paths = {"paths": _Paths(self.paths), "held_out_paths": _Paths(self.held_out_paths)}
        members = {name: value for name, value in self.__dict__.items() if name != "_stats"}
        return {**members, **paths, "_bad": [], "_pool": None}

    def train(self, indices: Indices, epoch: int) -> tuple[Tensor, Tensor]:
        def read(index: int) -> Tensor:
            image = self._image(self.paths, self.train_labels, int(index), epoch)
            rng = stream(self.seed, epoch, int(index), STREAM_AUGMENT)
            return self._to_tensor(self._augment(image, rng))

        images = torch.stack(self._map(read, indices))
        return images, self.train_labels[torch.as_tensor(list(indices), device="cpu")]

    def held_out(self, indices: Indices) -> tuple[Tensor, Tensor]:
        def read(index: int) -> Tensor:
            image = self._image(self.held_out_paths, self.held_out_labels, int(index), 0)
            return self._to_tensor(self._crop(image, 0.5, 0.5))

        images = torch.stack(self._map(read, indices))
        return images, self.held_out_labels[torch.as_tensor(list(indices), device="cpu")]

    def take_bad(self) -> tuple[BadItem, ...]:
        # Threads read the images: the order in which they end must not decide what is named.
        taken, self._bad = tuple(sorted(self._bad, key=lambda item: item.name)), []
        return taken

    def digest(self) -> str:
        """SHA-256 of the relative paths, labels and sizes of all files; they are not read."""
        digests = self.class_digests()
        return hashlib.sha256("\n".join(digests.values()).encode()).hexdigest()

    def class_digests(self) -> dict[str, str]:
        """The same for each class, by "train/CLASS" and "held_out/CLASS", in the order of labels.

        Raises:
            UserError: a file is gone.
        """
        hashes: dict[str, Any] = {}
        for part, paths, labels in (
            ("train", self.paths, self.train_labels),
            ("held_out", self.held_out_paths, self.held_out_labels),
        ):
            sizes = self._stats[part][:, 0].tolist()
            for path, label, size in zip(paths, labels.tolist(), sizes, strict=True):
                name = f"{part}/{self.classes[label]}"
                if name not in hashes:
                    hashes[name] = hashlib.sha256(os.fsencode(f"{name}\0{label}\0"))
                hashes[name].update(os.fsencode(path.name) + f"\0{size}\0".encode())
        return {name: sha256.hexdigest() for name, sha256 in sorted(hashes.items())}

    def file_stamps(self) -> FileStamps:
        """The stamps of both parts.  Raises: UserError, if a file is gone."""
        return file_stamps({"train": self.paths, "held_out": self.held_out_paths}, self._stats)

    @cached_property
    def _stats(self) -> dict[str, np.ndarray]:
        """Of each part :func:`file_stats`: the digests and the stamps share one pass."""
        return {"train": file_stats(self.paths), "held_out": file_stats(self.held_out_paths)}

    def _map(self, read: Callable[[int], Tensor], indices: Indices) -> list[Tensor]:
        """Images by several threads; by one in a worker of a DataLoader, which has siblings."""
        if self.section.workers <= 1 or get_worker_info() is not None:
            return [read(index) for index in indices]
        # Threads do not survive a fork.
        if self._pool is None or self._pool[0] != os.getpid():
            executor = ThreadPoolExecutor(self.section.workers, thread_name_prefix="images")
            self._pool = os.getpid(), executor
        return list(self._pool[1].map(read, indices))

    def _image(
        self, paths: Sequence[Path], labels_N: Tensor, index: int, epoch: int
    ) -> Image.Image:
        """The image of a file, or another of its class if it cannot be read.

        Raises:
            UserError: none of those that were tried can be read.
        """
        try:
            return self._open(paths[index])
        except UserError as error:
            message = str(error)
        self._bad.append(BadItem(str(paths[index]), message))
        same = (labels_N == labels_N[index]).nonzero().flatten().tolist()
        rng = stream(self.seed, epoch, index, STREAM_REPLACE)
        for other in rng.permutation(len(same))[:MAX_REPLACEMENTS]:
            try:
                return self._open(paths[same[other]])
            except UserError as error:
                self._bad.append(BadItem(str(paths[same[other]]), str(error)))
        raise UserError(f"{message}; nor could another image of its class be read in its place")

    def _open(self, path: Path) -> Image.Image:
        try:
            with open_regular(path) as file, open_image(file, path) as image:
                mode = wide_mode(image)
                if mode is None:
                    return self._resize(opaque(image, path), path)
        except Image.UnidentifiedImageError:  # its message names the path again
            raise UserError(f"{path}: is not a readable image: its format is not known") from None
        except UNREADABLE as error:
            raise UserError(
                f"{path}: is not a readable image: {error or type(error).__name__}"
            ) from None
        # convert("RGB") would clip their values to 8 bits
        raise UserError(
            f"{path}: must have 8 bits per channel; its pixels are of mode {mode}. Convert it first"
        )

    def _resize(self, image: Image.Image, path: Path) -> Image.Image:
        # 9/8 of the image size: the crop removes the rest.
        ratio = self.image_size * 9 / 8 / min(image.size)
        width, height = (max(self.image_size, round(side * ratio)) for side in image.size)
        if width * height > MAX_PIXELS:
            raise UserError(
                f"{path}: is too narrow: {image.width} x {image.height} pixels would become "
                f"{width} x {height}"
            )
        return image.resize((width, height), Image.Resampling.LANCZOS)

    def _crop(self, image: Image.Image, across: float, down: float) -> Image.Image:
        left = round((image.width - self.image_size) * across)
        top = round((image.height - self.image_size) * down)
        return image.crop((left, top, left + self.image_size, top + self.image_size))

    def _augment(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        image = self._crop(image, rng.random(), rng.random())
        if rng.random() < self.section.hflip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return rand_augment(
            image, rng, self.section.randaugment_ops, self.section.randaugment_magnitude
        )

    def _to_tensor(self, image: Image.Image) -> Tensor:
        if self.channels == 1:
            image = image.convert("L")
        pixels = np.asarray(image, dtype=np.float32).reshape(*image.size[::-1], self.channels)
        return torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1
