"""Numbers of the device that are read a step after they were computed, so that no step waits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from variant.errors import UserError

T = TypeVar("T")


def steps_late(device: torch.device) -> int:
    """Steps after which the numbers of a step are read: a GPU then has the next one to do."""
    return 1 if device.type == "cuda" else 0


class LateValues(Generic[T]):
    """A queue of numbers, in the order of the steps; on a CPU each can be read at once.

    Args:
        device: of the numbers.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._late = device, steps_late(device)
        self._queue: list[tuple[T, Tensor, torch.cuda.Event | None]] = []

    def add(self, step: T, values: Sequence[Tensor]) -> None:
        """Queue the 0-d tensors of a step; ``step`` comes back with their numbers."""
        # Into pinned memory: the host does not wait.
        copy = torch.stack([v.detach().float() for v in values]).to("cpu", non_blocking=True)
        event = None
        if self._device.type == "cuda":
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self._device))
        self._queue.append((step, copy, event))

    def read(self, *, everything: bool = False) -> Iterator[tuple[T, list[float]]]:
        """The numbers that have not been read, without those of the last step on a GPU.

        Args:
            everything: also those of the last step; waits for the device.
        """
        while len(self._queue) > (0 if everything else self._late):
            step, copy, event = self._queue.pop(0)
            if event is not None:
                event.synchronize()
            yield step, copy.tolist()


def require_finite(value: float, what: str, recipe: str, step: int, epoch: int) -> None:
    """Raises: UserError, for a run of that recipe, where a value of a step is not finite."""
    if not math.isfinite(value):
        raise UserError(
            f"{recipe}: the {what} is not finite at step {step} (epoch {epoch}); try a lower "
            "learning_rate or precision fp32"
        )
