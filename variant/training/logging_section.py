"""The settings of what a run reports while it trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pydantic import ConfigDict

from variant.models.config import STRICT, require, require_plain_numbers
from variant.models.ranges import Count, CountOrZero

MAX_LABELS = 64


@dataclass(frozen=True)
class LoggingSection:
    """What a run reports; no setting changes a weight.

    every: steps between lines, on the console and in the file of steps.
    tensorboard: write the same values for TensorBoard, into the folder tensorboard of the run.
    samples_every: epochs between pictures of samples, a row for each depth; 0 draws none.
    sample_labels: classes of the samples; [] is the first eight.
    """

    every: Count = 50
    tensorboard: bool = False
    samples_every: CountOrZero = 0
    sample_labels: tuple[CountOrZero, ...] = ()

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    def __post_init__(self) -> None:
        require_plain_numbers(self)
        count = len(self.sample_labels)
        require(count <= MAX_LABELS, f"sample_labels must be at most {MAX_LABELS}", count)
