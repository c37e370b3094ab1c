"""Losses of prefixes that outlive the process: a file in the folder of a search.

Axes: P prefixes, K scales, D layers of the model, N images.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from variant.errors import UserError
from variant.files import read_safetensors, save_safetensors
from variant.paths import path_kind, shown
from variant.search.space import Prefix

# Between two writes: a killed search loses the losses of so many seconds.
SAVE_SECONDS = 10.0
DIGITS = 16  # of the SHA-256 in a file's name


def losses_file(folder: Path, weights: str, labels_N: Tensor, tokens_NL: Tensor) -> Path:
    """The file of the losses of these weights on these images; others have another file.

    Args:
        weights: a digest of them.  labels_N, tokens_NL: of the images.
    """
    digest = hashlib.sha256(weights.encode())
    for tensor in (labels_N, tokens_NL):
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return folder / f"losses-{digest.hexdigest()[:DIGITS]}.safetensors"


class SavedLosses:
    """A function of prefixes, each computed once, in this process or an earlier one.

    Args:
        losses: computes the losses (N,) float64 of a prefix.
        path: the file; None keeps nothing.
        count: N.  num_scales, full_depth: K and D.
        read: whether to read the file first, if it is there.
    Raises:
        UserError: the file is damaged, or not of such losses.
    """

    def __init__(
        self,
        losses: Callable[[Prefix], np.ndarray],
        path: Path | None,
        *,
        count: int,
        num_scales: int,
        full_depth: int,
        read: bool,
    ) -> None:
        self.losses, self.path = losses, path
        self.count, self.num_scales, self.full_depth = count, num_scales, full_depth
        self.known: dict[Prefix, np.ndarray] = {}
        self.computed = 0
        if path is not None and read and path_kind(path) is not None:
            self.known = self._read(path)
        self._saved, self._saved_at = len(self.known), time.monotonic()

    def __call__(self, prefix: Prefix) -> np.ndarray:
        """(N,) float64."""
        if prefix not in self.known:
            self.known[prefix] = self.losses(prefix)
            self.computed += 1
            if time.monotonic() - self._saved_at >= SAVE_SECONDS:
                self.save()
        return self.known[prefix]

    def of_schedule(self, schedule: Prefix) -> np.ndarray:
        """(N,) float64: the sum over its prefixes."""
        parts = [self(schedule[:end]) for end in range(1, len(schedule) + 1)]
        return np.sum(parts, axis=0)

    def save(self) -> None:
        """Write all losses, if there are new ones.  Raises: UserError, if it cannot be written."""
        if self.path is not None and len(self.known) > self._saved:
            prefixes = list(self.known)
            layers_PKD = torch.zeros(
                len(prefixes), self.num_scales, self.full_depth, dtype=torch.uint8
            )
            for row, prefix in enumerate(prefixes):
                for scale, layers in enumerate(prefix):
                    layers_PKD[row, scale, list(layers)] = 1
            losses_PN = torch.from_numpy(np.stack([self.known[prefix] for prefix in prefixes]))
            save_safetensors(self.path, {"layers_PKD": layers_PKD, "losses_PN": losses_PN})
            self._saved = len(prefixes)
        self._saved_at = time.monotonic()

    def _read(self, path: Path) -> dict[Prefix, np.ndarray]:
        tensors = read_safetensors(path)
        layers, losses = tensors.get("layers_PKD"), tensors.get("losses_PN")
        count = -1 if losses is None else len(losses)
        if (
            layers is None
            or losses is None
            or layers.dtype != torch.uint8
            or tuple(layers.shape) != (count, self.num_scales, self.full_depth)
            or losses.dtype != torch.float64
            or tuple(losses.shape) != (count, self.count)
            or not bool((losses.isfinite() & (losses >= 0)).all())
        ):
            raise UserError(
                f"{shown(path)}: holds no losses of this model and these images; delete it, or "
                "give another --out"
            )
        known = {}
        for rows_KD, losses_N in zip(layers.numpy(), losses.numpy(), strict=True):
            sets = [tuple(np.flatnonzero(row_D).tolist()) for row_D in rows_KD]
            known[tuple(layers for layers in sets if layers)] = losses_N
        return known
