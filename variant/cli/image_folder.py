"""The folder of ``variant generate``: one PNG per image, and the settings of the run.

Every file appears whole or not at all, so that an interrupted run can be continued: image files are
written in any order of batches, and ``SETTINGS_NAME`` says what they were generated from.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL.Image import Image
from PIL.PngImagePlugin import PngInfo

from variant.errors import UserError
from variant.evaluation.sampler import is_written
from variant.files import atomic_write
from variant.paths import path_kind, read_json

SETTINGS_NAME = "generate.json"
FORMAT = "variant-generate-1"
IMAGE_NAME = re.compile(r"(?:depth(?P<depth>\d+)_)?(?P<index>\d{5,})_(?:class\d+|null)\.png")
TEMPORARY_NAME = re.compile(rf"\.(?:{IMAGE_NAME.pattern}|{re.escape(SETTINGS_NAME)})\.\d+\.tmp")


def save_png(path: Path, image: Image, text: Mapping[str, object]) -> None:
    """Write a PNG with text chunks, whole or not at all.

    Args:
        text: shown by ``identify -verbose``, ``exiftool`` and ``PIL.Image.open(path).text``.
    Raises:
        UserError: it cannot be written.
    """
    info = PngInfo()
    for key, value in text.items():
        # A name of a file may hold bytes that are no text.
        info.add_text(key, str(value).encode("utf-8", "backslashreplace").decode())
    with atomic_write(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


@dataclass(frozen=True)
class ImageFolder:
    """The images of one run in a folder.

    Args:
        path: of the folder.
        labels: one after the other, each of ``count`` images.
        num_classes: -1 and this label are the null class.
        depths: with more than one, a file's name begins with its depth.
    """

    path: Path
    labels: Sequence[int]
    count: int
    num_classes: int
    depths: Sequence[int | None]

    def __len__(self) -> int:
        """Images of one depth."""
        return len(self.labels) * self.count

    def label(self, index: int) -> int:
        """The label of an image."""
        return self.labels[index // self.count]

    def file(self, depth: int | None, index: int) -> Path:
        """The file of an image: ``00012_class3.png``."""
        label = self.label(index)
        what = "null" if label in (-1, self.num_classes) else f"class{label}"
        prefix = f"depth{depth}_" if len(self.depths) > 1 else ""
        return self.path / f"{prefix}{index:05d}_{what}.png"

    def existing(self) -> set[str]:
        """Names of the files of images in the folder, of this run or another."""
        return {name for name in self._names() if IMAGE_NAME.fullmatch(name)}

    def whole(self) -> set[str]:
        """Of these the names of whole files: a copy or a power failure cuts some off."""
        return {name for name in self.existing() if is_written(self.path / name)}

    def chunks(self, depth: int | None, batch: int, done: set[str]) -> Iterator[range]:
        """Indices of the batches, in order, of which an image is missing.

        A batch is generated as a whole: in 16 bits an image may depend on the size of its batch.
        """
        for start in range(0, len(self), batch):
            indices = range(start, min(start + batch, len(self)))
            if not all(self.file(depth, index).name in done for index in indices):
                yield indices

    def clear(self) -> None:
        """Delete the images and the settings of an earlier run."""
        names = [name for name in self._names() if IMAGE_NAME.fullmatch(name)]
        # The settings last: without them nobody knows what the images are.
        for name in (*names, SETTINGS_NAME):
            (self.path / name).unlink(missing_ok=True)

    def clear_temporary(self) -> None:
        """Delete what killed runs left half written; to be called while the folder is locked."""
        for name in self._names():
            if TEMPORARY_NAME.fullmatch(name):
                with suppress(OSError):
                    (self.path / name).unlink()

    def settings(self) -> dict[str, Any] | None:
        """What the images in the folder were generated from; None where that is not recorded.

        Raises:
            UserError: the record cannot be read.
        """
        path = self.path / SETTINGS_NAME
        if path_kind(path) is None:
            return None
        remedy = "give another --out, or --overwrite"
        try:
            recorded = read_json(path)
        except UserError as error:
            raise UserError(f"{error}; {remedy}") from None
        if not isinstance(recorded, dict) or recorded.get("format") != FORMAT:
            raise UserError(f'{path}: its "format" must be "{FORMAT}"; {remedy}')
        batches = recorded.get("batches", {})
        if not isinstance(batches, dict) or not all(
            type(size) is int and size >= 1 for size in batches.values()
        ):
            raise UserError(f'{path}: its "batches" must be positive integers by depth; {remedy}')
        return recorded

    def write_settings(self, settings: Mapping[str, Any]) -> None:
        """Record what the images are generated from.  Raises: UserError."""
        with atomic_write(self.path / SETTINGS_NAME) as temporary:
            temporary.write_text(json.dumps({"format": FORMAT, **settings}, indent=1) + "\n")

    def _names(self) -> list[str]:
        try:
            with os.scandir(self.path) as entries:
                return [entry.name for entry in entries]
        except FileNotFoundError:
            return []


def is_own_name(name: str) -> bool:
    """Whether a run writes files of this name into its folder."""
    return name == SETTINGS_NAME or IMAGE_NAME.fullmatch(name) is not None
