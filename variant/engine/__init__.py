"""Generation: the step loop over a paged cache, captured graphs, memory planning."""

from variant.engine.engine import Engine

__all__ = ["Engine"]
