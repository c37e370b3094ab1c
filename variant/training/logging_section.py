"""The settings of what a run reports while it trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pydantic import ConfigDict

from variant.models.config import STRICT, require, require_plain_numbers


@dataclass(frozen=True)
class LoggingSection:
    """What a run reports; no setting changes a weight.

    every: steps between lines, on the console and in the file of steps.
    """

    every: int = 50

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    def __post_init__(self) -> None:
        require_plain_numbers(self)
        require(self.every >= 1, "every must be at least 1", self.every)
