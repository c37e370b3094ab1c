"""Sets of images to evaluate, and reference files: folders, WebDataset shards, ADM's ``.npz``.

All images of a set have one size and are uint8. Their order is that of their names.

Axes: N images, B of a batch, 3 colours, Y X pixels.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import numpy as np
import torch
from torch import Tensor

from variant.data.images import (
    ALL_SUFFIXES,
    SUFFIXES,
    UNREADABLE,
    opaque,
    open_image,
    passed_over,
    wide_mode,
)
from variant.engine.memory import check_fits
from variant.errors import UserError
from variant.evaluation.frechet import Gaussian
from variant.paths import open_regular, path_kind, shown
from variant_kernels.wording import counted

# The class in the name of an image file of `variant generate` and `variant sample`.
LABEL = re.compile(r"_class(\d{1,18})\.", re.ASCII)
MAX_LABEL = 2**63 - 1  # as a tensor of labels holds
# First bytes of gzip, bzip2, xz and zstd.
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")
MAX_HEADER_BYTES = 2**20  # of a name or another header in a tar file
NAMED = 3  # files that a message names
MAX_FILE_BYTES = 2**30  # of one image; the pixels of the largest that PIL opens are 0.7 GiB
# Relative; in float32 the sums of a covariance and its transpose may differ by rounding.
ASYMMETRY = 1e-4


@dataclass
class ImageSet:
    """uint8 images of one size.

    name: for messages.  labels: the class of each image, where the files' names tell.
    read: the images of some indices, (B, 3, Y, X).
    names: of the files, in order; None where the images are no files.
    seen: SHA-256 of the pixels of the images of the last pass, and how often each came.
    largest: value of a pixel of the last pass.
    """

    name: str
    count: int
    labels: Sequence[int] | None
    read: Callable[[range], Tensor]
    names: Sequence[str] | None = None
    seen: dict[bytes, int] = field(default_factory=dict)
    largest: int = 0

    def batches(self, size: int) -> Iterator[Tensor]:
        """The images in order, (B, 3, Y, X) uint8; counts repeated ones on the way.

        Raises:
            UserError: an image is of another size than the first.
        """
        self.seen, self.largest = {}, 0
        for start in range(0, self.count, size):
            images = self.read(range(start, min(start + size, self.count)))
            for image in images:
                digest = hashlib.sha256(image.numpy().tobytes()).digest()
                self.seen[digest] = self.seen.get(digest, 0) + 1
            self.largest = max(self.largest, int(images.max()))
            yield images

    @property
    def repeats(self) -> int:
        """Images read so far that equal an earlier one, pixel by pixel."""
        return sum(count - 1 for count in self.seen.values())

    def sha256(self) -> str:
        """Of the pixels of all images, whatever their order; after they were read."""
        counted = (digest * count for digest, count in sorted(self.seen.items()))
        return hashlib.sha256(b"".join(counted)).hexdigest()


@dataclass(frozen=True)
class Reference:
    """What images are compared with.

    images: None where a file holds statistics alone.
    gaussian, spatial: the file's own mean and covariance of the features; None where it has none.
    """

    name: str
    images: ImageSet | None
    gaussian: Gaussian | None = None
    spatial: Gaussian | None = None

    def statistics_sha256(self) -> str | None:
        """Of the file's own statistics, as float64; None where it has none."""
        given = [each for each in (self.gaussian, self.spatial) if each is not None]
        values = [part for each in given for part in (each.mean_D, each.covariance_DD)]
        content = b"".join(value.contiguous().numpy().tobytes() for value in values)
        return hashlib.sha256(content).hexdigest() if given else None


def open_images(path: str | os.PathLike[str]) -> ImageSet:
    """The images of a folder (also in sub-folders), of a ``.tar`` or a folder of them, or ``.npz``.

    Raises:
        UserError: nothing is there, it holds no images or two kinds of them, or some cannot be
            read.
    """
    path = Path(path)
    kind = path_kind(path)
    if kind is None:
        raise UserError(f"{shown(path)}: not found; give a folder of images, a .tar or an .npz")
    if kind == "folder":
        shards = sorted(path.glob("*.tar"))
        if not shards:
            return _folder(path)
        names = sorted(name for name in os.listdir(path) if not name.startswith("."))
        image = next(filter(_is_image, names), None)
        if image is not None:
            raise UserError(
                f"{shown(path)}: holds shards ({shards[0].name}) and images ({image}); give a "
                "folder of one of them"
            )
        return _shards(path, shards)
    if path.suffix == ".tar":
        return _shards(path, [path])
    if path.suffix == ".npz":
        arrays, names = _read_npz(path)
        if "arr_0" not in arrays:
            raise UserError(f"{shown(path)}: holds no images (arr_0); it has {names}")
        return array_images(path.name, arrays["arr_0"], arrays.get("arr_1"))
    raise UserError(f"{shown(path)}: must be a folder, a .tar or an .npz of images")


def image_files(folder: Path, *, below: bool = True) -> Iterator[Path]:
    """The shards and images that :func:`open_images` would find in a folder, whichever counts.

    Args:
        below: whether to look for images in sub-folders, too.
    Raises:
        UserError: a folder cannot be listed.
    """
    try:
        yield from sorted(folder.glob("*.tar"))
        images = sorted(_images_below(folder))
    except OSError as error:
        raise UserError(f"{shown(folder)}: cannot be read: {error.strerror}") from None
    yield from (path for path in images if below or path.parent == folder)


def open_reference(path: str | os.PathLike[str]) -> Reference:
    """A set of images, or ADM's reference ``.npz`` with arr_0, mu, sigma, mu_s, sigma_s.

    Raises:
        UserError: as :func:`open_images`; or the file has neither images nor statistics.
    """
    path = Path(path)
    if path.suffix != ".npz" or path_kind(path) != "file":
        return Reference(path.name or str(path), open_images(path))
    arrays, names = _read_npz(path)
    images = None
    if "arr_0" in arrays:
        images = array_images(path.name, arrays["arr_0"], arrays.get("arr_1"))
    gaussians = [_gaussian(path, arrays, *pair) for pair in (("mu", "sigma"), ("mu_s", "sigma_s"))]
    if images is None and gaussians[0] is None:
        raise UserError(
            f"{shown(path)}: holds neither images (arr_0) nor statistics (mu, sigma); it has "
            f"{names}"
        )
    return Reference(path.name, images, *gaussians)


def array_images(
    name: str, images_NYX3: np.ndarray, labels_N: np.ndarray | None = None
) -> ImageSet:
    """The images of an array, uint8 (N, Y, X, 3).

    Args:
        labels_N: integers from 0, as ADM's samples have them in arr_1; anything else is no label.
    Raises:
        UserError: it is another array.
    """
    if images_NYX3.dtype != np.uint8 or images_NYX3.ndim != 4 or images_NYX3.shape[3] != 3:
        raise UserError(
            f"{name}: arr_0 must be uint8 (N, Y, X, 3), 0 to 255; got {images_NYX3.dtype} "
            f"{images_NYX3.shape}"
        )
    if not images_NYX3.size:
        raise UserError(f"{name}: holds no images: arr_0 has the shape {images_NYX3.shape}")

    def read(indices: range) -> Tensor:
        rows = images_NYX3[indices.start : indices.stop]
        return torch.from_numpy(np.ascontiguousarray(rows.transpose(0, 3, 1, 2)))

    return ImageSet(name, len(images_NYX3), _labels(name, labels_N, len(images_NYX3)), read)


def _labels(name: str, labels_N: np.ndarray | None, count: int) -> list[int] | None:
    """The labels of an array; None where it holds others.

    Warns:
        RuntimeWarning: it does not hold an integer for each image.
    """
    if labels_N is None:
        return None
    if labels_N.shape != (count,) or labels_N.dtype.kind not in "iu":
        warnings.warn(
            f"{name}: arr_1 holds no integer for each of the {counted(count, 'image')} but "
            f"{labels_N.dtype} {labels_N.shape}; the images count as without labels",
            RuntimeWarning,
            stacklevel=3,
        )
        return None
    # -1 is an image of no class.
    return labels_N.tolist() if labels_N.min() >= 0 and labels_N.max() <= MAX_LABEL else None


def _gaussian(path: Path, arrays: Any, mean: str, covariance: str) -> Gaussian | None:
    if mean not in arrays or covariance not in arrays:
        return None
    where = f"{shown(path)}: {mean} and {covariance}"
    for name in (mean, covariance):
        if arrays[name].dtype.kind not in "fiu":
            raise UserError(f"{where}: must be real numbers; {name} is {arrays[name].dtype}")
    try:
        values = [torch.from_numpy(np.asarray(arrays[n], np.float64)) for n in (mean, covariance)]
        gaussian = Gaussian(*values)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {error}") from None
    own_DD = gaussian.covariance_DD
    # The distance of any other matrix would be a number without a meaning.
    most = float(own_DD.abs().max()) if own_DD.numel() else 0.0
    if not own_DD.numel() or float((own_DD - own_DD.T).abs().max()) > ASYMMETRY * most:
        raise UserError(f"{where}: {covariance} must be symmetric, with a row for each feature")
    if float(own_DD.diagonal().min()) < 0:
        raise UserError(f"{where}: {covariance} must have variances >= 0 on its diagonal")
    return gaussian


def _read_npz(path: Path) -> tuple[dict[str, np.ndarray], str]:
    """The arrays of a file that have a meaning here, and the names of all for a message.

    Raises:
        UserError: no archive of arrays, or larger than the free memory.
    """
    names = ("arr_0", "arr_1", "mu", "sigma", "mu_s", "sigma_s")
    with open_regular(path) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                members = [member for member in archive.infolist() if _key_of(member) in names]
                # Compressed, a file of a megabyte may hold gigabytes.
                num_bytes = sum(member.file_size for member in members)
                check_fits(shown(path), "its arrays", num_bytes, torch.device("cpu"))
                arrays = {}
                for member in members:
                    with archive.open(member) as content:
                        arrays[_key_of(member)] = read_npy(content)
                return arrays, shown(", ".join(map(_key_of, archive.infolist()))) or "nothing"
        except UserError:
            raise
        except Exception as error:  # the bytes decide what zipfile raises: a dozen types
            raise UserError(f"{shown(path)}: is no readable .npz: {_reason(error)}") from None


def _key_of(member: zipfile.ZipInfo) -> str:
    """The name of an array by that of its file in the archive."""
    return member.filename.removesuffix(".npy")


def read_npy(file: IO[bytes]) -> np.ndarray:
    """The array of an open ``.npy``, without running code from it.

    Raises:
        ValueError: it is none, or larger than the memory; one line.
    """
    try:
        return np.lib.format.read_array(cast("Any", file), allow_pickle=False)
    except Exception as error:  # the bytes decide what numpy raises, e.g. a TokenError
        raise ValueError(_reason(error)) from error


def _reason(error: Exception) -> str:
    """The first line of an error, or its kind."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _folder(folder: Path) -> ImageSet:
    try:
        below = sorted(_images_below(folder))
    except OSError as error:
        raise UserError(f"{shown(folder)}: cannot be read: {error.strerror}") from None
    paths = [path for path in below if _is_image(path.name)]
    if len(paths) < len(below):
        over = [path for path in below if not _is_image(path.name)]
        warnings.warn(passed_over(folder, over), RuntimeWarning, stacklevel=3)
    if not paths:
        raise UserError(f"{shown(folder)}: holds no image ({', '.join(SUFFIXES)})")

    def content(index: int) -> bytes:
        with open_regular(paths[index]) as file:
            return _image_bytes(file, os.fstat(file.fileno()).st_size)

    return _encoded(folder, [str(path) for path in paths], content)


def _images_below(folder: Path) -> Iterator[Path]:
    """The images of a folder and of its sub-folders, without hidden ones; links are followed.

    Those of other formats, which are not read, are among them.

    A folder that several links name, or a link in itself, is visited once.

    Raises:
        OSError: a folder cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise error

    visited: set[str] = set()
    for root, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(root)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            if Path(name).suffix.lower() in ALL_SUFFIXES and not name.startswith("."):
                yield Path(root, name)


def _image_bytes(file: BinaryIO, size: int) -> bytes:
    """The next bytes of a file.  Raises: ValueError, for more than an image can have."""
    if not 0 <= size <= MAX_FILE_BYTES:
        raise ValueError(f"an image must have at most {MAX_FILE_BYTES:,} bytes; got {size:,}")
    return file.read(size)


def _shards(where: Path, shards: Sequence[Path]) -> ImageSet:
    """The images of tar files, read at their places."""
    places: list[tuple[Path, int, int]] = []
    names: list[str] = []
    for shard in shards:
        members = _members(shard)
        places += [(shard, member.offset_data, member.size) for member in members]
        names += [f"{shard}: {member.name}" for member in members]
    if not places:
        raise UserError(f"{shown(where)}: holds no image ({', '.join(SUFFIXES)})")

    def content(index: int) -> bytes:
        shard, offset, size = places[index]
        with open_regular(shard) as file:
            file.seek(offset)
            return _image_bytes(file, size)

    return _encoded(where, names, content)


def _members(shard: Path) -> list[tarfile.TarInfo]:
    """The images in a tar file, by their names.

    Raises:
        UserError: it is none, compressed, or holds sparse files, whose bytes are not in one place.
    """
    with open_regular(shard) as file:
        try:
            with tarfile.open(fileobj=_Headers(file.fileno(), closefd=False), mode="r:") as archive:
                members = [m for m in archive if m.isfile() and _is_image(m.name)]
        except Exception as error:  # the bytes decide what tarfile raises, e.g. a RecursionError
            # Looked for last: a plain .tar begins with the name of its first file.
            if os.pread(file.fileno(), 6, 0).startswith(COMPRESSED):
                raise UserError(
                    f"{shown(shard)}: must be a plain .tar, whose images are read at their places; "
                    "it is compressed. Decompress it first"
                ) from None
            raise UserError(f"{shown(shard)}: is no readable .tar: {_reason(error)}") from None
    sparse = next((member for member in members if member.issparse()), None)
    if sparse is not None:
        raise UserError(
            f"{shown(shard)}: holds {shown(sparse.name)} as a sparse file; pack it without --sparse"
        )
    return sorted(members, key=lambda member: member.name)


class _Headers(io.FileIO):
    """A tar file of which headers alone are read: a long name may claim gigabytes."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= MAX_HEADER_BYTES:
            got = "unknown length" if size is None else counted(size, "byte")
            raise tarfile.ReadError(f"a header of {got}; at most {MAX_HEADER_BYTES:,}")
        return super().read(size)


def _is_image(name: str) -> bool:
    return Path(name).suffix.lower() in SUFFIXES


def _encoded(where: Path, names: Sequence[str], content: Callable[[int], bytes]) -> ImageSet:
    """Images in files of a compressed format.  Raises: UserError, naming those it cannot read."""
    size: list[tuple[int, int]] = []
    bad: list[str] = []

    def decode(index: int) -> np.ndarray | None:
        try:
            with open_image(io.BytesIO(content(index)), names[index]) as image:
                mode = wide_mode(image)
                # As the training sees them.
                pixels = np.asarray(opaque(image, names[index]))
        except UNREADABLE:
            return None
        if mode is not None:  # convert("RGB") clips their values to 8 bits
            raise UserError(
                f"{shown(names[index])}: must have 8 bits per channel; its pixels are of mode "
                f"{mode}. Convert it first"
            )
        height, width = pixels.shape[:2]
        if not size:
            size.append((width, height))
        if (width, height) != size[0]:
            raise UserError(
                f"{shown(names[index])}: all images must have one size, {size[0][0]} x "
                f"{size[0][1]}; this one has {width} x {height}"
            )
        return pixels

    def read(indices: range) -> Tensor:
        images = [(index, decode(index)) for index in indices]
        bad.extend(names[index] for index, pixels in images if pixels is None)
        if bad:
            # All bad files of the set are counted before the run ends.
            rest = range(indices.stop, len(names))
            bad.extend(names[index] for index in rest if decode(index) is None)
            shown_names = ", ".join(shown(name) for name in bad[:NAMED])
            raise UserError(
                f"{shown(where)}: {len(bad):,} of {counted(len(names), 'image')} cannot be read: "
                f"{shown_names}{', ...' if len(bad) > NAMED else ''}; mend or remove them"
            )
        stack = np.stack([pixels for _, pixels in images if pixels is not None])
        return torch.from_numpy(stack.transpose(0, 3, 1, 2).copy())

    labels = [LABEL.search(Path(name).name) for name in names]
    known = [int(match[1]) for match in labels if match]
    given = known if len(known) == len(names) else None
    return ImageSet(where.name or str(where), len(names), given, read, names)
