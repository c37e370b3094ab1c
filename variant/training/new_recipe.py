"""New recipes for images in a folder or in IDX files: classes, parts, sizes by their number."""

from __future__ import annotations

import dataclasses
import os
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path

from variant.data.config import DataSection
from variant.data.idx import IdxData, files_in, paths_of, section_of
from variant.data.images import UNREADABLE, list_images, open_image
from variant.errors import UserError
from variant.models.class_names import is_text
from variant.models.config import VQVAEConfig
from variant.paths import open_regular, shown
from variant.training.optim import OptimSection
from variant.training.recipe import (
    ModelSection,
    OutputSection,
    Recipe,
    VAETraining,
    load_recipe,
)
from variant.training.schedule import ScheduleSection
from variant_kernels.wording import counted

TRAIN = ("train", "training")
HELD_OUT = ("held_out", "heldout", "held-out", "val", "valid", "validation", "test")
HELD_OUT_ONE_IN = 10  # images that a split holds out
SAMPLE = 64  # images whose size is read
LARGEST_IDX = 128  # pixels; the largest of FORMATS


@dataclass(frozen=True)
class Parts:
    """The two parts of a data set and what they hold.

    train, held_out: folders, or the files of images in a folder of IDX files.
    classes: their names.  side: pixels; the median of the shorter sides, or the longer side of
        IDX images, which are padded.
    idx: the data section of IDX files; None for folders.
    """

    train: Path
    held_out: Path
    num_train: int
    num_held_out: int
    classes: list[str]
    side: int
    idx: DataSection | None = None


@dataclass(frozen=True)
class Size:
    """Sizes for up to so many training images. A starting point by experience, not tuned.

    steps, vae_steps: optimiser steps that the epochs are chosen for.
    """

    images: float
    depth: int
    width: int
    heads: int
    depths: tuple[int, ...]
    codes: int
    channels: int
    batch: int
    steps: int
    vae_steps: int


SIZES = (
    Size(2_000, 8, 128, 4, (4, 2), 256, 16, 32, 3_000, 2_000),
    Size(20_000, 8, 256, 4, (4, 2), 512, 16, 64, 15_000, 8_000),
    Size(200_000, 12, 512, 8, (8, 4), 1024, 16, 128, 60_000, 20_000),
    Size(float("inf"), 16, 768, 12, (8, 4), 4096, 32, 256, 200_000, 60_000),
)
# Side of the images, channels at each resolution, sides of the token maps, first scales of the
# bridge.
SMALL_MAPS, LARGE_MAPS = (1, 2, 3, 4, 6, 8), (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
FORMATS = {
    32: ((1, 2, 2), SMALL_MAPS, 4),
    64: ((1, 2, 2, 4), SMALL_MAPS, 4),
    128: ((1, 2, 2, 4), LARGE_MAPS, 6),
}


def find_parts(folder: Path) -> Parts:
    """The folders of training and of held-out images in a folder, or its IDX files.

    Raises:
        UserError: there are none, or their classes differ; the message says how to split. Or the
            path cannot be written into a recipe.
    """
    if not folder.is_dir():
        what = "is no folder" if folder.exists() else "no such folder of images"
        raise UserError(f"{folder}: {what}")
    if not is_text(str(folder)):
        raise UserError(
            f"{shown(folder)}: the path must be text in UTF-8 to be written into a recipe; rename "
            "the folder, or give a link to it"
        )
    if (section := section_of(folder)) is not None:
        return _idx_parts(section)
    train, held_out = _named_parts(folder)
    if train is None or held_out is None:
        missing = "sub-folders train and held_out" if train is None else "sub-folder held_out"
        raise UserError(
            f"{folder}: has no {missing}; give --split NEW_FOLDER, which makes both there with "
            f"links to the images, one in {HELD_OUT_ONE_IN} held out, or move images yourself"
        )
    paths, _, classes = list_images(train)
    held_out_paths, _, others = list_images(held_out)
    if classes != others:
        differing = ", ".join(sorted(set(classes) ^ set(others))[:5])
        raise UserError(
            f"{held_out}: must have the classes of {train}; only in one of them: {differing}"
        )
    return Parts(train, held_out, len(paths), len(held_out_paths), classes, _side(paths))


def _named_parts(folder: Path) -> list[Path | None]:
    """The sub-folders with a name of the training and of the held-out part.

    Beside sub-folders of other names a part is one that has sub-folders itself: a class may be
    named "train" or "test" too.
    """

    def folders(of: Path) -> dict[str, Path]:
        visible = (path for path in sorted(of.iterdir()) if not path.name.startswith("."))
        return {path.name.lower(): path for path in visible if path.is_dir()}

    names = folders(folder)
    others = names.keys() - {*TRAIN, *HELD_OUT}
    parts = [next((names[n] for n in options if n in names), None) for options in (TRAIN, HELD_OUT)]
    return [part if part and (not others or folders(part)) else None for part in parts]


def _idx_parts(section: DataSection) -> Parts:
    data = IdxData(section, LARGEST_IDX, 1, 0)
    train, held_out = (Path(paths_of(section)[name]) for name in ("train", "held_out"))
    classes, side = list(data.classes), max(data.pixels)
    return Parts(train, held_out, data.num_train, data.num_held_out, classes, side, section)


def split(folder: Path, out: Path) -> None:
    """Make ``out/train`` and ``out/held_out`` with links to the images of a folder of classes.

    Every tenth image of a class is held out, at least one.

    Args:
        folder: one sub-folder of images per class; or a folder that has them in ``train``.
    Raises:
        UserError: a class has one image only; ``out`` is not empty, lies within the folder of
            classes or cannot be written. Nothing is left in ``out``.
    """
    if folder.is_dir() and files_in(folder):
        raise UserError(f"{folder}: its IDX files have their parts already; leave out --split")
    inner = (_named_parts(folder)[0] if folder.is_dir() else None) or folder
    paths, labels, classes = list_images(inner)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: must be a new or an empty folder for --split")
    if out.resolve().is_relative_to(inner.resolve()):
        raise UserError(f"{out}: must not lie within {inner}, where it would be one more class")
    by_class: list[list[Path]] = [[] for _ in classes]
    for path, label in zip(paths, labels, strict=True):
        by_class[label].append(path)
    for name, files in zip(classes, by_class, strict=True):
        if len(files) < 2:
            raise UserError(f"{inner / name}: needs two images, one of them to be held out")
    try:
        for name, files in zip(classes, by_class, strict=True):
            every = min(HELD_OUT_ONE_IN, len(files))
            for number, path in enumerate(files, 1):
                part = HELD_OUT[0] if number % every == 0 else TRAIN[0]
                link = out / part / name / path.name
                link.parent.mkdir(parents=True, exist_ok=True)
                os.symlink(path.resolve(), link)
    except BaseException as error:
        remove_split(out)
        if isinstance(error, OSError):
            raise UserError(f"{out}: cannot be written: {error.strerror or error}") from None
        raise


def remove_split(out: Path) -> None:
    """Delete the links that :func:`split` made; the folder stays, empty."""
    for part in (TRAIN[0], HELD_OUT[0]):
        shutil.rmtree(out / part, ignore_errors=True)


def new_recipe(name: str, parts: Parts, base: str | None = None) -> Recipe:
    """A recipe for a data set.

    Args:
        name: of the recipe.
        base: a recipe whose sizes are taken; None chooses sizes by the number of images.
    Raises:
        UserError: there is no such recipe.
    """
    recipe = _sized(name, parts) if base is None else _based(name, parts, load_recipe(base))
    return dataclasses.replace(recipe, description=_description(recipe, parts))


def _sized(name: str, parts: Parts) -> Recipe:
    count = parts.num_train
    size = next(size for size in SIZES if count <= size.images)
    batch = max(1, min(size.batch, count // 4))
    # Images of 128 pixels take four times the work of 64, for which few images are too few.
    side = 32 if parts.side <= 40 else 64 if parts.side <= 160 or count <= 20_000 else 128
    if parts.idx is not None:  # padded, not resized
        side = next(side for side in FORMATS if parts.side <= side)
    ch_mult, patch_nums, bridge = FORMATS[side]
    epochs = _epochs(size.steps, batch, count)
    full_only = max(1, round(0.8 * epochs))  # then a subnet in 4 of 5 steps: docs/study.md
    vae_optim = OptimSection(
        batch, 1e-3, weight_decay=0.0, schedule="cosine", final_ratio=0.02, warmup=0.05
    )
    return Recipe(
        name=name,
        description="",
        model=ModelSection(
            depth=size.depth,
            embed_dim=size.width,
            num_heads=size.heads,
            num_classes=len(parts.classes),
        ),
        vae=VQVAEConfig(
            in_channels=3 if parts.idx is None else 1,
            vocab_size=size.codes,
            z_channels=size.channels,
            ch=32 if count <= 20_000 else 64,
            ch_mult=ch_mult,
            num_res_blocks=1,
            patch_nums=patch_nums,
        ),
        vae_training=VAETraining(
            epochs=_epochs(size.vae_steps, batch, count),
            optim=vae_optim,
            revive_every=20,
        ),
        data=_data(parts),
        optim=OptimSection(batch, 1e-3, schedule="cosine", final_ratio=0.02, warmup=0.03),
        schedule=ScheduleSection(
            depths=size.depths,
            bridge=bridge,
            joint_probability=0.0,
            joint=full_only,
            transition=0,
            refinement=max(1, epochs - full_only),
            final_probability=0.8,
        ),
        output=OutputSection(),
    )


def _based(name: str, parts: Parts, base: Recipe) -> Recipe:
    """The recipe of another, with the images and the classes of a data set."""
    model = dataclasses.replace(base.model, num_classes=len(parts.classes))
    if base.model.num_classes != len(parts.classes):  # its embedding of classes does not fit
        model = dataclasses.replace(model, weights=None, weights_entry=None)
    data = _data(parts)
    if parts.idx is None and base.data.kind == "folder":
        data = dataclasses.replace(base.data, train=str(parts.train), held_out=str(parts.held_out))
    optim = _within(base.optim, parts.num_train)
    training = base.vae_training
    if training.optim is not None:
        training = dataclasses.replace(training, optim=_within(training.optim, parts.num_train))
    return dataclasses.replace(
        base, name=name, model=model, data=data, optim=optim, vae_training=training
    )


def _data(parts: Parts) -> DataSection:
    if parts.idx is not None:
        return parts.idx
    return DataSection(
        kind="folder", train=str(parts.train), held_out=str(parts.held_out), hflip=0.5
    )


def _within(optim: OptimSection, count: int) -> OptimSection:
    """The settings with a batch of at most a quarter of the images, in one part if it shrinks."""
    batch = max(1, count // 4)
    if optim.batch_size <= batch:
        return optim
    return dataclasses.replace(optim, batch_size=batch, accumulate=1)


def _epochs(steps: int, batch: int, count: int) -> int:
    """Epochs of about so many steps: at least 10, at most 400."""
    return max(10, min(400, round(steps * batch / count)))


def _description(recipe: Recipe, parts: Parts) -> str:
    side, depths = recipe.vae.image_size, recipe.schedule.depths
    subnets = f" with subnets of {' and '.join(map(str, depths))}" if depths else ""
    classes = counted(len(parts.classes), "class")
    return f"{classes} of {side}x{side} images; {counted(recipe.model.depth, 'layer')}{subnets}."


def _side(paths: list[Path]) -> int:
    """The median of the shorter sides of some of the images, pixels."""
    sides = []
    for path in paths[:: max(1, len(paths) // SAMPLE)]:
        try:
            with open_regular(path) as file, open_image(file, path) as image:
                sides.append(min(image.size))
        except (UserError, *UNREADABLE):
            continue  # the run itself skips or names it
    if not sides:
        raise UserError(f"{paths[0].parent}: none of its images can be read")
    return int(statistics.median(sides))
