"""Averages of the weights (EMA) that are stored under the weights' names without dots.

``LitEma`` of latent-diffusion and of what was made from it is a module: its buffers are the average
of every parameter that has a gradient, under the name without dots, and ``decay`` and
``num_updates``. The dots come from the state dict of the plain model beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from variant.checkpoints.unnamed_averages import dictionaries

COUNTERS = ("decay", "num_updates")


def dotless_groups(tensors: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """The averages in one dictionary, by their prefixes ("model_ema."): tensors by dotless name."""
    groups = {}
    for key in tensors:
        prefix = key.removesuffix(COUNTERS[1]) if isinstance(key, str) else key
        if prefix == key or (prefix and not prefix.endswith(".")):
            continue
        group = {
            name.removeprefix(prefix): value
            for name, value in tensors.items()
            if isinstance(name, str) and name.startswith(prefix) and isinstance(value, Tensor)
        }
        average = {k: v for k, v in group.items() if "." not in k and k not in COUNTERS}
        if average and all(name in group and group[name].numel() == 1 for name in COUNTERS):
            groups[prefix] = average
    return groups


def without_groups(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that belong to no such average."""
    others = dict(tensors)
    for prefix, average in dotless_groups(tensors).items():
        for name in (*average, *COUNTERS):
            others.pop(prefix + name)
    return others


def dotless_averages(content: Mapping[Any, Any]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The place of every such average, its keys joined by "/", and its tensors by dotless name."""
    for path, dictionary in dictionaries(content):
        for prefix, average in dotless_groups(dictionary).items():
            yield "/".join((*path, *filter(None, prefix.split(".")))), average


def with_dots(
    average: Mapping[str, Tensor], parameters: Mapping[str, Tensor], place: str
) -> dict[str, Tensor]:
    """The averages of some parameters under their names; empty where there is none of them.

    Args:
        average: by dotless names, behind the dotless name of the module that holds the parameters.
        place: where the parameters were found ("state_dict/model/net"): of several modules with
            such parameters, the one whose name ends this place.
    Raises:
        ValueError: the shapes are not those of the parameters.
    """
    dotless = {name.replace(".", ""): name for name in parameters}
    if len(dotless) != len(parameters):
        return {}
    counts: dict[str, int] = {}
    for short in dotless:
        for key in average:
            if key.endswith(short):
                lead = key.removesuffix(short)
                counts[lead] = counts.get(lead, 0) + 1
    if not counts:
        return {}
    ending = place.replace("/", "")
    lead = max(counts, key=lambda lead: (counts[lead], ending.endswith(lead), len(lead)))
    if counts[lead] * 2 <= len(dotless):  # names that happen to end alike
        return {}
    found = {
        name: average[lead + short] for short, name in dotless.items() if lead + short in average
    }
    for name, tensor in found.items():
        if tensor.shape != parameters[name].shape:
            raise ValueError(
                f"its {lead}{name.replace('.', '')} is {tuple(tensor.shape)}, and {name} is "
                f"{tuple(parameters[name].shape)}"
            )
    return found
