"""What tells that image files were replaced by others of their names and sizes.

The digest of a folder identifies it without reading its images, which may take hours. What goes on
with the images of an earlier run compares these stamps besides: the contents of some files, and the
times of all.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from variant.errors import UserError
from variant.paths import open_regular, shown

SAMPLED = 64  # files of a part whose contents are compared
SAMPLED_BYTES = 2**20  # of a file
SHOWN = 5  # names in a message


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
        # Some file systems have times after 2262, which are no int64: their low bits do as well.
        found[index] = stat.st_size, stat.st_mtime_ns % 2**63
    return found


def file_stamps(parts: Mapping[str, Sequence[Path]], stats: Mapping[str, np.ndarray]) -> FileStamps:
    """The stamps of the files of each part, by its name, in an order that is always the same.

    Args:
        stats: :func:`file_stats` of each part.
    """
    contents: dict[str, str] = {}
    times = hashlib.sha256()
    for part, paths in parts.items():
        times.update(stats[part][:, 1].astype("<i8").tobytes())
        for index in np.unique(np.linspace(0, len(paths) - 1, SAMPLED).round().astype(int)):
            path = paths[int(index)]
            # A name need not be text; a checkpoint holds text alone.
            name = os.fsencode(f"{part}/{path.parent.name}/{path.name}")
            digest = _digest(path)
            if digest is not None:
                contents[name.decode("utf-8", "backslashreplace")] = digest
    return FileStamps(contents, times.hexdigest())


def compare_stamps(
    where: str, made: str, before: FileStamps, now: FileStamps, remedy: str, *, warns: bool
) -> None:
    """Compare the images of an earlier run with those of now.

    Other modification times alone, which a copied folder has too, are a warning.

    Args:
        where: names in messages what was made of the images.
        made: what it is or holds, before the words "other images".
        before: as they were recorded; what it lacks is not compared.
        remedy: what else to do than to restore them.
        warns: whether to warn of other times.
    Raises:
        UserError: naming files whose contents were replaced.
    """
    both = [name for name in now.contents if name in before.contents]
    names = [name for name in both if before.contents[name] != now.contents[name]]
    if names:
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        raise UserError(
            f"{where}: {made} other images: the contents of "
            f"{', '.join(map(shown, names[:SHOWN]))}{more} were replaced; restore them, or {remedy}"
        )
    if warns and before.times not in (None, now.times):
        warnings.warn(
            f"{where}: the image files were written or copied since: their modification times "
            f"differ. {len(both)} of them were compared and have the same contents; make sure that "
            "the others have, too",
            RuntimeWarning,
            stacklevel=3,
        )


def _digest(path: Path) -> str | None:
    """SHA-256 of the beginning of a file; None where it cannot be read."""
    try:
        with open_regular(path) as file:
            return hashlib.sha256(file.read(SAMPLED_BYTES)).hexdigest()
    except (OSError, UserError):
        return None  # the run replaces unreadable images, and names them
