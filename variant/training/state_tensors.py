"""The tensors of a run's state by name, as a checkpoint folder holds them.

``module.NAME`` is a weight or buffer, ``ema.NAME`` the moving average of a parameter,
``optimizer.MOMENT.NAME`` a moment of AdamW. The names of a second module begin with ``adversary.``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from variant.errors import UserError
from variant.training.checkpoint_folder import read_into, stored_tensors
from variant.training.run_state import RunState

MODULE, EMA, OPTIMIZER, ADVERSARY = "module.", "ema.", "optimizer.", "adversary."


def named_tensors(state: RunState) -> dict[str, Tensor]:
    """Every tensor of the state, not copied."""
    tensors = _trained(state.module, state.optimizer)
    if state.ema is not None:
        tensors |= {EMA + name: value for name, value in state.ema.averages.items()}
    if state.adversary is not None:
        second = _trained(state.adversary.module, state.adversary.optimizer)
        tensors |= {ADVERSARY + name: value for name, value in second.items()}
    return tensors


def _trained(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """A module's weights, buffers and moments."""
    tensors = {MODULE + name: value for name, value in module.state_dict().items()}
    for name, parameter in module.named_parameters():
        for moment, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{OPTIMIZER}{moment}.{name}"] = value
    return tensors


def part_of(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, without it."""
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def read_state(folder: Path, state: RunState) -> None:
    """Read all tensors of the state, each process its own parts.

    Raises:
        UserError: the folder is damaged, or of another model.
    """
    stored = stored_tensors(folder)
    _make_moments(state.module, state.optimizer, stored)
    if state.adversary is not None:
        second = part_of(stored, ADVERSARY)
        _make_moments(state.adversary.module, state.adversary.optimizer, second)
    tensors = named_tensors(state)
    unknown = sorted(stored.keys() - tensors.keys())
    if unknown and not (state.ema is None and all(name.startswith(EMA) for name in unknown)):
        raise UserError(
            f"{folder}: does not hold the state of this {type(state.module).__name__}: unexpected "
            f"{', '.join(unknown)[:300]}"
        )
    read_into(folder, tensors)


def _make_moments(
    module: nn.Module, optimizer: torch.optim.Optimizer, stored: Mapping[str, Tensor]
) -> None:
    """Give the optimiser the moments that the folder has; AdamW makes them in its first step."""
    group_of: dict[Tensor, dict[str, Any]] = {
        parameter: group for group in optimizer.param_groups for parameter in group["params"]
    }
    for name, parameter in module.named_parameters():
        if f"{OPTIMIZER}exp_avg.{name}" not in stored or parameter not in group_of:
            continue
        group = group_of[parameter]
        on_device = group.get("fused") or group.get("capturable")
        device = parameter.device if on_device else torch.device("cpu")
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=device),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }
