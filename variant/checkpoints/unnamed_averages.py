"""Averages of the weights (EMA) that are stored without the names of the weights.

torch_ema, diffusers' EMAModel and guided-diffusion keep a list of tensors in the order of
``model.parameters()``. A module's state dict has its parameters in that order, with buffers between
them: where a file holds both, the names are those of its state dict.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from variant_kernels.wording import counted

# Words in the name of an average of the weights.
AVERAGES = {"ema", "emas", "swa", "averaged", "average", "avg", "averaging", "polyak", "shadow"}
# Words in the name of weights that an average has replaced for a while: torch_ema's
# collected_params, diffusers' temp_stored_params.
KEPT_ASIDE = {"collected", "stored", "backup"}
MAX_NESTING = 5


def words(name: str) -> list[str]:
    """The words of a name: ``model_ema``, ``EMAModel`` and ``model-ema`` all have "ema"."""
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name)
    return [word.lower() for word in re.split(r"[^A-Za-z]+", apart)]


def is_average(names: Sequence[str]) -> bool:
    """Whether one of the keys that lead to an entry names an average of the weights."""
    return any(word in AVERAGES for name in names for word in words(name))


def dictionaries(
    content: Mapping[Any, Any] | Sequence[Any],
    path: tuple[str, ...] = (),
    seen: set[int] | None = None,
) -> Iterator[tuple[tuple[str, ...], Mapping[Any, Any]]]:
    """A dictionary and those within it, also within its lists, each once and after its parent.

    Returns:
        (names, dictionary) of each: the keys, and the places in lists, that lead to it.
    """
    seen = set() if seen is None else seen
    if id(content) in seen or len(path) > MAX_NESTING:  # under two names, or within itself
        return
    seen.add(id(content))
    if isinstance(content, Mapping):
        yield path, content
    items = content.items() if isinstance(content, Mapping) else enumerate(content)
    for key, value in items:
        if isinstance(value, Mapping | list | tuple):
            yield from dictionaries(value, (*path, str(key)), seen)


def unnamed_averages(content: Mapping[Any, Any]) -> Iterator[tuple[str, list[Tensor]]]:
    """The place of every average that is a list of tensors, its keys joined by "/", and the list.

    A dictionary with the keys 0, 1, 2, ... is a list too.
    """
    for path, dictionary in dictionaries(content):
        for key, value in dictionary.items():
            names = (*path, str(key))
            tensors = _as_list(value)
            if tensors is None or not is_average(names):
                continue
            if not KEPT_ASIDE.intersection(words(str(key))):
                yield "/".join(names), tensors


def _as_list(value: Any) -> list[Tensor] | None:
    if isinstance(value, Mapping):
        value = list(value.values()) if list(value) == list(range(len(value))) else None
    if not isinstance(value, list | tuple) or not value:
        return None
    return list(value) if all(isinstance(item, Tensor) for item in value) else None


def with_names(tensors: Sequence[Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names of parameters, in order.

    Raises:
        ValueError: their number or their shapes are not those of the parameters.
    """
    if len(tensors) != len(parameters):
        raise ValueError(
            f"it has {counted(len(tensors), 'tensor')} for {counted(len(parameters), 'parameter')}"
        )
    for index, (tensor, (name, own)) in enumerate(zip(tensors, parameters.items(), strict=True)):
        if tensor.shape != own.shape:
            raise ValueError(
                f"its tensor {index} is {tuple(tensor.shape)}, and {name} is {tuple(own.shape)}"
            )
    plain = (t.detach() if isinstance(t, nn.Parameter) else t for t in tensors)
    return dict(zip(parameters, plain, strict=True))
