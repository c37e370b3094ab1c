"""The interface between the trainer and a task: the VQ-VAE or the transformer."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from variant.data.images import Indices, sample_order
from variant.data.loader import Loader
from variant.data.samples import Samples, Source
from variant.training.distributed import Ranks
from variant.training.ema import EMA
from variant.training.meters import Meters
from variant.training.recipe import Recipe
from variant.training.run_state import Second

Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Summary:
    """The result of a training run.

    folder: of the run's files.  steps, epochs: completed.  seconds: of training, summed over all
        resumptions.
    train_loss, held_out_loss: losses of the best weights in eval mode by name of the configuration,
        on a fixed sample of training images and on equally many held-out images.
    best_epoch: the epoch of the lowest mean held-out loss, counted from 1.
    averaged: whether the best weights are a moving average (EMA).
    """

    folder: Path
    steps: int
    epochs: int
    seconds: float
    train_loss: dict[str, float]
    held_out_loss: dict[str, float]
    best_epoch: int
    averaged: bool = False


class Task(ABC):
    """A module to train, its data and its losses.

    kind: "var" or "vae", the first word of the names of the run's files.
    network: what :meth:`loss` calls in place of the module, which it wraps; the trainer sets it.
    adversary: a discriminator that the task trains too; None is none.
    ema_decay: of the moving average of the module's weights; 0 keeps none.
    scaler: of the loss of fp16; the trainer sets it. None scales nothing.
    meters: collect what the steps measure; None does not.
    loader: reads the samples of the steps ahead; None reads them when they are needed.
    seconds_waited: for training images and their tokens, over all resumptions of the run.
    """

    kind: str
    module: nn.Module
    data: Source
    recipe: Recipe
    adversary: Second | None = None
    scaler: torch.amp.GradScaler | None = None
    ema_decay: float = 0.0
    network: Callable[..., Any]
    meters: Meters | None = None
    seconds_waited: float = 0.0
    loader: Loader | None = None

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The module's repeated layers; FSDP2 shards each by itself."""
        return ()

    @property
    def uses_every_parameter(self) -> bool:
        """Whether every step has a gradient for every parameter."""
        return True

    @abstractmethod
    def loss(self, indices: Indices, epoch: int, step: int) -> Tensor:
        """The training loss of one part of a batch, a scalar with a gradient.

        Args:
            indices: of the part's training images.  epoch, step: counted from 0.
        """

    @abstractmethod
    def name_of_step(self, step: int) -> str:
        """The name under which the step's loss is averaged, e.g. the subnet's depth."""

    def describe_step(self, step: int) -> str:
        """All that the step draws for every image alike; the ranks compare it."""
        return self.name_of_step(step)

    @abstractmethod
    def evaluate(self, indices: Indices, *, held_out: bool) -> dict[str, float]:
        """Mean losses of some images by name, without mixup and without dropped labels.

        The name of a loss of one scale has the scale's number behind a slash: "full/0" is a part of
        "full". Must not use the global random generators.

        Args:
            indices: of held-out images if ``held_out``, else of training images, which are
                augmented as in epoch 0.
        """

    @property
    def note(self) -> str | None:
        """A line to print before the first step."""
        return None

    @property
    def num_evaluated(self) -> int:
        """Number of images in an evaluation."""
        count = self.data.num_held_out
        return min(count, self.recipe.eval.limit or count)

    def held_out_losses(self, ranks: Ranks) -> dict[str, float]:
        """Losses on held-out images; the best weights are those of the lowest mean.

        Every rank evaluates some of the images, and gets the losses of all.
        """
        return self._mean_losses(np.arange(self.num_evaluated), ranks, held_out=True)

    def train_losses(self, ranks: Ranks) -> dict[str, float]:
        """The same losses on a fixed sample of equally many training images."""
        order = sample_order(self.data.num_train)
        return self._mean_losses(order[: self.num_evaluated], ranks, held_out=False)

    def _mean_losses(
        self, indices: np.ndarray, ranks: Ranks, *, held_out: bool
    ) -> dict[str, float]:
        totals: dict[str, float] = {}
        size = self.recipe.eval.batch_size
        own, most = indices[ranks.share(len(indices))], math.ceil(len(indices) / ranks.size)
        for start in range(0, most, size):
            part = own[start : start + size]
            # FSDP2 gathers weights in every forward pass, so that all ranks need the same number
            # of them: one that has no image left takes any, which does not count.
            losses = self.evaluate(part if len(part) else indices[:1], held_out=held_out)
            for name, loss in losses.items():
                totals[name] = totals.get(name, 0.0) + loss * len(part)
        sums = ranks.sums(list(totals.values()))
        return {name: total / len(indices) for name, total in zip(totals, sums, strict=True)}

    def layer_groups(self) -> dict[str, Sequence[nn.Module]]:
        """Layers by the name of their group, whose gradient norms are reported."""
        return {}

    def values_of_step(self, step: int) -> dict[str, float]:
        """What is reported of a step besides its losses; known without the device."""
        return {}

    def choose_teacher(self, ema: EMA | None) -> None:
        """Called before the first step of a new or resumed run, when the module has the weights
        that the run started from.

        Args:
            ema: the moving average of the weights, if the run keeps one.
        """
        return

    def ended_phase(self, history: Sequence[Mapping[str, Any]]) -> str | None:
        """The phase that the last epoch of a run's history ends early; None if none does."""
        return None

    def epochs_by(self, history: Sequence[Mapping[str, Any]]) -> int | None:
        """Epochs of the complete run, given its history; None leaves them as they are.

        Called before the first step of a new or resumed run and after every epoch.
        """
        return None

    def flop_of_step(self, step: int) -> int:
        """FLOP of the forward and backward pass for one image; 0 is not counted."""
        return 0

    def samples(self, ranks: Ranks) -> dict[str, Tensor]:
        """What the present weights make of fixed inputs: rows of images by caption.

        Must not use the global random generators. Every rank calls it.

        Returns:
            (B, I, Y, X) in [0, 1] for each row; {} on ranks other than the first.
        """
        return {}

    def measure(self, key: str, value: Tensor, weight: Tensor | float = 1.0) -> None:
        """Add a value, or a row of them, to what the step reports: see :class:`Meters`."""
        if self.meters is not None:
            self.meters.add(key, value, weight)

    def fetch(self, indices: Indices, epoch: int) -> Samples:
        """The samples of the next part of a batch."""
        with self.waiting():
            source = self.data if self.loader is None else self.loader
            return source.samples(indices, epoch)

    def share_bad_items(self, ranks: Ranks) -> None:
        """Count the unreadable files that any rank has found since the last call.

        Every rank calls this, and has the same count then: ``data.max_bad`` is a share of the run.

        Raises:
            UserError: they are more than this share; on every rank.
        """
        bad = self.data.bad
        bad.add_found([item for items in ranks.gathered(bad.take_unshared()) for item in items])

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the seconds of the block, which fetches training images or their tokens."""
        started = time.monotonic()
        yield
        self.seconds_waited += time.monotonic() - started

    def prepare(self, report: Report) -> None:
        """Called before the first step of a new or resumed run.

        Must not use the global random generators.

        Args:
            report: called with what is being done, and how much of how much is done.
        """
        return

    def before_step(self, indices: Indices, epoch: int, step: int) -> Mapping[str, Tensor] | None:
        """Called before the forward pass of each step.

        Returns:
            bool (rows,) by the name of a parameter: the rows that were replaced, which the moving
            average takes as they are; None replaced none.
        """
        return None

    def after_backward(self, step: int, rate: float) -> Tensor | None:
        """Called when a step's gradients are complete, before the optimiser uses them.

        Args:
            rate: learning rate of the step.
        Returns:
            the norm of the gradients of the second module, the adversary; one that is not finite
            skips the step and stops the run. None without one.
        """
        return None

    def is_adversarial(self, step: int) -> bool:
        """Whether a discriminator has trained when this many steps are completed."""
        return False

    def mean_loss(self, losses: Mapping[str, float]) -> float:
        """The mean of the losses of an evaluation, by which the best weights are chosen."""
        return sum(losses.values()) / len(losses)

    def after_step(self, step: int) -> None:
        """Called after the optimiser's step."""
        return


def split_scales(losses: Mapping[str, float]) -> tuple[dict[str, float], dict[str, list[float]]]:
    """The losses of an evaluation over all scales, and those of each scale, both by name."""
    means = {name: loss for name, loss in losses.items() if "/" not in name}
    by_scale: dict[str, list[float]] = {}
    for name, loss in losses.items():
        if "/" in name:  # in the order of the scales
            by_scale.setdefault(name.partition("/")[0], []).append(loss)
    return means, by_scale
