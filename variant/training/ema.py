"""An exponential moving average (EMA) of the weights that a run trains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import ConfigDict
from torch import Tensor, nn

from variant.models.config import STRICT, require_plain_numbers
from variant.models.ranges import ShareBelowOne
from variant.training.parallel import local_part, sharded_like


@dataclass(frozen=True)
class EMASection:
    """An exponential moving average (EMA) of the transformer's weights.

    decay: after every step the average is decay * average + (1 - decay) * weights; 0 keeps none.
    """

    decay: ShareBelowOne = 0.0

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    def __post_init__(self) -> None:
        require_plain_numbers(self)


class EMA:
    """The average of every parameter of a module that has a gradient; it starts at their values.

    Parameters that FSDP2 has sharded are averaged shard by shard, without communication. Buffers
    are not averaged.

    Args:
        decay: in [0, 1).
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._module, self.decay = module, decay
        self._parameters = {
            name: parameter
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }
        self.averages = {name: value.detach().clone() for name, value in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the present weights; to be called once a step."""
        averages = [_part(average) for average in self.averages.values()]
        weights = [_part(parameter) for parameter in self._parameters.values()]
        lerp = torch._foreach_lerp_  # pyright: ignore[reportPrivateImportUsage]
        lerp(averages, weights, 1 - self.decay)

    @torch.no_grad()
    def take_rows(self, rows: Mapping[str, Tensor]) -> None:
        """Set rows of the averages to those of the weights, which have just been replaced.

        Args:
            rows: bool (rows,) by the name of a parameter that is not sharded.
        """
        for name, rows_N in rows.items():
            if name in self.averages:  # no frozen parameter
                self.averages[name][rows_N] = self._parameters[name].detach()[rows_N]

    @contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """The module has the averages as its weights within the block."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        # Values are exchanged, not tensors: FSDP2 and the optimiser hold the tensors.
        for name, parameter in self._parameters.items():
            weight, average = _part(parameter), _part(self.averages[name])
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)
        for part in self._module.modules():
            # FSDP2 may still hold whole weights from before, for the next forward pass.
            reshard = getattr(part, "reshard", None)
            if callable(reshard):
                reshard()

    def load(self, averages: Mapping[str, Tensor]) -> None:
        """Take these averages.

        Raises:
            ValueError: they are not of the module's parameters, or not finite.
        """
        if averages.keys() != self.averages.keys():
            missing = sorted(self.averages.keys() ^ averages.keys())
            raise ValueError(f"ema: does not fit the module's parameters: {missing[0]}")
        for name, average in self.averages.items():
            value = averages[name]
            if value.shape != average.shape or not value.is_floating_point():
                raise ValueError(f"ema: {name} is {tuple(value.shape)} {value.dtype}")
            if not torch.isfinite(_part(value)).all():
                raise ValueError(f"ema: {name} is not finite")
        for name, average in self.averages.items():
            average.copy_(sharded_like(averages[name], average))


def _part(value: Tensor) -> Tensor:
    """This process's part of a tensor."""
    return local_part(value.detach())
