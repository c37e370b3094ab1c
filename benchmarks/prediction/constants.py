"""What the model cannot count, from ``constants.json``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

CONSTANTS = Path(__file__).with_name("constants.json")


@dataclass(frozen=True)
class Constants:
    """What the model cannot count. source: where the values come from.

    clock_hz: of a processor.  overlap: 1 if a loop's issue and products take turns; above 1 they
    overlap.  program_cycles: beginning and end of a program.  exposed_cycles: latency of a loop
    that waits for what it has just asked for, shared by the programs of a processor.  matrix_flops,
    copy_bytes: rates of a large product and a large copy.  gemm_share, row_share: shares of the
    copy rate that products of few rows and memory-bound kernels reach.  kernel_seconds,
    row_seconds: the least time of a product or attention, and of a memory-bound kernel, in a graph.
    scale_seconds: work of a scale besides the layers.  host_seconds: of a generation, besides its
    graph.  decoder_seconds, decoder_image_seconds: of the VQ-VAE's decoder, and of each image.
    sampling_share, training_share, flex_share, flash_share, torch_calls_share, original_share,
    original_training_share: speed over what the model's counts give, of our sampling kernel and
    training step, FlexAttention's Triton and FLASH kernels, torch's calls for sampling, and the
    original's generation and training step.
    """

    source: str
    clock_hz: float
    overlap: float
    program_cycles: float
    exposed_cycles: float
    matrix_flops: float
    copy_bytes: float
    gemm_share: float
    row_share: float
    kernel_seconds: float
    row_seconds: float
    scale_seconds: float
    host_seconds: float
    decoder_seconds: float
    decoder_image_seconds: float
    sampling_share: float
    training_share: float
    flex_share: float
    flash_share: float
    torch_calls_share: float
    original_share: float
    original_training_share: float


def constants(path: Path = CONSTANTS) -> Constants:
    """The committed constants."""
    return Constants(**json.loads(path.read_text()))
