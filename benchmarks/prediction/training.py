"""One optimiser step, ours and the original's with its dense mask: products, attention, memory.

Bytes are counted for one entry of the stream (float32) in one layer, under bfloat16 autocast.
"""

from __future__ import annotations

from benchmarks.prediction.attention import block_causal_seconds
from benchmarks.prediction.constants import Constants
from benchmarks.prediction.generation import MODEL, gemm_seconds
from variant.engine.planning import schedule_of
from variant.models.flops import linears
from variant.models.parameter_count import var_parameters
from variant.models.presets import PAPER_BRIDGE, VAR_PRESETS

# Forward: two residual sums with gate, norm and modulation 12 each; GELU (4 widths) 16.
# Backward: these two kernels 18 each; GELU once more 16 and its gradient 24; gradients of the
# biases of fc2, fc1, proj and qkv 2 + 8 + 2 + 6; the sum over out x its gradient 4.
OURS = (2 * 12 + 16) + (2 * 18 + 16 + 24 + 18 + 4)
# Forward: norm, scale, shift, cast 30 twice; norms of q and k 52; the heads' copy 4; gates 4 and
# additions 10 twice; GELU 16. Backward: sums of gradients 12 twice; the gate's gradients 18 twice;
# those of cast, scale, shift and norm 46 twice; GELU's 24; biases 18; q and k 90; out 4.
ORIGINAL = (2 * 30 + 52 + 4 + 2 * 14 + 16) + (2 * 12 + 2 * 18 + 2 * 46 + 24 + 18 + 90 + 4)
# For each parameter: AdamW 28 (weight, gradient and two moments read, three written), the norm of
# the gradients 4, weights to 16 bits 6 and gradients back 6. The original clips in a pass of its
# own, 8.
PARAMETER, CLIP = 28 + 4 + 6 + 6, 8
# SDPA with a mask runs the memory-efficient kernel (mma.sync) over all pairs: about 200 TFLOP/s
# forward and 140 backward on an H100, an estimate from its class.
DENSE_FLOPS = {"forward": 200e12, "backward": 140e12}
# Loss, embeddings and gaps between kernels.
REST_SECONDS = 3e-3


def _products(c: Constants, batch: int, depth: int) -> float:
    config = VAR_PRESETS[MODEL]
    schedule = schedule_of(config, depth, PAPER_BRIDGE)
    # All scales of a layer are one product: rows of its active scales together.
    rows: dict[tuple[int, str, int, int], int] = {}
    for x in linears(config, schedule, batch, guidance=False):
        key = (x.layer, x.name, x.inputs, x.outputs)
        per_scale = (x.layer >= 0 and x.name != "ada_lin") or x.name in ("head", "word_embed")
        rows[key] = rows.get(key, 0) + x.rows if per_scale else x.rows
    return sum(
        gemm_seconds(c, count, inputs, outputs)
        + gemm_seconds(c, count, outputs, inputs)
        + gemm_seconds(c, outputs, count, inputs)
        for (_, _, inputs, outputs), count in rows.items()
    )


def training_seconds(c: Constants, batch: int, depth: int) -> float:
    """Seconds of our step; layers that a scale skips do no work for its tokens."""
    config = VAR_PRESETS[MODEL]
    layout, schedule = config.layout, schedule_of(config, depth, PAPER_BRIDGE)
    heads = batch * config.num_heads
    attention, tokens = 0.0, 0
    for layer in range(config.depth):
        last = schedule.last_scale(layer)
        if last < 0:
            continue
        lengths = tuple(layout.tokens[: last + 1])
        tokens += sum(lengths)
        attention += sum(
            block_causal_seconds(c, kind, lengths, config.head_dim, heads, qk_norm=True)
            for kind in ("forward", "dq", "dkv")
        )
    moved = OURS * batch * tokens * config.embed_dim + PARAMETER * var_parameters(config)
    memory = moved / (c.row_share * c.copy_bytes)
    products = _products(c, batch, depth)
    return (products + attention + memory + REST_SECONDS) / c.training_share


def original_training_seconds(c: Constants, batch: int) -> float:
    """Seconds of the original's step: all layers, a dense mask, one call for each operation."""
    config = VAR_PRESETS[MODEL]
    entries = batch * config.layout.total * config.embed_dim * config.depth
    pairs = config.layout.total**2
    one = 2 * 2 * pairs * config.embed_dim * batch * config.depth
    attention = one / DENSE_FLOPS["forward"] + 2.5 * one / DENSE_FLOPS["backward"]
    moved = ORIGINAL * entries + (PARAMETER + CLIP) * var_parameters(config)
    memory = moved / (c.row_share * c.copy_bytes)
    products = _products(c, batch, config.depth)
    return (products + attention + memory + REST_SECONDS) / c.original_training_share
