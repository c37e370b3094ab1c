"""The layers of a model's depths, by its config alone."""

from __future__ import annotations

from collections.abc import Sequence

from variant.models.config import VARConfig
from variant_kernels.arguments import sequence
from variant_kernels.plans.depth_schedule import resolve_layers


def layers_of(config: VARConfig, depth: int | Sequence[int], op: str) -> tuple[int, ...]:
    """The layers of a depth: those that the config records, or evenly chosen ones.

    Args:
        depth: number of layers, or a list of layers, which need not be recorded.
        op: the function that the messages name.
    Raises:
        TypeError: depth is neither an integer nor a list of integers.
        ValueError: an invalid list; a number that is out of range, or that a config with subnets
            does not record.
    """
    full, subnets = config.depth, config.subnets
    layers = resolve_layers(full, depth, op=op)
    if sequence(depth) is not None or len(layers) == full:
        return layers
    if subnets and len(layers) not in subnets:
        raise ValueError(
            f"{op}: depth must be one that the model was trained at "
            f"({', '.join(map(str, subnets))} or {full}); got {len(layers)}. A list of layers, "
            f"such as {list(layers)}, runs untrained"
        )
    return subnets.get(len(layers), layers)
