"""The error of 8-bit K and V: logits and tokens of a model, compared with those of exact K and V.

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

# Few images suffice: each has hundreds of positions.
IMAGES = 4
GREEDY_CFG = 4.0
TOP_P = 0.96
STEPS_PER_DEPTH = 4


@dataclass(frozen=True)
class KVError:
    """Differences between a model with 8-bit K/V and one with exact K/V at one depth.

    dtype: of the engine.  images: number of images that were generated.
    logits_std: standard deviation of the exact logits. Both models get the tokens that the exact
        model sampled (teacher forcing).
    largest, rms: largest and root-mean-square difference of the logits, divided by logits_std.
    top_changed: share of positions whose likeliest token differs.
    greedy_changed: share of tokens that differ in greedy generation with guidance ``GREEDY_CFG``.
    greedy_images: number of images with a different token.
    first_scale: the first scale (from 0) with a different token; None if no token differs.
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


def trained_depths(config: VARConfig) -> tuple[int, ...]:
    """The depths that a model was trained at: full depth, then its subnets, deepest first."""
    return (config.depth, *sorted(config.subnets, reverse=True))


def greedy_change(
    engine: Engine, labels_B: Tensor, *, depth: int, bridge: int | None = None
) -> tuple[float, int, int | None]:
    """Compare greedy generation with exact and with 8-bit K/V.

    Returns:
        share of tokens that differ, number of images with a different token, first scale with one
        (None if no token differs).
    """
    tokens_of_both: list[Tensor] = []
    for kv_dtype in (None, "fp8"):
        result = engine.generate(
            labels_B,
            depth=depth,
            bridge=bridge,
            cfg=GREEDY_CFG,
            top_k=1,
            seed=0,  # draws among equally likely tokens, which 16-bit logits often have
            # One batch, because the rounding of products depends on its size; without this the free
            # memory would decide the size.
            max_batch=len(labels_B),
            decode=False,
            kv_dtype=kv_dtype,
        )
        tokens_of_both.append(result.tokens)
    differs_BL = tokens_of_both[0] != tokens_of_both[1]
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
    on_step: Callable[[str], None] = lambda step: None,
) -> list[KVError]:
    """Measure the error at every depth of a model.

    Args:
        engine: whose default is exact K/V.
        images: number of images to generate, one of each class, beginning with class 0.
        depths: None is full depth and every subnet of the config.
        bridge: as in ``generate``.
        on_step: called with a description after each of the ``STEPS_PER_DEPTH`` steps per depth.
    Raises:
        ValueError: the default of the engine is 8-bit K/V, or images is below 1.
    """
    if engine.kv_dtype is not None:
        raise ValueError("measure_kv_error: the engine must keep exact K/V (kv_dtype=None)")
    if images < 1:
        raise ValueError(f"measure_kv_error: images must be at least 1; got {images}")
    config = engine.var.config
    labels_B = torch.arange(images, device="cpu") % config.num_classes
    errors = []
    for depth in trained_depths(config) if depths is None else depths:
        tokens_BL = engine.generate(
            labels_B,
            depth=depth,
            bridge=bridge,
            seed=0,
            top_p=TOP_P,
            max_batch=images,
            decode=False,
        ).tokens
        on_step(f"depth {depth}: tokens")
        exact_BLV = engine.forced_logits(labels_B, tokens_BL, depth=depth, bridge=bridge)
        on_step(f"depth {depth}: exact logits")
        changed_BLV = engine.forced_logits(
            labels_B, tokens_BL, depth=depth, bridge=bridge, kv_dtype="fp8"
        )
        on_step(f"depth {depth}: 8-bit logits")
        top_changed = (exact_BLV.argmax(-1) != changed_BLV.argmax(-1)).double().mean()
        difference_BLV = changed_BLV.sub_(exact_BLV)  # in place: logits are large
        std = float(exact_BLV.double().std())
        share, changed, first = greedy_change(engine, labels_B, depth=depth, bridge=bridge)
        on_step(f"depth {depth}: greedy tokens")
        errors.append(
            KVError(
                depth=depth,
                dtype=dtype_name(engine.dtype),
                images=images,
                logits_std=std,
                largest=float(difference_BLV.abs().max()) / std,
                rms=float(difference_BLV.double().square().mean().sqrt()) / std,
                top_changed=float(top_changed),
                greedy_changed=share,
                greedy_images=changed,
                first_scale=first,
            )
        )
    return errors
