"""The state of a training run: everything that changes while it trains."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass
class RunState:
    """The state that a checkpoint must hold, besides the random generators, to resume a run.

    step: number of completed optimiser steps.
    seconds: of training, summed over all resumptions.
    loss_sums: sum and count of this epoch's training losses by name of the configuration.
    history: one entry per completed epoch, as in the metrics file.
    log: measurements that go on, of :meth:`variant.training.step_log.StepLog.saved`.
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0
    seconds: float = 0.0
    loss_sums: dict[str, tuple[float, int]] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    log: dict[str, Any] = field(default_factory=dict)

    def add_loss(self, name: str, loss: float) -> None:
        """Add one step's loss to the sum of its configuration."""
        total, count = self.loss_sums.get(name, (0.0, 0))
        self.loss_sums[name] = (total + loss, count + 1)

    def mean_losses(self) -> dict[str, float]:
        """Mean training loss of this epoch's steps by name, in alphabetical order."""
        return {name: total / count for name, (total, count) in sorted(self.loss_sums.items())}

    def best_entry(self) -> dict[str, Any] | None:
        """The entry of the lowest mean held-out loss, the earliest of equals; None before one."""
        evaluated = [entry for entry in self.history if "held_out_mean" in entry]
        return min(evaluated, key=lambda entry: entry["held_out_mean"], default=None)
