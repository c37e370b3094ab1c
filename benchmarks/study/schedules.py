"""Schedules by the names that they have in the study, and a forward pass of any of them.

A depth schedule of the package never grows again, because a layer without keys and values of
earlier scales cannot run later. To see where a shallow subnet costs most, the study needs such
schedules: a layer that runs at some scales only sees the tokens of these scales.

Axes: B images, L tokens of all scales, C width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.study.settings import SCHEDULE
from variant.errors import UserError
from variant.models.config import VARConfig
from variant.models.token_loss import linear_cross_entropy
from variant.models.var import VAR
from variant_kernels import DepthSchedule, ScaleLayout
from variant_kernels.plans.depth_schedule import select_layers

Layers = tuple[tuple[int, ...], ...]  # of each scale


def layers_of(config: VARConfig, name: str, bridge: int) -> Layers:
    """The layers of each scale of a schedule.

    Args:
        name: "full"; "d2", depth 2 behind the bridge; "d2@b5", behind another one; "d2@early",
            depth 2 at the first third of the scales and every layer at the others.
        bridge: of names that give none.
    Raises:
        UserError: there is no such schedule.
    """
    match, scales = SCHEDULE.fullmatch(name), len(config.patch_nums)
    if match is None:
        raise UserError(f"study: there is no schedule {name}")
    every = tuple(range(config.depth))
    if match["depth"] is None:
        return (every,) * scales
    depth = int(match["depth"])
    shallow = config.subnets.get(depth) or select_layers(config.depth, depth)
    third = scales // 3
    if match["zone"] is None:
        first = int(match["bridge"]) if match["bridge"] else bridge
        places = range(first, scales)
    else:
        places = {
            "early": range(third),
            "middle": range(third, 2 * third),
            "late": range(2 * third, scales),
            "all": range(scales),
        }[match["zone"]]
    return tuple(shallow if scale in places else every for scale in range(scales))


def depth_and_bridge(name: str, bridge: int) -> tuple[int | None, int | None]:
    """A schedule that never grows, as the arguments of ``generate``.  Raises: UserError."""
    match = SCHEDULE.fullmatch(name)
    if match is None or match["zone"]:
        raise UserError(f"study: {name} cannot generate: it grows again")
    if match["depth"] is None:
        return None, None
    return int(match["depth"]), int(match["bridge"]) if match["bridge"] else bridge


def layer_tokens(config: VARConfig, layers: Layers) -> int:
    """Tokens of an image times the layers that each of them runs through."""
    return sum(len(own) * count for own, count in zip(layers, config.layout.tokens, strict=True))


@torch.no_grad()
def token_losses(
    var: VAR, labels_B: Tensor, x_teacher: Tensor, targets_BL: Tensor, layers: Layers
) -> Tensor:
    """The cross-entropy of each token, (B, L), under any schedule.

    Args:
        labels_B, x_teacher, targets_BL: as in :meth:`VAR.forward`.
    """
    full = tuple(range(var.config.depth))
    falls = all(set(layers[k + 1]) <= set(layers[k]) for k in range(len(layers) - 1))
    if falls:
        shallow = layers[-1]
        bridge = sum(own == full for own in layers) if shallow != full else len(layers)
        schedule = DepthSchedule(var.config.depth, len(layers), shallow, bridge)
        if schedule.layers == layers:
            return var(labels_B, x_teacher, schedule, targets_BL=targets_BL).losses_BL
    cond_BC = var.class_emb(labels_B)
    start = cond_BC.unsqueeze(1) + var.pos_start
    stream_BLC = torch.cat((start, var.word_embed(x_teacher)), dim=1) + var.position_embedding()
    stream_BLC = masked_layers(var, stream_BLC, var.shared_condition(cond_BC), layers)
    h_BLC = var.head_nm(stream_BLC, cond_BC)
    head = var.head
    return linear_cross_entropy(h_BLC, head.weight, head.bias, targets_BL).losses_BL


def masked_layers(
    var: VAR, stream_BLC: Tensor, cond: Tensor, layers: Sequence[Sequence[int]]
) -> Tensor:
    """All layers, each on the tokens of the scales at which it runs; others keep their values.

    The stream may end after any scale: then ``layers`` has the scales that it holds.
    """
    layout = var.layout
    for layer, block in enumerate(var.layers()):
        scales = [scale for scale, own in enumerate(layers) if layer in own]
        if not scales:
            continue
        parts = [torch.arange(layout.slice(k).start, layout.slice(k).stop) for k in scales]
        index = torch.cat(parts)
        own_layout = ScaleLayout.from_patch_nums([var.config.patch_nums[k] for k in scales])
        out_BTC = block(stream_BLC[:, index], cond, own_layout)
        stream_BLC = stream_BLC.index_copy(1, index, out_BTC)
    return stream_BLC
