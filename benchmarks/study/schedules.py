"""Schedules by the names that they have in the study, and a forward pass of any of them.

A depth schedule of the package never grows again, because a layer without keys and values of
earlier scales cannot run later. To see where a shallow subnet costs most, the study needs such
schedules: a layer that runs at some scales only sees the tokens of these scales.

Axes: B images, L tokens of all scales, C width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.study.settings import SCHEDULE
from variant.engine.generation import Sampling
from variant.errors import UserError
from variant.models.config import VARConfig
from variant.models.token_loss import linear_cross_entropy
from variant.models.var import VAR
from variant.models.vqvae import VQVAE
from variant_kernels import DepthSchedule, ScaleLayout
from variant_kernels.ops.sample_tokens import sample_tokens
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


def depth_and_bridge(layers: Layers) -> tuple[list[int], int]:
    """A schedule that never grows, as the arguments of ``generate``."""
    return list(layers[-1]), sum(own != layers[-1] for own in layers)


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
    schedule = falling_schedule(var.config, layers)
    if schedule is None:
        return masked_losses(var, labels_B, x_teacher, targets_BL, layers)
    return var(labels_B, x_teacher, schedule, targets_BL=targets_BL).losses_BL


def falling_schedule(config: VARConfig, layers: Layers) -> DepthSchedule | None:
    """The package's schedule with these layers; None if they grow again."""
    schedule = DepthSchedule(config.depth, len(layers), *depth_and_bridge(layers))
    return schedule if schedule.layers == layers else None


@torch.no_grad()
def masked_losses(
    var: VAR, labels_B: Tensor, x_teacher: Tensor, targets_BL: Tensor, layers: Layers
) -> Tensor:
    """:func:`token_losses` by a forward pass that gathers the tokens of each layer."""
    cond_BC = var.class_emb(labels_B)
    h_BLC = masked_hidden(var, cond_BC, var.word_embed(x_teacher), layers)
    head = var.head
    return linear_cross_entropy(h_BLC, head.weight, head.bias, targets_BL).losses_BL


def masked_hidden(var: VAR, cond_BC: Tensor, words_BTC: Tensor, layers: Layers) -> Tensor:
    """Hidden states after the norm of the head, of the scales that ``layers`` has.

    Each layer runs on the tokens of its scales alone; the others keep their values.

    Args:
        words_BTC: embedded input of every scale but the first.
    """
    start = cond_BC.unsqueeze(1) + var.pos_start
    stream_BLC = torch.cat((start, words_BTC), dim=1)
    stream_BLC = stream_BLC + var.position_embedding()[:, : stream_BLC.shape[1]]
    cond, layout = var.shared_condition(cond_BC), var.layout
    for layer, block in enumerate(var.layers()):
        scales = [scale for scale, own in enumerate(layers) if layer in own]
        if not scales:
            continue
        parts = [torch.arange(layout.slice(k).start, layout.slice(k).stop) for k in scales]
        index = torch.cat(parts)
        own_layout = ScaleLayout.from_patch_nums([var.config.patch_nums[k] for k in scales])
        out_BTC = block(stream_BLC[:, index], cond, own_layout)
        stream_BLC = stream_BLC.index_copy(1, index, out_BTC)
    return var.head_nm(stream_BLC, cond_BC)


@torch.no_grad()
def masked_tokens(
    var: VAR,
    vae: VQVAE,
    labels_B: Tensor,
    layers: Layers,
    *,
    cfg: float,
    top_p: float,
    seed: int,
    image_ids_B: Tensor,
) -> Tensor:
    """Generated tokens (B, L) of a schedule that may grow again.

    No cache: every scale computes all earlier ones again. Guidance, filters and random numbers are
    those of the engine, so that the tokens of a schedule that falls are the engine's, but for ties
    that rounding decides.

    Args:
        labels_B, cfg, top_p, seed, image_ids_B: as in ``VARiant.generate``.
    """
    images, layout, sampling = len(labels_B), var.layout, Sampling(cfg, top_p=top_p, seed=seed)
    nothing_B = torch.full_like(labels_B, var.config.num_classes)
    cond_RC = var.class_emb(torch.cat((labels_B, nothing_B)))
    words_RTC = cond_RC.new_empty(2 * images, 0, cond_RC.shape[1])
    side = layout.shapes[-1]
    f_hat = torch.zeros(images, var.config.vae_channels, *side)
    tokens = []
    for scale in range(layout.num_scales):
        h_RTC = masked_hidden(var, cond_RC, words_RTC, layers[: scale + 1])
        tokens_BT = sample_tokens(
            var.head(h_RTC[:, layout.slice(scale)]),
            guidance=float(sampling.guidance(scale, layout.num_scales)),
            top_p=top_p,
            seed=seed,
            image_ids=image_ids_B,
            position=layout.offsets[scale],
        )
        tokens.append(tokens_BT)
        f_hat = vae.accumulate(f_hat, tokens_BT, scale)
        if scale + 1 < layout.num_scales:
            words_BTC = var.word_embed(vae.next_scale_input(f_hat, scale))
            words_RTC = torch.cat((words_RTC, words_BTC.repeat(2, 1, 1)), dim=1)
    return torch.cat(tokens, dim=1)
