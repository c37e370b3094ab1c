"""Losses of prefixes that outlive the process: a file in the folder of a search.

Axes: P prefixes, K scales, D layers of the model, N images.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from variant.errors import UserError
from variant.files import read_safetensors, save_safetensors
from variant.paths import path_kind, shown
from variant.search.space import Prefix

# Some of the images, and their losses of a prefix.
Part = tuple[slice, Callable[[Prefix], np.ndarray]]
# Between two writes: a killed search loses the losses of so many seconds.
SAVE_SECONDS = 10.0
# Of the file and of how the losses are computed: files of another number are not read.
FORMAT = 2
DIGITS = 16  # of the SHA-256 in a file's name


def losses_file(
    folder: Path,
    weights: str,
    config: Mapping[str, Any],
    device: str,
    labels_N: Tensor,
    tokens_NL: Tensor,
) -> Path:
    """The file of the losses of a model on these images; others have another file.

    Args:
        weights: a digest of them.  config: plain values of the models' configs, of which losses
            depend on more than the weights, e.g. ``norm_eps``.
        device: its type; losses differ by rounding.  labels_N, tokens_NL: of the images.
    """
    plain = json.dumps([FORMAT, weights, config, device], sort_keys=True)
    digest = hashlib.sha256(plain.encode())
    for tensor in (labels_N, tokens_NL):
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return folder / f"losses-{digest.hexdigest()[:DIGITS]}.safetensors"


class SavedLosses:
    """A function of prefixes, each computed once, in this process or an earlier one.

    Args:
        losses: computes the losses (N,) float64 of a prefix.
        parts: the same for parts of the images, in their order; :meth:`fill` takes these.
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
        parts: Sequence[Part] = (),
    ) -> None:
        self.losses, self.path = losses, path
        self.parts = parts or [(slice(0, count), losses)]
        self.count, self.num_scales, self.full_depth = count, num_scales, full_depth
        self.known: dict[Prefix, np.ndarray] = {}
        # Of some of the images so far; NaN for the others.
        self.partial: dict[Prefix, np.ndarray] = {}
        self.computed = 0
        if path is not None and read and path_kind(path) is not None:
            self._read(path)
        self._is_saved, self._saved_at = True, time.monotonic()

    def __call__(self, prefix: Prefix) -> np.ndarray:
        """(N,) float64."""
        if prefix in self.partial:
            self.fill([prefix])
        elif prefix not in self.known:
            self.known[prefix] = self.losses(prefix)
            self._count()
        return self.known[prefix]

    def _count(self) -> None:
        """One more prefix is known."""
        self.computed += 1
        self._changed()

    def _changed(self) -> None:
        self._is_saved = False
        if time.monotonic() - self._saved_at >= SAVE_SECONDS:
            self.save()

    def fill(
        self, prefixes: Iterable[Prefix], report: Callable[[float], None] = lambda share: None
    ) -> None:
        """Compute the losses of prefixes for one part of the images after another.

        So K and V of one part are all that is needed at a time. The prefixes are taken in the
        order of a search by depth, in which each scale of each one runs once.

        Args:
            report: called before each loss of each part with the share that is done.
        """
        missing = sorted({prefix for prefix in prefixes if prefix not in self.known})
        for prefix in missing:
            self.partial.setdefault(prefix, np.full(self.count, np.nan))
        for number, (images, losses) in enumerate(self.parts):
            for place, prefix in enumerate(missing):
                report((number + place / len(missing)) / len(self.parts))
                losses_N = self.partial[prefix]
                if np.isnan(losses_N[images]).any():
                    losses_N[images] = losses(prefix)
                    self._changed()
        for prefix in missing:
            self.known[prefix] = self.partial.pop(prefix)
        self.computed += len(missing)

    @property
    def num_known(self) -> int:
        """Losses of prefixes; those of some of the images count as their share, rounded down."""
        some = sum(int(np.isfinite(losses_N).sum()) for losses_N in self.partial.values())
        return len(self.known) + some // self.count

    def of_schedule(self, schedule: Prefix) -> np.ndarray:
        """(N,) float64: the sum over its prefixes."""
        prefixes = [schedule[:end] for end in range(1, len(schedule) + 1)]
        if len(self.parts) > 1:
            self.fill(prefixes)
        return np.sum([self(prefix) for prefix in prefixes], axis=0)

    def save(self) -> None:
        """Write all losses, if there are new ones.  Raises: UserError, if it cannot be written."""
        if self.path is not None and not self._is_saved:
            values = self.known | self.partial
            prefixes = list(values)
            layers_PKD = torch.zeros(
                len(prefixes), self.num_scales, self.full_depth, dtype=torch.uint8, device="cpu"
            )
            for row, prefix in enumerate(prefixes):
                for scale, layers in enumerate(prefix):
                    layers_PKD[row, scale, list(layers)] = 1
            losses_PN = torch.from_numpy(np.stack(list(values.values())))
            save_safetensors(self.path, {"layers_PKD": layers_PKD, "losses_PN": losses_PN})
            self._is_saved = True
        self._saved_at = time.monotonic()

    def _read(self, path: Path) -> None:
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
            or not bool((losses.isnan() | (losses.isfinite() & (losses >= 0))).all())
        ):
            raise UserError(
                f"{shown(path)}: holds no losses of this model and these images; delete it, or "
                "give another --out"
            )
        for rows_KD, losses_N in zip(layers.numpy(), losses.numpy(), strict=True):
            sets = [tuple(np.flatnonzero(row_D).tolist()) for row_D in rows_KD]
            is_whole = not np.isnan(losses_N).any()
            (self.known if is_whole else self.partial)[
                tuple(layers for layers in sets if layers)
            ] = losses_N
