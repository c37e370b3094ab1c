"""The state of a training run: everything that changes while it trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from variant.training.ema import EMA

ADVERSARIAL = "adversarial"  # marks epochs that ended with an adversary


class Second(Protocol):
    """A second module that a run trains, with an optimiser of its own: a discriminator."""

    @property
    def module(self) -> nn.Module: ...

    @property
    def optimizer(self) -> torch.optim.Optimizer: ...


@dataclass
class RunState:
    """The state that a checkpoint must hold, besides the random generators, to resume a run.

    step: number of completed optimiser steps.
    seconds: of training, summed over all resumptions.
    loss_sums: sum and count of this epoch's training losses by name of the configuration.
    history: one entry per completed epoch, as in the metrics file.
    ema: the moving average of the module's weights; None keeps none.
    log: measurements that go on, of :meth:`variant.training.step_log.StepLog.saved`.
    adversary: the discriminator and its optimiser; None trains none.
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0
    seconds: float = 0.0
    loss_sums: dict[str, tuple[float, int]] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    ema: EMA | None = None
    log: dict[str, Any] = field(default_factory=dict)
    adversary: Second | None = None

    def add_loss(self, name: str, loss: float) -> None:
        """Add one step's loss to the sum of its configuration."""
        total, count = self.loss_sums.get(name, (0.0, 0))
        self.loss_sums[name] = (total + loss, count + 1)

    def mean_losses(self) -> dict[str, float]:
        """Mean training loss of this epoch's steps by name, in alphabetical order."""
        return {name: total / count for name, (total, count) in sorted(self.loss_sums.items())}

    def best_entry(self) -> dict[str, Any] | None:
        """The entry whose weights or average have the lowest mean held-out loss.

        Of equals the earliest; None before an evaluation. Weights that could not be written do not
        count. Once an adversary trains, the last entry is the best: it raises the held-out loss.
        """
        best = None
        for entry in self.history:
            if has_best(entry) and is_better(entry, best):
                best = entry
        return best


def has_best(entry: Mapping[str, Any]) -> bool:
    """Whether an epoch was evaluated, and its weights could be kept."""
    return "held_out_mean" in entry and "best_not_kept" not in entry


def is_better(entry: Mapping[str, Any], best: Mapping[str, Any] | None) -> bool:
    """Whether an evaluated epoch takes the place of the best one before it."""
    return best is None or ADVERSARIAL in entry or best_of(entry)[0] < best_of(best)[0]


def best_of(entry: Mapping[str, Any]) -> tuple[float, bool]:
    """The mean held-out loss of what an evaluated epoch keeps, and whether this is the average.

    The lower of both; once an adversary trains, which raises that loss, always the average if there
    is one.
    """
    weights, average = entry["held_out_mean"], entry.get("ema_held_out_mean")
    if average is not None and (ADVERSARIAL in entry or average < weights):
        return average, True
    return weights, False
