"""Pictures of what the present weights make: one row for each depth, a column for each label."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL.Image import Image
from torch import Tensor

from variant.engine.grid import grid
from variant.engine.images import to_pil
from variant.files import atomic_write

# Columns where the recipe chooses no labels.
COLUMNS = 8
# The draws of every grid are the same, so that grids of several epochs compare.
SEED = 0
# Guidance and filter are those of `variant generate`.
CFG, TOP_P = 1.5, 0.96


def sample_name(kind: str, epoch: int | None) -> str:
    """The name of the file of an epoch's grid; None is the pattern of all."""
    return f"{kind}-samples-{'*' if epoch is None else f'{epoch:04d}'}.png"


def draw_grid(rows: Mapping[str, Tensor]) -> Image:
    """One picture of rows of images.  Args: rows: (B, I, Y, X) in [0, 1] by caption."""
    return grid([to_pil(images) for images in rows.values()], list(rows))


def save_grid(picture: Image, path: Path) -> None:
    """Write a picture as PNG.  Raises: UserError, if the file cannot be written."""
    with atomic_write(path) as temporary:
        picture.save(temporary, format="PNG")


def pixels(picture: Image) -> np.ndarray:
    """(Y, X, 3) uint8."""
    return np.asarray(picture.convert("RGB"))
