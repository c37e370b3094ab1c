"""The settings of what a run reports while it trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pydantic import ConfigDict

from variant.models.config import STRICT, require_plain_numbers
from variant.models.ranges import Count


@dataclass(frozen=True)
class LoggingSection:
    """What a run reports; no setting changes a weight.

    every: steps between lines, on the console and in the file of steps.
    tensorboard: write the same values for TensorBoard, into the folder tensorboard of the run.
    """

    every: Count = 50
    tensorboard: bool = False

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    def __post_init__(self) -> None:
        require_plain_numbers(self)
