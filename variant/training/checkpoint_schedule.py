"""When a run writes a checkpoint: by epochs, by steps and by minutes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from pydantic import ConfigDict

from variant.models.config import STRICT, require_plain_numbers
from variant.models.ranges import Count, CountOrZero, NotNegative


@dataclass(frozen=True)
class OutputSection:
    """When checkpoints are written and how many are kept; the last step always writes one.

    checkpoint_every: epochs between checkpoints.
    checkpoint_steps: steps between further checkpoints; 0 is none.
    checkpoint_minutes: minutes between further checkpoints; 0 is none.
    keep: number of checkpoints that are kept, the newest included.
    """

    checkpoint_every: Count = 1
    checkpoint_steps: CountOrZero = 0
    checkpoint_minutes: NotNegative = 0.0
    keep: Count = 1

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    def __post_init__(self) -> None:
        require_plain_numbers(self)


class CheckpointSchedule:
    """Tells after each step whether a checkpoint is due.

    Args:
        clock: gives seconds.
    """

    def __init__(
        self,
        section: OutputSection,
        steps_per_epoch: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._section, self._clock = section, clock
        self._epoch_steps = section.checkpoint_every * steps_per_epoch
        self._last = clock()

    @property
    def minutes_are_over(self) -> bool:
        """Whether ``checkpoint_minutes`` have gone by since the run began or tried to write one."""
        seconds = 60 * self._section.checkpoint_minutes
        return seconds > 0 and self._clock() - self._last >= seconds

    def is_due(self, step: int, minutes_are_over: bool | None = None) -> bool:
        """Whether a checkpoint is due after ``step`` steps.

        Args:
            minutes_are_over: None asks the clock. Processes of one run must agree, so they take the
                answer of one of them.
        """
        if minutes_are_over is None:
            minutes_are_over = self.minutes_are_over
        by_steps = self._section.checkpoint_steps
        return (
            step % self._epoch_steps == 0
            or (by_steps > 0 and step % by_steps == 0)
            or minutes_are_over
        )

    def restart_clock(self) -> None:
        """A checkpoint was written, or could not be: the next by time is due a period later."""
        self._last = self._clock()
