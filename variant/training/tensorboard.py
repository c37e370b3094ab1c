"""TensorBoard: the lines of a run's steps as curves, and its pictures."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from variant.errors import UserError


def require_tensorboard(name: str) -> None:
    """Check that the package ``tensorboard`` is installed.

    Args:
        name: of the recipe.
    Raises:
        UserError: it is not.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise UserError(
            f"{name}: logging.tensorboard needs the package tensorboard: "
            'pip install "variant-kernels[train]", or set it to false'
        )


class TensorBoard:
    """Writes event files into a folder; ``tensorboard --logdir FOLDER`` shows them.

    Args:
        folder: of one run's curves.
        step: completed steps; what an earlier process wrote of later ones is hidden.
    """

    def __init__(self, folder: Path, step: int) -> None:
        # Here, because the import takes as long as a step.
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def scalars(self, line: Mapping[str, float]) -> None:
        """Add a point to the curve of each key but "step"."""
        step = int(line["step"])
        for key, value in line.items():
            if key != "step":
                self._writer.add_scalar(key, value, step)

    def image(self, key: str, pixels_YXI: np.ndarray[Any, Any], step: int) -> None:
        """Add a picture of 8-bit RGB pixels."""
        self._writer.add_image(key, pixels_YXI, step, dataformats="HWC")

    def flush(self) -> None:
        """Write what is still in memory, so that a checkpoint is not ahead of the curves."""
        self._writer.flush()

    def close(self) -> None:
        """Write the rest and close the file."""
        self._writer.close()
