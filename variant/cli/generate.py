"""``variant generate``: labels in, PNG files and a table out."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from variant.cli.dtypes import DTYPES
from variant.cli.options import Generate
from variant.cli.output import console, mebibytes, table
from variant.engine.generation import Generation, OnScale, PartialResult, Sampling
from variant.engine.planning import depths_of
from variant.errors import UserError
from variant.files import atomic_write
from variant.paths import path_kind
from variant.supernet import VARiant

# Small images are enlarged in a grid.
GRID_CELL_PIXELS = 64
GRID_GAP_PIXELS = 4
GRID_CAPTION_PIXELS = 56


def generate(command: Generate) -> None:
    """Generate images, write them, print time per image and K/V bytes, planned and allocated."""
    if command.count < 1:
        raise UserError(f"generate: --count must be at least 1; got {command.count}")
    if command.all_depths and command.depth is not None:
        raise UserError("generate: --all-depths and --depth exclude each other")
    one_file = check_target(command.out)
    model = VARiant.from_pretrained(command.model)
    classes = model.var.config.num_classes
    labels = list(command.labels) or list(range(min(classes, 10)))
    labels = [label for label in labels for _ in range(command.count)]
    depths = list(depths_of(model.var.config)) if command.all_depths else [command.depth]
    if command.all_depths and model.var.config.bridge is None and command.bridge is None:
        raise UserError(f"generate: {command.model} was trained at one depth; --bridge is needed")
    with _progress(len(depths) * len(labels) * model.var.layout.num_scales) as on_scale:
        # Warm-up with one image, not measured: starts threads, loads kernels, allocates pages.
        _generate(command, model, labels[:1], depths[-1], None)
        results = [_generate(command, model, labels, depth, on_scale) for depth in depths]
    if one_file:
        if len(results) > 1:
            rows = [result.images for result in results]
            captions = [f"depth {depth}" for depth in depths]
        else:
            rows = list(results[0].images.split(command.count if command.count > 1 else 10))
            captions = []
        with atomic_write(command.out) as path:
            grid(rows, captions).save(path, format="PNG")
        written = str(command.out)
    else:
        written = _write_each(command.out, depths, labels, results)
    _report(command, model, depths, results, len(labels))
    console().print(f"wrote {written}")


@contextmanager
def _progress(total: int) -> Iterator[OnScale | None]:
    """A progress bar on standard error, in images x scales; None without a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    bar = Progress(*Progress.get_default_columns(), console=Console(stderr=True), transient=True)
    with bar:
        task = bar.add_task("generating", total=total)

        def on_scale(scale: int, partial: PartialResult) -> None:
            bar.advance(task, len(partial.tokens))

        yield on_scale


def _generate(
    command: Generate,
    model: VARiant,
    labels: Sequence[int],
    depth: int | None,
    on_scale: OnScale | None,
) -> Generation:
    engine = model.engine(DTYPES[command.dtype] if command.dtype else None)
    return engine.generate_with(
        labels,
        Sampling(command.cfg, command.top_k, command.top_p, command.seed),
        depth=depth,
        bridge=command.bridge,
        max_batch=command.max_batch,
        on_scale=on_scale,
        kv_dtype=command.kv_dtype,
    )


def check_target(out: Path) -> bool:
    """Fails before the work if the result cannot be written; creates nothing.

    Returns:
        Whether ``out`` names one PNG file; otherwise it is a folder.
    Raises:
        UserError: ``out`` is neither, or it cannot be written.
    """
    if not out.name:
        raise UserError("generate: --out must name a folder or a .png file; got nothing")
    one_file = out.suffix.lower() == ".png"
    kind = path_kind(out)
    if one_file and kind == "folder":
        raise UserError(f"{out}: is a folder; --out must name a folder without .png, or a file")
    if out.suffix and not one_file and kind != "folder":
        raise UserError(f"{out}: --out must be a folder or end in .png")
    nearest = out.parent if one_file else out
    while path_kind(nearest) is None:
        nearest = nearest.parent
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        reason = "no permission" if nearest.is_dir() else "is not a folder"
        raise UserError(f"{out}: cannot be written: {nearest}: {reason}")
    return one_file


def to_pil(image_IYX: Tensor) -> Image.Image:
    """One image (3 or 1, H, W) in [0, 1] as 8-bit RGB."""
    pixels_YXI = (image_IYX.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
    if pixels_YXI.shape[-1] == 1:
        pixels_YXI = pixels_YXI.expand(-1, -1, 3)
    return Image.fromarray(pixels_YXI.cpu().contiguous().numpy())


def grid(rows: Sequence[Tensor], captions: Sequence[str] = ()) -> Image.Image:
    """Rows of images (B, 3, H, W) as one picture; small images are enlarged, captions at left."""
    side = rows[0].shape[-1]
    cell = side * max(1, round(GRID_CELL_PIXELS / side))
    step = cell + GRID_GAP_PIXELS
    left = GRID_GAP_PIXELS + (GRID_CAPTION_PIXELS if captions else 0)
    width = left + max(len(row) for row in rows) * step
    sheet = Image.new("RGB", (width, len(rows) * step + GRID_GAP_PIXELS), "white")
    draw = ImageDraw.Draw(sheet)
    for y, row in enumerate(rows):
        top = y * step + GRID_GAP_PIXELS
        if captions:
            draw.text((GRID_GAP_PIXELS, top + cell // 2), captions[y], "black", anchor="lm")
        for x, image in enumerate(row):
            tile = to_pil(image).resize((cell, cell), Image.Resampling.LANCZOS)
            sheet.paste(tile, (left + x * step, top))
    return sheet


def _write_each(
    folder: Path,
    depths: Sequence[int | None],
    labels: Sequence[int],
    results: Sequence[Generation],
) -> str:
    count = 0
    for depth, result in zip(depths, results, strict=True):
        prefix = f"depth{depth}_" if len(depths) > 1 else ""
        for index, (label, image) in enumerate(zip(labels, result.images, strict=True)):
            with atomic_write(folder / f"{prefix}{index:05d}_class{label}.png") as path:
                to_pil(image).save(path, format="PNG")
            count += 1
    return f"{count} images to {folder}"


def _report(
    command: Generate,
    model: VARiant,
    depths: Sequence[int | None],
    results: Sequence[Generation],
    count: int,
) -> None:
    first = results[0].stats
    at_once = -(-count // first.batches)
    kv_text = "" if first.kv_dtype == first.dtype else f", K/V {first.kv_dtype}"
    timings = table(
        f"{command.model}: {count} images, {at_once} at once, seed {command.seed}, cfg "
        f"{command.cfg:g}, {first.dtype}{kv_text}, {torch.get_num_threads()} threads",
        "depth",
        "ms per image",
        "of it decoder",
        "K/V planned",
        "K/V allocated",
        "of paper's scheme",
    )
    for depth, result in zip(depths, results, strict=True):
        stats = result.stats
        timings.add_row(
            str(depth if depth is not None else model.var.config.depth),
            f"{1000 * stats.seconds / count:.2f}",
            f"{1000 * stats.decode_seconds / count:.2f}",
            mebibytes(stats.kv_planned_bytes),
            mebibytes(stats.kv_allocated_bytes),
            f"{stats.kv_allocated_bytes / stats.kv_paper_bytes:.1%}",
        )
    console().print(timings)
