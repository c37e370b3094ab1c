"""AdamW: its settings, its parameter groups, the learning rate of a step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import ConfigDict
from torch import Tensor, nn

from variant.models.config import STRICT, require, require_plain_numbers
from variant.models.ranges import Count, CountOrZero, NotNegative, Positive, Share, ShareBelowOne
from variant.training.parallel import unsharded


@dataclass(frozen=True)
class OptimSection:
    """Settings of AdamW. Biases, norms, embeddings and scale_mul have no weight decay.

    batch_size: images per optimiser step, of all processes together; at most the number of
        training images.
    learning_rate: highest learning rate.
    betas: AdamW's decay rates of the first and the second moment.
    weight_decay: AdamW's weight decay.
    clip: largest norm of the gradient of all parameters.
    precision: of matrix products: "fp32", "bf16" (autocast), or "fp16" (autocast with loss scaling,
        GPUs only).
    accumulate: number of parts that a batch is split into; their gradients are accumulated.
    schedule: "constant", or "cosine" from learning_rate to final_ratio times it.
    final_ratio: last learning rate over the highest, for "cosine".
    warmup: share of all steps in which the rate rises linearly from 0.
    steps_per_epoch: optimiser steps of an epoch, which visit the first images of its order; at most
        those of a pass over the data, which 0 is.
    """

    batch_size: Count
    learning_rate: Positive
    betas: tuple[ShareBelowOne, ShareBelowOne] = (0.9, 0.95)
    weight_decay: NotNegative = 0.05
    clip: Positive = 1.0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    accumulate: Count = 1
    schedule: Literal["constant", "cosine"] = "constant"
    final_ratio: Share = 0.0
    warmup: ShareBelowOne = 0.0
    steps_per_epoch: CountOrZero = 0

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    def __post_init__(self) -> None:
        require_plain_numbers(self)
        require(
            self.batch_size % self.accumulate == 0,
            f"accumulate must divide batch_size ({self.batch_size})",
            self.accumulate,
        )

    def problems(self, num_train: int) -> Iterator[str]:
        """What stops a run with so many training images; each text begins with its key."""
        if self.batch_size > num_train:
            yield (
                f"batch_size must be at most the number of training images ({num_train}); got "
                f"{self.batch_size}"
            )
            return
        a_pass = num_train // self.batch_size
        if self.steps_per_epoch > a_pass:
            yield (
                f"steps_per_epoch must be at most {a_pass}, those of a pass over the {num_train} "
                f"training images; got {self.steps_per_epoch}"
            )


PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Around the forward passes of a precision; "fp32" turns autocast off."""
    dtype = PRECISIONS[precision]
    is_full = dtype is torch.float32
    return torch.autocast(
        device.type, dtype=torch.bfloat16 if is_full else dtype, enabled=not is_full
    )


# Parameters with two or more axes that have no weight decay: embeddings and gains.
UNDECAYED = ("pos_start", "pos_1LC", "ada_gss", "scale_mul")


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's parameter groups: no decay for biases, norms, embeddings and gains.

    Frozen parameters are in none.
    """
    embeddings = {
        id(parameter)
        for part in module.modules()
        if isinstance(part, nn.Embedding)
        for parameter in part.parameters()
    }
    decayed, not_decayed = [], []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
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


def gradient_norm(module: nn.Module) -> Tensor:
    """L2 norm of all gradients of a module, a scalar on their device."""
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    return nn.utils.get_total_norm(grads)


def clipped_step(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, norm: Tensor, clip: float
) -> None:
    """A step with gradients scaled so that their norm is at most ``clip``.

    Without loss scaling the fused AdamW divides them as it reads them, so that no pass over all
    gradients is needed; nothing waits for the device. A norm that is not finite skips the step.

    Args:
        optimizer: a fused one.  scaler: of the loss; its gradients are unscaled already.
        norm: of all gradients, also a sharded tensor.
    """
    norm = unsharded(norm)
    for group in optimizer.param_groups:
        group["fused"] = True  # the state of a run that began on an older version has another value
    if scaler.is_enabled():  # its step gives the optimiser a divisor of its own
        # It has looked for gradients that are not finite; their norm may be so all the same.
        for found in scaler._found_inf_per_device(optimizer).values():
            found.masked_fill_(norm.to(found.device).isfinite().logical_not(), 1.0)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grads_with_norm_(parameters, clip, norm)
        scaler.step(optimizer)
        return
    fused: Any = optimizer
    # As torch's clip_grad_norm_: gradients below the limit stay as they are.
    fused.grad_scale = ((norm + 1e-6) / clip).clamp_min(1)
    fused.found_inf = norm.isfinite().logical_not().to(fused.grad_scale.dtype)
    try:
        optimizer.step()
    finally:
        del fused.grad_scale, fused.found_inf


def learning_rate(optim: OptimSection, step: int, total_steps: int) -> float:
    """The rate of a step: linear warm-up, then constant or half a cosine to the final ratio."""
    warm_steps = optim.warmup * total_steps
    rate = optim.learning_rate * min(1.0, (step + 1) / max(warm_steps, 1.0))
    if optim.schedule == "cosine":
        cosine = 0.5 * (1 + math.cos(math.pi * step / total_steps))
        rate *= optim.final_ratio + (1 - optim.final_ratio) * cosine
    return rate
