"""AdamW: its settings, its parameter groups, the learning rate of a step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict
from torch import nn

from variant.models.config import STRICT, require, require_plain_numbers


@dataclass(frozen=True)
class OptimSection:
    """Settings of AdamW. Biases, norms, embeddings and scale_mul have no weight decay.

    batch_size: images per optimiser step.
    accumulate: number of parts that a batch is split into; their gradients are accumulated.
    clip: largest norm of the gradient of all parameters.
    schedule: "constant", or "cosine" from learning_rate to final_ratio times it.
    warmup: share of all steps in which the rate rises linearly from 0.
    """

    batch_size: int
    learning_rate: float
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05
    clip: float = 1.0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    accumulate: int = 1
    schedule: Literal["constant", "cosine"] = "constant"
    final_ratio: float = 0.0
    warmup: float = 0.0

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    def __post_init__(self) -> None:
        require_plain_numbers(self)
        require(self.batch_size >= 1, "batch_size must be at least 1", self.batch_size)
        require(self.learning_rate > 0, "learning_rate must be positive", self.learning_rate)
        require(all(0 <= beta < 1 for beta in self.betas), "betas must be in [0, 1)", self.betas)
        require(self.weight_decay >= 0, "weight_decay must be >= 0", self.weight_decay)
        require(self.clip > 0, "clip must be positive", self.clip)
        require(
            self.accumulate >= 1 and self.batch_size % self.accumulate == 0,
            f"accumulate must divide batch_size ({self.batch_size})",
            self.accumulate,
        )
        require(0 <= self.final_ratio <= 1, "final_ratio must be in [0, 1]", self.final_ratio)
        require(0 <= self.warmup < 1, "warmup must be in [0, 1)", self.warmup)


# Parameters with two or more axes that have no weight decay: embeddings and gains.
UNDECAYED = ("pos_start", "pos_1LC", "ada_gss", "scale_mul")


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's parameter groups: no decay for biases, norms, embeddings and gains."""
    embeddings = {
        id(parameter)
        for part in module.modules()
        if isinstance(part, nn.Embedding)
        for parameter in part.parameters()
    }
    decayed, not_decayed = [], []
    for name, parameter in module.named_parameters():
        is_decayed = not (
            parameter.ndim < 2
            or id(parameter) in embeddings
            or any(part in name for part in UNDECAYED)
        )
        (decayed if is_decayed else not_decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": not_decayed, "weight_decay": 0.0},
    ]


def learning_rate(optim: OptimSection, step: int, total_steps: int) -> float:
    """The rate of a step: linear warm-up, then constant or half a cosine to the final ratio."""
    warm_steps = optim.warmup * total_steps
    rate = optim.learning_rate * min(1.0, (step + 1) / max(warm_steps, 1.0))
    if optim.schedule == "cosine":
        cosine = 0.5 * (1 + math.cos(math.pi * step / total_steps))
        rate *= optim.final_ratio + (1 - optim.final_ratio) * cosine
    return rate
