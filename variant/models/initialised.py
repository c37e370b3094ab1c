"""New layers with the weights that torch gives them.

Other code may have switched that off for the whole process: the original VAR code and its demos
replace ``reset_parameters`` of nn.Conv2d, nn.Linear, nn.BatchNorm2d and others by nothing; a new
layer then has whatever the memory held.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

Layer = TypeVar("Layer", bound=nn.Module)


def _reset_linear(layer: nn.Linear) -> None:
    """As nn.Linear.reset_parameters, of which the replacement leaves no other copy."""
    nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5))
    if layer.bias is not None:
        bound = 1 / math.sqrt(layer.in_features)
        nn.init.uniform_(layer.bias, -bound, bound)


# The classes of other sizes share these methods, which the replacement does not reach.
_RESETS: dict[type[nn.Module], Callable[[Any], None]] = {
    nn.Conv2d: _ConvNd.reset_parameters,
    nn.BatchNorm2d: _BatchNorm.reset_parameters,
    nn.Linear: _reset_linear,
}


def initialised(layer: Layer) -> Layer:
    """The new layer; where torch's initialisation was replaced, with that of torch."""
    for kind, reset in _RESETS.items():
        if isinstance(layer, kind):
            given = getattr(type(layer), "reset_parameters", None)
            if not str(getattr(given, "__module__", "")).startswith("torch."):
                reset(layer)
    return layer


def conv2d(*args: Any, **options: Any) -> nn.Conv2d:
    """``nn.Conv2d``, :func:`initialised`."""
    return initialised(nn.Conv2d(*args, **options))
