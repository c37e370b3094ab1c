"""What a family of models must offer to be compared before and after ``patch``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class DropinCase:
    """One model of a foreign codebase, with random weights, on the CPU, in eval mode.

    model: what ``patch`` gets; further models that take part in ``run``: others.
    run: (seed, greedy) to the generated tokens, through the codebase's own generation function.
    logits: of all tokens of a greedy generation.
    loss: of a training step on fixed inputs; None where the codebase has none that runs here.
    scales: tokens per scale; layers: of model; outside: linear work per token outside the layers (a
        head, say) as a share of that of all layers. They give the ceiling of a smaller depth.
    accelerate: (seed, greedy) to tokens by ``variant.accelerate``; None where it does not apply.
    """

    model: nn.Module
    run: Callable[[int, bool], Tensor]
    logits: Callable[[], Tensor]
    loss: Callable[[], Tensor] | None
    scales: tuple[int, ...]
    layers: int
    outside: float = 0.0
    others: tuple[nn.Module, ...] = ()
    accelerate: Callable[[int, bool], Tensor] | None = None

    @property
    def models(self) -> tuple[nn.Module, ...]:
        """All that take part."""
        return (self.model, *self.others)


@contextmanager
def foreign_modules(repo: Path, *tops: str) -> Iterator[Callable[[str], ModuleType]]:
    """Import from a checkout; its modules of everyday names are visible inside only.

    Args:
        tops: top-level packages of the checkout, such as "models".
    """

    def named() -> list[str]:
        return [name for name in sys.modules if name.split(".")[0] in tops]

    mine: dict[str, Any] = {name: sys.modules.pop(name) for name in named()}
    sys.path.insert(0, str(repo.resolve()))
    try:
        yield importlib.import_module
    finally:
        sys.path.remove(str(repo.resolve()))
        for name in named():
            del sys.modules[name]
        sys.modules.update(mine)
