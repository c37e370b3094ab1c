"""Many images for an evaluation: written as they are made, continued after any stop, by any ranks.

The seed and the index of an image decide it: image i has class ``classes[i % len(classes)]`` and
the random numbers of image id i. The classes take turns, so that every split of the Inception
Score shows all of them.

A unit is what appears at once: a batch of PNG files, a ``.tar`` shard, or a part of an ``.npz``.
Unit u is the work of rank u modulo the number of ranks, and ranks need not talk to each other.

Axes: B images, Y X pixels.
"""

from __future__ import annotations

import glob
import io
import json
import os
import re
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from variant.differences import change_texts, differences, listed
from variant.engine.engine import Engine
from variant.engine.generation import Sampling
from variant.engine.kv_dtype import KVDtype
from variant.errors import UserError
from variant.evaluation.image_sets import image_files, read_npy
from variant.files import atomic_write
from variant.folder_lock import clear_leftovers, locked_folder, saving
from variant.paths import open_regular, path_kind, read_json, shown
from variant_kernels import DepthSchedule
from variant_kernels.arguments import integer

Form = Literal["png", "webdataset", "npz"]
FORMAT = "variant-sample-1"
SETTINGS_NAME = "sample.json"
PART = 500  # images of a shard and of a part
TEMPORARY = re.compile(r"\.(?:part-)?(?P<number>\d+)(?:_class-?\d+)?\.(?:png|tar|npy)\.\d+\.tmp")
OWN = re.compile(r"\d{6,}_class-?\d+\.png|part-\d{5,}\.tar")
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
# The backend of each op, and what the models' configs say besides the weights.
KERNELS, CONFIGS = "kernels", "configs"
NEWER = (KERNELS, CONFIGS)  # records of earlier versions do not have them
# Settings in which a run may be continued with another value.
FREE = ("software", "commit", "dirty")
FREE_IN_FLOAT32 = (*FREE, "batch")

# report(images, total): so many more of the images of this process are there.
Report = Callable[[int, int], None]


@dataclass(frozen=True)
class SampleFiles:
    """The files of a run.

    Args:
        out: a folder, or an ``.npz`` for the form "npz".
        num: images.  classes: their labels, in turn.
        batch: images of a batch of the engine; batches never cross units.
    """

    out: Path
    form: Form
    num: int
    classes: Sequence[int]
    batch: int

    @property
    def folder(self) -> Path:
        """The folder of the units."""
        return self.out.with_name(f"{self.out.name}.parts") if self.form == "npz" else self.out

    @property
    def record(self) -> Path:
        """The file of the settings of the finished run; for "npz" beside it."""
        return record_of_npz(self.out) if self.form == "npz" else self.out / SETTINGS_NAME

    def label(self, index: int) -> int:
        """The class of an image."""
        return label_of(index, self.classes)

    def units(self) -> Iterator[tuple[int, range]]:
        """The number and the images of each unit."""
        size = self.batch if self.form == "png" else PART
        for number, start in enumerate(range(0, self.num, size)):
            yield number, range(start, min(start + size, self.num))

    def unit_file(self, number: int) -> Path:
        """The file of a unit of the forms "webdataset" and "npz"."""
        return self.folder / f"part-{number:05d}.{'tar' if self.form == 'webdataset' else 'npy'}"

    def image_file(self, index: int) -> Path:
        """The file of an image of the form "png"."""
        return self.folder / image_name(index, self.classes)

    def is_done(self, number: int, images: range) -> bool:
        """Whether a unit is there."""
        if self.form == "png":
            return all(is_written(self.image_file(index)) for index in images)
        return is_written(self.unit_file(number))

    def write(
        self, number: int, images: range, pixels_BYX3: np.ndarray, text: Mapping[str, object]
    ) -> None:
        """Write a unit; each file appears whole or not at all.  Raises: UserError."""
        if self.form == "npz":
            with atomic_write(self.unit_file(number)) as temporary, temporary.open("wb") as file:
                # Not np.save: of a full disk it says "problem writing element 4096 to file".
                np.lib.format.write_array_header_1_0(file, _header(pixels_BYX3.shape))
                file.write(pixels_BYX3.tobytes())
            return
        encoded = [
            _png(image, {**text, "label": self.label(index), "index": index})
            for index, image in zip(images, pixels_BYX3, strict=True)
        ]
        if self.form == "png":
            for index, content in zip(images, encoded, strict=True):
                path = self.image_file(index)
                if not is_written(path):
                    with atomic_write(path) as temporary:
                        temporary.write_bytes(content)
            return
        with (
            atomic_write(self.unit_file(number)) as temporary,
            tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as archive,
        ):
            for index, content in zip(images, encoded, strict=True):
                name = image_name(index, self.classes)
                _add(archive, name, content)
                label = str(self.label(index)).encode()
                _add(archive, f"{name.removesuffix('.png')}.cls", label)

    def assemble(self, settings: Mapping[str, Any]) -> None:
        """Make the ``.npz`` that the ADM evaluator reads of its parts.

        Its record is written before it: whatever kills the process, an ``.npz`` has a record.
        """
        with atomic_write(self.record, durable=True) as temporary:
            temporary.write_text(json.dumps(settings, indent=1) + "\n")
        shape = (self.num, *self._part(0, range(min(PART, self.num))).shape[1:])
        with (
            atomic_write(self.out, durable=True) as temporary,  # the parts are removed after it
            zipfile.ZipFile(temporary, "w") as archive,
        ):
            entry = zipfile.ZipInfo("arr_0.npy")
            with archive.open(entry, "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, _header(shape))
                for number, images in self.units():
                    file.write(self._part(number, images, shape[1:]).tobytes())
            with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as file:
                np.save(file, np.array([self.label(index) for index in range(self.num)]))

    def _part(self, number: int, images: range, sides: tuple[int, ...] | None = None) -> np.ndarray:
        """The images of a part of an ``.npz``, uint8 (B, Y, X, 3).

        Args:
            sides: (Y, X, 3) of the first part; None for that one.
        Raises:
            UserError: it does not hold them, as after the end of a disk or a power failure.
        """
        path = self.unit_file(number)
        with open_regular(path) as file:
            try:
                pixels = read_npy(file)
                if (
                    pixels.dtype != np.uint8
                    or pixels.ndim != 4
                    or len(pixels) != len(images)
                    or (sides is not None and pixels.shape[1:] != sides)
                ):
                    raise ValueError(f"{pixels.dtype} {pixels.shape}")
            except ValueError as error:
                raise UserError(
                    f"{shown(path)}: does not hold the pixels of images {images.start} to "
                    f"{images.stop - 1}: {error!s:.200}; remove it and run the same command again"
                ) from None
        return pixels

    def clear_parts(self) -> None:
        """Remove the parts of a finished ``.npz``, and what killed processes left beside it.

        Another process may still be leaving the folder.
        """
        shutil.rmtree(self.folder, ignore_errors=True)
        clear_leftovers(self.out.parent, map(glob.escape, (self.out.name, self.record.name)))

    def clear_temporary(self, rank: int, world_size: int) -> None:
        """Remove what a killed process of this rank left half written."""
        size = self.batch if self.form == "png" else 1
        with os.scandir(self.folder) as entries:
            names = [entry.name for entry in entries if entry.name.endswith(".tmp")]
        for name in names:
            match = TEMPORARY.fullmatch(name)
            if match and int(match["number"]) // size % world_size == rank:
                with suppress(OSError):
                    (self.folder / name).unlink()

    def refuse_foreign(self) -> None:
        """Raises: UserError, for an image that is none of this run: an evaluation counts all."""
        if self.form == "npz":  # the parts are not evaluated, and another rank may remove them now
            return
        is_png = self.form == "png"
        own = (
            {self.image_file(index) for index in range(self.num)}
            if is_png
            else {self.unit_file(number) for number, _ in self.units()}
        )
        foreign = next((p for p in image_files(self.folder, below=is_png) if p not in own), None)
        if foreign is not None:
            name = shown(foreign.relative_to(self.folder))
            raise UserError(
                f"{shown(self.folder)}: holds {name}, which is none of this run's images and would "
                "be evaluated with them; move it elsewhere, or give another --out"
            )


def _header(shape: tuple[int, ...]) -> dict[str, Any]:
    """That of a ``.npy`` file of pixels."""
    return {"descr": "|u1", "fortran_order": False, "shape": shape}


def is_written(path: Path) -> bool:
    """Whether a whole file is there; one that a power failure or a copy has cut off is not.

    Something else of the name counts as missing, so that writing the file refuses it by name.
    """
    try:
        status = os.stat(path)  # once: another rank may just be removing the parts
        if not stat.S_ISREG(status.st_mode) or not status.st_size:
            return False
        if path.suffix == ".tar":
            return status.st_size % tarfile.RECORDSIZE == 0
        if path.suffix != ".png":  # parts of an .npz are checked when they are joined
            return True
        with path.open("rb") as file:
            file.seek(-min(status.st_size, len(PNG_END)), os.SEEK_END)
            return file.read() == PNG_END
    except OSError:
        return False


def label_of(index: int, classes: Sequence[Any]) -> Any:
    """The class of an image of a run: they take turns."""
    return classes[index % len(classes)]


def image_name(index: int, classes: Sequence[Any]) -> str:
    """The name of an image's file, in a folder or in a shard."""
    return f"{index:06d}_class{label_of(index, classes)}.png"


def record_of_npz(out: Path) -> Path:
    """The file of the settings beside an ``.npz``."""
    return out.with_suffix(".json")


def is_own_name(name: str) -> bool:
    """Whether a run writes files of this name into its folder."""
    return name == SETTINGS_NAME or OWN.fullmatch(name) is not None


def sample(
    engine: Engine,
    sampling: Sampling,
    files: SampleFiles,
    settings: Mapping[str, Any],
    *,
    depth: int | DepthSchedule | None = None,
    bridge: int | None = None,
    kv_dtype: KVDtype = None,
    rank: int = 0,
    world_size: int = 1,
    report: Report = lambda images, total: None,
) -> int:
    """Generate the images of this rank that are not there yet.

    Args:
        settings: all that the images depend on, as plain values; recorded, and compared with those
            of a run that is continued.
        depth, bridge, kv_dtype: as in :meth:`Engine.generate`.
    Returns:
        the number of units that other ranks have still to write.
    Raises:
        UserError: the folder holds another run, or another process of this rank writes there.
    """
    integer("sample", "rank", rank, 0)
    integer("sample", "world_size", world_size, rank + 1)
    settings = {"format": FORMAT, **settings}
    if files.form == "npz":
        _check_record(files, settings)
        if path_kind(files.out) is not None:
            _finish_once(files, settings)
            report(files.num, files.num)
            return 0
    with locked_folder(files.folder, f".variant-sample-{rank}.lock", work="sampling"):
        if files.form == "npz" and path_kind(files.out) is not None:  # just now, by another rank
            return 0
        with saving(files.folder):  # of ranks that begin at once, one records the settings
            clear_leftovers(files.folder, [SETTINGS_NAME])
            _start(files, settings)
        files.clear_temporary(rank, world_size)
        own = [unit for unit in files.units() if unit[0] % world_size == rank]
        total = sum(len(images) for _, images in own)
        for number, images in own:
            if not files.is_done(number, images):
                batches = engine.generate_batches_with(
                    [files.label(index) for index in images],
                    sampling,
                    image_ids=list(images),
                    depth=depth,
                    bridge=bridge,
                    kv_dtype=kv_dtype,
                    max_batch=files.batch,
                    image_dtype="uint8",
                )
                pixels = [part.images.permute(0, 2, 3, 1).cpu().numpy() for part in batches]
                files.write(number, images, np.concatenate(pixels), _text(settings))
            report(len(images), total)
        missing = sum(not files.is_done(*unit) for unit in files.units())
    if files.form == "npz":
        if path_kind(files.out) is not None:  # by another rank, which may have removed the parts
            return 0
        if not missing:
            _finish_once(files, settings)
    return missing


def check_run(files: SampleFiles, settings: Mapping[str, Any]) -> bool:
    """Whether the settings of this run are recorded in its folder.

    Raises:
        UserError: the folder holds another run, other files and no run, or beside this run an image
            that is none of its own.
    """
    path = files.folder / SETTINGS_NAME
    # Listed before the record is looked for: what another rank writes now comes after the record.
    names = os.listdir(files.folder) if files.folder.is_dir() else []
    foreign = [name for name in names if not name.startswith(".")]
    if path_kind(path) is not None:
        _check_same(path, {"format": FORMAT, **settings})
        files.refuse_foreign()
        return True
    if foreign:
        raise UserError(
            f"{shown(files.folder)}: holds {foreign[0]} and no {SETTINGS_NAME}: it is no folder of "
            "`variant sample`; give another --out"
        )
    return False


def _start(files: SampleFiles, settings: Mapping[str, Any]) -> None:
    """Record the settings, or compare them with those that are recorded."""
    if check_run(files, settings):
        return
    path = files.folder / SETTINGS_NAME
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(settings, indent=1) + "\n")


def _check_same(path: Path, settings: Mapping[str, Any], what: Path | None = None) -> None:
    """Raises: UserError, if other settings are recorded.  Args: what: None is the path's folder."""
    recorded = read_json(path)
    if not isinstance(recorded, dict) or recorded.get("format") != FORMAT:
        raise UserError(f'{shown(path)}: its "format" must be "{FORMAT}"; give another --out')
    free = FREE_IN_FLOAT32 if settings.get("dtype") == "float32" else FREE
    plain = json.loads(json.dumps(settings))
    compare_settings(f"{shown(what or path.parent)}: was sampled", recorded, plain, free)


def compare_settings(
    made: str, recorded: Mapping[str, Any], settings: Mapping[str, Any], free: Collection[str]
) -> None:
    """Compare the settings of a run with those that are recorded.

    Args:
        made: begins the message: what was made with the recorded settings.
        settings: plain values.  free: their names that may differ.
    Raises:
        UserError: naming every one that differs, with both values.
    """
    compared = {
        key: value
        for key, value in settings.items()
        if key not in free and not (key in NEWER and key not in recorded)
    }
    before = {key: recorded[key] for key in compared if key in recorded}
    changes = change_texts(differences(before, compared))
    if changes:
        raise UserError(
            f"{made} with other settings: {listed(changes)}; give the first value of each, or "
            "another --out"
        )


def _check_record(files: SampleFiles, settings: Mapping[str, Any]) -> None:
    """Raises: UserError, if an ``.npz`` is of another run, or its record would replace a file."""
    if path_kind(files.record) is not None:
        _check_same(files.record, settings, files.record)
    elif path_kind(files.out) is not None:
        raise UserError(
            f"{shown(files.out)}: there is no {files.record.name} beside it, so that it is not "
            "known to be of `variant sample`; give another --out"
        )


def _finish_once(files: SampleFiles, settings: Mapping[str, Any]) -> None:
    """By one of the ranks that see the last part at the same time."""
    is_own = False
    try:
        with locked_folder(files.out.parent, f".{files.out.name}.lock", work="sampling"):
            is_own = True
            if path_kind(files.out) is None:
                files.assemble(settings)
            files.clear_parts()
    except UserError:
        if is_own:
            raise
        # Another rank holds the lock and assembles.


def _text(settings: Mapping[str, Any]) -> dict[str, object]:
    names = ("software", "model", "seed", "depth", "schedule", "cfg", "top_k", "top_p")
    text = {name: settings[name] for name in names if name in settings}
    if "schedule" in text:
        text["schedule"] = json.dumps(text["schedule"])
    return text


def _png(pixels_YX3: np.ndarray, text: Mapping[str, object]) -> bytes:
    info = PngInfo()
    for key, value in text.items():
        info.add_text(key, str(value).encode("utf-8", "backslashreplace").decode())
    content = io.BytesIO()
    Image.fromarray(pixels_YX3).save(content, "PNG", pnginfo=info)
    return content.getvalue()


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))
