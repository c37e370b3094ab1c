"""The interface of a model family for the comparison before and after ``patch``."""

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
    """One model of another codebase, with random weights, on the CPU, in eval mode.

    model: the argument of ``patch``.  others: further models that ``run`` uses.
    run: (seed, greedy) -> generated tokens, by the codebase's own generation function.
    logits: the logits of all tokens of a greedy generation.
    loss: the loss of a training step on fixed inputs; None if its training code cannot run here.
    scales: tokens per scale.  layers: number of layers of model.  outside: linear work per token
        outside the layers (of the head, say) as a share of that of all layers. These three give the
        largest possible speed-up of a smaller depth.
    accelerate: (seed, greedy) -> tokens by ``variant.accelerate``; None if it does not apply.
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
        """All models of the case."""
        return (self.model, *self.others)


@contextmanager
def foreign_modules(repo: Path, *packages: str) -> Iterator[Callable[[str], ModuleType]]:
    """Import from a checkout; on exit its modules, whose names are common, leave ``sys.modules``.

    Args:
        packages: top-level packages of the checkout, such as "models".
    """

    def loaded() -> list[str]:
        return [name for name in sys.modules if name.split(".")[0] in packages]

    before: dict[str, Any] = {name: sys.modules.pop(name) for name in loaded()}
    sys.path.insert(0, str(repo.resolve()))
    try:
        yield importlib.import_module
    finally:
        sys.path.remove(str(repo.resolve()))
        for name in loaded():
            del sys.modules[name]
        sys.modules.update(before)
