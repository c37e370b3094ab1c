"""Whole generations: products with weights, attention, and kernels that are bound by memory."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import cache

from benchmarks.prediction.attention import PROCESSORS, paged_seconds
from benchmarks.prediction.constants import Constants
from benchmarks.prediction.sampling import sampling_seconds
from variant.engine.planning import schedule_of
from variant.models.flops import ceiling, linears
from variant.models.presets import PAPER_BRIDGE, VAR_PRESETS

MODEL, DTYPE_BYTES = "var-d30", 2


def gemm_seconds(c: Constants, rows: int, inputs: int, outputs: int) -> float:
    """A product with weights in 16 bits: the best of cuBLAS's usual tiles and splits."""
    moved = DTYPE_BYTES * (inputs * outputs + rows * (inputs + outputs))
    memory = moved / (c.gemm_share * c.copy_bytes)
    each = c.matrix_flops / PROCESSORS
    compute = math.inf
    for height in (64, 128, 256):
        for width in (64, 128, 256):
            for split in (1, 2, 4, 8):
                tiles = -(-rows // height) * -(-outputs // width) * split
                # Small tiles read their inputs more often from shared memory.
                share = min(1.0, height * width / (height + width) / 64)
                one = 2 * height * width * -(-inputs // split) / (each * share)
                partial = 0 if split == 1 else 8 * split * rows * outputs / c.copy_bytes
                # Full rounds, and a last one that is as long as the others.
                compute = min(compute, -(-tiles // PROCESSORS) * one + partial)
    return c.kernel_seconds + max(memory, compute)


def row_seconds(c: Constants, moved: float) -> float:
    """A kernel that is bound by memory and reads and writes ``moved`` bytes."""
    return max(c.row_seconds, moved / (c.row_share * c.copy_bytes))


@dataclass(frozen=True)
class Generation:
    """Predicted seconds of one generation, by part."""

    gemms: float
    attention: float
    rows: float
    rest: float
    decoder: float

    @property
    def tokens(self) -> float:
        """Without the decoder."""
        return self.gemms + self.attention + self.rows + self.rest

    @property
    def images(self) -> float:
        """With the decoder."""
        return self.tokens + self.decoder


def generation(c: Constants, batch: int, depth: int) -> Generation:
    """A generation of VAR-d30 with guidance, in bfloat16, at the paper's bridge."""
    config = VAR_PRESETS[MODEL]
    schedule = schedule_of(config, depth, PAPER_BRIDGE)
    # Many layers have products of the same sizes.
    sizes = Counter((x.rows, x.inputs, x.outputs) for x in linears(config, schedule, batch))
    gemms = sum(count * gemm_seconds(c, *size) for size, count in sizes.items())
    attention = rows = 0.0
    for scale, tokens in enumerate(config.layout.tokens):
        layers = len(schedule.active_layers(scale))
        visible, sequences = config.layout.visible(scale), 2 * batch
        heads = sequences * config.num_heads
        attention += layers * paged_seconds(c, tokens, visible, config.head_dim, heads)
        # After attention the float32 stream and y are read and h is written; after the MLP the
        # stream and both branches are read, the stream and h written. The append reads and writes
        # K and V only: attention normalises the queries.
        elements = sequences * tokens * config.embed_dim
        rows += layers * sum(row_seconds(c, moved * elements) for moved in (8, 14, 8))
    rows += sampling_of_all_scales(c, batch)
    rest = c.host_seconds + c.scale_seconds * config.layout.num_scales
    decoder = c.decoder_seconds + batch * c.decoder_image_seconds
    return Generation(gemms, attention, rows, rest, decoder)


def sampling_of_all_scales(c: Constants, batch: int) -> float:
    """Seconds of sampling in a generation."""
    return sum(sampling_seconds(c, batch * n) for n in VAR_PRESETS[MODEL].layout.tokens)


@cache
def linear_ceiling(depth: int) -> float:
    """Speed-up of a depth over full depth if linear work took all the time."""
    config = VAR_PRESETS[MODEL]
    return ceiling(config, schedule_of(config, depth, PAPER_BRIDGE))
