"""The checks of the arguments of ``VAR.forward``.

Axes: as in var.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from variant.models.config import VARConfig
from variant.models.execution import Execution
from variant_kernels import DepthSchedule
from variant_kernels.arguments import instance
from variant_kernels.linear import has_values
from variant_kernels.ops.contract import check_tensor
from variant_kernels.wording import counted

OP = "VAR.forward"


def check_forward(
    config: VARConfig,
    device: torch.device,
    *,
    labels_B: Tensor,
    x_teacher: Tensor,
    schedule: DepthSchedule | None,
    targets_BL: Tensor | None,
    execution: Execution,
    mixed_labels_B: Tensor | None,
    mix_B: Tensor | None,
    dropped_B: Tensor | None,
    branch_scales_N2B: Tensor | None,
) -> None:
    """Check everything that a caller gives; see :meth:`variant.models.var.VAR.forward`.

    Args:
        device: of the weights.
    Raises:
        TypeError, ValueError: naming the argument, what it must be and what came.
    """
    _check_inputs(config, labels_B, x_teacher, schedule)
    _check_devices(device, labels_B=labels_B, x_teacher=x_teacher)
    if schedule is not None:
        _check_schedule(config, schedule)
    _check_labels(config, "labels_B", labels_B)
    if targets_BL is not None:
        _check_targets(config, targets_BL, labels_B.shape[0])
    instance(OP, "execution", execution, Execution)
    _check_mix(labels_B, mixed_labels_B, mix_B)
    _check_devices(
        device,
        mixed_labels_B=mixed_labels_B,
        mix_B=mix_B,
        dropped_B=dropped_B,
        branch_scales_N2B=branch_scales_N2B,
        targets_BL=targets_BL,
    )
    if (mixed_labels_B is None) != (mix_B is None):
        raise ValueError(f"{OP}: mixed_labels_B and mix_B go together; got one of them")
    if mixed_labels_B is not None:
        _check_labels(config, "mixed_labels_B", mixed_labels_B)
    _check_drops(config, labels_B, dropped_B, branch_scales_N2B)


def _check_inputs(
    config: VARConfig, labels_B: Tensor, x_teacher: Tensor, schedule: DepthSchedule | None
) -> None:
    check_tensor(OP, "labels_B", labels_B)
    check_tensor(OP, "x_teacher", x_teacher)
    if schedule is not None:
        instance(OP, "schedule", schedule, DepthSchedule, "var.schedule(depth) makes one")
    if labels_B.ndim != 1 or labels_B.dtype != torch.int64:
        raise ValueError(
            f"{OP}: labels_B must be (B,) int64; got {tuple(labels_B.shape)} {labels_B.dtype}"
        )
    layout, batch = config.layout, labels_B.shape[0]
    expected = (batch, layout.total - layout.tokens[0], config.vae_channels)
    if tuple(x_teacher.shape) != expected:
        raise ValueError(
            f"{OP}: x_teacher must be {expected} for {counted(batch, 'label')}; got "
            f"{tuple(x_teacher.shape)}"
        )


def _check_schedule(config: VARConfig, schedule: DepthSchedule) -> None:
    depth, scales = config.depth, config.layout.num_scales
    if schedule.full_depth != depth or schedule.num_scales != scales:
        raise ValueError(
            f"{OP}: schedule must have {counted(depth, 'layer')} and {counted(scales, 'scale')}; "
            f"got {schedule.full_depth} and {schedule.num_scales}"
        )


def _check_labels(config: VARConfig, name: str, labels_B: Tensor) -> None:
    """Values are checked on the CPU only: elsewhere that would wait for the device.

    A graph (torch.export, torch.compile) and a mode of fake tensors have none to check.
    """
    _check_values(name, labels_B, config.num_classes, f"[0, {config.num_classes}]")


def _check_values(name: str, given: Tensor, largest: int, expected: str, remedy: str = "") -> None:
    if has_values(given):
        low, high = (int(x) for x in torch.aminmax(given))
        if low < 0 or high > largest:
            came = low if low < 0 else high
            raise ValueError(f"{OP}: {name} must be in {expected}; got {came}{remedy}")


def _check_devices(device: torch.device, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        check_tensor(OP, name, tensor)
        if tensor.device != device:
            raise ValueError(
                f"{OP}: {name} must be on the device of the weights ({device}); got {tensor.device}"
            )


def _check_targets(config: VARConfig, targets_BL: Tensor, batch: int) -> None:
    shape = batch, config.layout.total
    check_tensor(OP, "targets_BL", targets_BL)
    if targets_BL.dtype != torch.int64 or tuple(targets_BL.shape) != shape:
        raise ValueError(
            f"{OP}: targets_BL must be {shape} int64; got {tuple(targets_BL.shape)} "
            f"{targets_BL.dtype}"
        )
    remedy = ". To leave tokens out of a mean, average losses_BL of the others"
    vocab = config.vocab_size
    _check_values("targets_BL", targets_BL, vocab - 1, f"[0, {vocab})", remedy)


def _check_mix(labels_B: Tensor, mixed_labels_B: Tensor | None, mix_B: Tensor | None) -> None:
    for name, given_B in (("mixed_labels_B", mixed_labels_B), ("mix_B", mix_B)):
        if given_B is None:
            continue
        check_tensor(OP, name, given_B)
        if name == "mixed_labels_B" and given_B.dtype != torch.int64:
            raise TypeError(f"{OP}: {name} must be int64; got {given_B.dtype}")
        if given_B.shape != labels_B.shape:
            raise ValueError(
                f"{OP}: {name} must be {tuple(labels_B.shape)}, as the labels; "
                f"got {tuple(given_B.shape)}"
            )


def _check_drops(
    config: VARConfig,
    labels_B: Tensor,
    dropped_B: Tensor | None,
    branch_scales_N2B: Tensor | None,
) -> None:
    shape = tuple(labels_B.shape)
    if dropped_B is not None and (dropped_B.dtype != torch.bool or tuple(dropped_B.shape) != shape):
        raise ValueError(
            f"{OP}: dropped_B must be {shape} bool; got {tuple(dropped_B.shape)} {dropped_B.dtype}"
        )
    shape = (config.depth, 2, labels_B.shape[0])
    if branch_scales_N2B is not None and (
        tuple(branch_scales_N2B.shape) != shape or not branch_scales_N2B.is_floating_point()
    ):
        raise ValueError(
            f"{OP}: branch_scales_N2B must be {shape} of a float dtype; got "
            f"{tuple(branch_scales_N2B.shape)} {branch_scales_N2B.dtype}"
        )
