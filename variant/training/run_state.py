"""The state of a training run: everything that changes while it trains."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from variant.training.ema import EMA


@dataclass
class RunState:
    """The state that a checkpoint must hold, besides the random generators, to resume a run.

    step: number of completed optimiser steps.
    seconds: of training, summed over all resumptions.
    loss_sums: sum and count of this epoch's training losses by name of the configuration.
    history: one entry per completed epoch, as in the metrics file.
    ema: the moving average of the module's weights; None keeps none.
    log: measurements that go on, of :meth:`variant.training.step_log.StepLog.saved`.
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
        count.
        """
        kept = [entry for entry in self.history if has_best(entry)]
        return min(kept, key=lambda entry: best_of(entry)[0], default=None)


def has_best(entry: Mapping[str, Any]) -> bool:
    """Whether an epoch was evaluated, and its weights could be kept."""
    return "held_out_mean" in entry and "best_not_kept" not in entry


def best_of(entry: Mapping[str, Any]) -> tuple[float, bool]:
    """The lower mean held-out loss of an evaluated epoch, and whether it is the average's."""
    weights, average = entry["held_out_mean"], entry.get("ema_held_out_mean", math.inf)
    return (average, True) if average < weights else (weights, False)
