"""What a trainer trains: the interface of a task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from variant.data.images import ImageData, Indices
from variant.training.recipe import Recipe

SAMPLE_SEED = 0  # of the training images that are evaluated at the end


@dataclass(frozen=True)
class Summary:
    """What a training run gave.

    folder: where its files are.  steps, epochs: how far it went.  seconds: of all its sittings.
    train_loss, held_out_loss: by configuration, of the best weights in eval mode, on a fixed sample
        of training images and on as many held-out ones.
    best_epoch: the epoch of the best held-out mean, counted from 1.
    """

    folder: Path
    steps: int
    epochs: int
    seconds: float
    train_loss: dict[str, float]
    held_out_loss: dict[str, float]
    best_epoch: int


class Task(ABC):
    """What is trained: a module, its losses, and what happens around a step."""

    kind: str
    module: nn.Module
    data: ImageData
    recipe: Recipe

    @abstractmethod
    def loss(self, indices: Indices, epoch: int, step: int) -> Tensor:
        """The loss of one part of a batch."""

    @abstractmethod
    def name_of_step(self, step: int) -> str:
        """Under which name the step's loss is averaged, e.g. the subnet's depth."""

    @abstractmethod
    def evaluate(self, indices: Indices, *, held_out: bool) -> dict[str, float]:
        """Mean losses over some images, without mixup and dropped labels; draws nothing.

        held_out: which part the indices are of; training images are augmented as in epoch 0.
        """

    @property
    def num_evaluated(self) -> int:
        """How many images an evaluation takes."""
        count = self.data.num_held_out
        return min(count, self.recipe.eval.limit or count)

    def held_out_losses(self) -> dict[str, float]:
        """Losses on held-out images; their mean chooses the best weights."""
        return self._mean_losses(np.arange(self.num_evaluated), held_out=True)

    def train_losses(self) -> dict[str, float]:
        """The same losses on a fixed sample of as many training images."""
        order = np.random.default_rng(SAMPLE_SEED).permutation(self.data.num_train)
        return self._mean_losses(order[: self.num_evaluated], held_out=False)

    def _mean_losses(self, indices: np.ndarray, *, held_out: bool) -> dict[str, float]:
        totals: dict[str, float] = {}
        size = self.recipe.eval.batch_size
        for start in range(0, len(indices), size):
            part = indices[start : start + size]
            for name, loss in self.evaluate(part, held_out=held_out).items():
                totals[name] = totals.get(name, 0.0) + loss * len(part)
        return {name: total / len(indices) for name, total in totals.items()}

    def prepare(self) -> None:
        """Called once before the first step of a sitting; must not draw from global generators."""
        return

    def before_step(self, indices: Indices, epoch: int, step: int) -> None:
        """Called before the forward pass of each step."""
        return
