"""What 8-bit K and V change in a model: measured on the model itself, against its exact K and V.

Axes: B images, L tokens of all scales, V codebook entries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from variant.engine.engine import Engine
from variant.models.config import VARConfig
from variant_kernels.dispatch.request import dtype_name

# Few images say enough: each is hundreds of positions.
IMAGES = 4
GREEDY_CFG = 4.0
TOP_P = 0.96
STEPS_PER_DEPTH = 4


@dataclass(frozen=True)
class KVError:
    """8-bit K/V against exact ones at one depth.

    logits_std: standard deviation of the exact logits; largest, rms: of the difference, over it.
    top_changed: share of positions whose likeliest token is another.  The tokens fed are those that
    the exact model drew.
    greedy_changed: share of tokens that differ when each model takes its own likeliest (guidance
    ``GREEDY_CFG``); greedy_images: images in which any does; first_scale: the first scale (0-based)
    at which one does, None where all agree.
    """

    depth: int
    dtype: str
    images: int
    logits_std: float
    largest: float
    rms: float
    top_changed: float
    greedy_changed: float
    greedy_images: int
    first_scale: int | None


def depths_of(config: VARConfig) -> tuple[int, ...]:
    """Full depth and the subnets that it was trained with; others would say nothing."""
    return (config.depth, *sorted(config.subnets, reverse=True))


def greedy_change(
    engine: Engine, labels_B: Tensor, *, depth: int, bridge: int | None = None
) -> tuple[float, int, int | None]:
    """Share of tokens, images and first scale that differ between exact and 8-bit greedy images."""
    found_BL: list[Tensor] = []
    for kv_dtype in (None, "fp8"):
        made = engine.generate(
            labels_B,
            depth=depth,
            bridge=bridge,
            cfg=GREEDY_CFG,
            top_k=1,
            # Products round differently by batch: free memory must not decide the figures.
            max_batch=len(labels_B),
            decode=False,
            kv_dtype=kv_dtype,
        )
        found_BL.append(made.tokens)
    differs_BL = found_BL[0] != found_BL[1]
    layout = engine.var.layout
    scales = [k for k in range(layout.num_scales) if bool(differs_BL[:, layout.slice(k)].any())]
    return (
        float(differs_BL.double().mean()),
        int(differs_BL.any(1).sum()),
        scales[0] if scales else None,
    )


def measure_kv_error(
    engine: Engine,
    *,
    images: int = IMAGES,
    depths: tuple[int, ...] | None = None,
    bridge: int | None = None,
    tick: Callable[[str], None] = lambda done: None,
) -> list[KVError]:
    """The change at every depth of a model.

    Args:
        engine: with exact K/V of its own.
        images: of the first so many classes.
        depths: None is full depth and every subnet of the config.
        bridge: as in ``generate``.
        tick: called after each of ``STEPS_PER_DEPTH`` steps per depth.
    Raises:
        ValueError: the engine's own K/V are 8 bits, or images below 1.
    """
    if engine.kv_dtype is not None:
        raise ValueError("measure_kv_error: the engine must keep exact K/V (kv_dtype=None)")
    if images < 1:
        raise ValueError(f"measure_kv_error: images must be at least 1; got {images}")
    config = engine.var.config
    labels_B = torch.arange(images) % config.num_classes
    found = []
    for depth in depths_of(config) if depths is None else depths:
        tokens_BL = engine.generate(
            labels_B,
            depth=depth,
            bridge=bridge,
            seed=0,
            top_p=TOP_P,
            max_batch=images,
            decode=False,
        ).tokens
        tick(f"depth {depth}: tokens")
        exact_BLV = engine.forced_logits(labels_B, tokens_BL, depth=depth, bridge=bridge)
        tick(f"depth {depth}: exact logits")
        apart_BLV = engine.forced_logits(
            labels_B, tokens_BL, depth=depth, bridge=bridge, kv_dtype="fp8"
        )
        tick(f"depth {depth}: 8-bit logits")
        top_changed = (exact_BLV.argmax(-1) != apart_BLV.argmax(-1)).double().mean()
        apart_BLV -= exact_BLV
        std = float(exact_BLV.double().std())
        share, changed, first = greedy_change(engine, labels_B, depth=depth, bridge=bridge)
        tick(f"depth {depth}: greedy tokens")
        found.append(
            KVError(
                depth=depth,
                dtype=dtype_name(engine.dtype),
                images=images,
                logits_std=std,
                largest=float(apart_BLV.abs().max()) / std,
                rms=float(apart_BLV.double().square().mean().sqrt()) / std,
                top_changed=float(top_changed),
                greedy_changed=share,
                greedy_images=changed,
                first_scale=first,
            )
        )
    return found
