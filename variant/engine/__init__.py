"""Generation: the step loop over a paged cache, captured graphs, memory planning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from variant.engine.engine import Engine

__all__ = ["Engine"]


def __getattr__(name: str) -> Any:
    # At first use: planning, in this package, needs no torch.
    if name != "Engine":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from variant.engine.engine import Engine

    return Engine
