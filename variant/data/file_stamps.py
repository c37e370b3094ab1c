"""What tells that image files were replaced by others of their names and sizes.

The digest of a folder identifies it without reading its images, which may take hours. A run that is
resumed compares these stamps besides: the contents of some files, and the times of all.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from variant.errors import UserError
from variant.paths import open_regular

SAMPLED = 64  # files of a part whose contents are compared
SAMPLED_BYTES = 2**20  # of a file


@dataclass(frozen=True)
class FileStamps:
    """The stamps of the files of a data set.

    contents: SHA-256 of the first MiB of some of the files, by their names; without those that
        cannot be read.
    times: SHA-256 of the modification times of all files; None where there are no such files, and
        the digest of the data covers its contents.
    """

    contents: dict[str, str] = field(default_factory=dict)
    times: str | None = None


def file_stats(paths: Sequence[Path]) -> np.ndarray:
    """Bytes and modification times in nanoseconds of files, (N, 2) int64.

    Raises:
        UserError: a file is gone.
    """
    found = np.empty((len(paths), 2), np.int64)
    for index, path in enumerate(paths):
        try:
            stat = path.stat()
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
        found[index] = stat.st_size, stat.st_mtime_ns
    return found


def file_stamps(
    parts: Mapping[str, Sequence[Path]], times_of: Mapping[str, np.ndarray] | None = None
) -> FileStamps:
    """The stamps of the files of each part, by its name, in an order that is always the same.

    Args:
        times_of: modification times of each part's files in nanoseconds, (N,) int64; None reads
            them.
    Raises:
        UserError: a file is gone.
    """
    contents: dict[str, str] = {}
    times = hashlib.sha256()
    for part, paths in parts.items():
        own = file_stats(paths)[:, 1] if times_of is None else times_of[part]
        times.update(own.astype("<i8").tobytes())
        for index in np.unique(np.linspace(0, len(paths) - 1, SAMPLED).round().astype(int)):
            path = paths[int(index)]
            # A name need not be text; a checkpoint holds text alone.
            name = os.fsencode(f"{part}/{path.parent.name}/{path.name}")
            digest = _digest(path)
            if digest is not None:
                contents[name.decode("utf-8", "backslashreplace")] = digest
    return FileStamps(contents, times.hexdigest())


def replaced(old: object, new: FileStamps) -> list[str]:
    """Names of files whose contents differ from those that were recorded; others are not compared.

    Args:
        old: ``FileStamps.contents`` of a checkpoint; anything else compares nothing.
    """
    before = old if isinstance(old, dict) else {}
    return [name for name, digest in new.contents.items() if before.get(name, digest) != digest]


def _digest(path: Path) -> str | None:
    """SHA-256 of the beginning of a file; None where it cannot be read."""
    try:
        with open_regular(path) as file:
            return hashlib.sha256(file.read(SAMPLED_BYTES)).hexdigest()
    except (OSError, UserError):
        return None  # the run replaces unreadable images, and names them
