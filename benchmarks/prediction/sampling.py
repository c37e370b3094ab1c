"""Sampling with guidance, top-k and top-p: our kernel, and the original's calls of torch."""

from __future__ import annotations

from benchmarks.prediction.attention import ISSUE_SLOTS, PROCESSORS
from benchmarks.prediction.constants import Constants

VOCAB = 4096
# Of `sample_tokens/V 4096, filtered, for a graph` with Triton 3.6.0 for sm_90, counted in its
# machine code: instructions outside its two loops and in a pass of each, block barriers likewise.
WARPS, PROGRAMS = 4, 2
STRAIGHT, TOP_K_PASS, TOP_P_PASS = 3828, 165, 943
STRAIGHT_BARRIERS, TOP_K_BARRIERS, TOP_P_BARRIERS = 27, 3, 15
# Mean passes over 64 rows of logits with a standard deviation of three in bfloat16, guidance 1.5,
# top_k 900 and top_p 0.96: the benchmark's case.
TOP_K_PASSES, TOP_P_PASSES = 13.5, 2.2
# From the last warp's arrival at a barrier to the next instruction, and its shared-memory round
# trip: about 60 cycles, half of which the other program of the processor fills.
BARRIER_CYCLES = 30.0


def sampling_seconds(c: Constants, rows: int) -> float:
    """Seconds of our kernel for ``rows`` tokens: bound by its instructions, not by memory."""
    issued = STRAIGHT + TOP_K_PASSES * TOP_K_PASS + TOP_P_PASSES * TOP_P_PASS
    waits = STRAIGHT_BARRIERS + TOP_K_PASSES * TOP_K_BARRIERS + TOP_P_PASSES * TOP_P_BARRIERS
    one = issued * WARPS / ISSUE_SLOTS / c.overlap + waits * BARRIER_CYCLES + c.program_cycles
    # One row is one program; the last round is as long as the others.
    sharing = min(PROGRAMS, -(-rows // PROCESSORS))
    rounds = -(-rows // (PROCESSORS * sharing)) * sharing
    compute = rounds * one / c.clock_hz / c.sampling_share
    moved = rows * VOCAB * 2 * 2
    return max(c.row_seconds, compute, moved / (c.row_share * c.copy_bytes))


# Passes over a float32 tensor of all guided logits (4 bytes an entry), read and written, call by
# call: both halves of the logits to float32 3, guidance 4 + 3, comparison 1.25, masked_fill 2.25,
# softmax 2, cumsum 2, comparison 1.25, scatter (int64 order, two bool tensors) 2.75, masked_fill
# 2.25, softmax 2, and multinomial for one draw: exponential 1, quotient 3, argmax 1, checks 3.
TORCH_PASSES = 33.75
# torch.sort of 4096 rows of 4096 numbers: 0.86 ms in the first table of FlagGems' pull request 694,
# whose GPU is taken for an A100. Scaled by processors and clock to an H200: 132 x 1.83 over 108 x
# 1.41 GHz.
SORT_SECONDS_PER_ENTRY = 0.86e-3 / 4096**2 * (108 * 1.41) / (132 * 1.83)
# torch.topk selects in 16 passes of two bits over each row. A pass is some 25 instructions for 32
# entries, and waits of about 300 cycles. Estimated from its source, not published.
TOP_K_CYCLES_PER_ROW = 16 * (VOCAB / 32 * 25 / ISSUE_SLOTS + 300 / 2)


def torch_calls_seconds(c: Constants, rows: int) -> float:
    """Seconds of the original's calls for ``rows`` tokens."""
    entries = rows * VOCAB
    passes = TORCH_PASSES * 4 * entries / (c.row_share * c.copy_bytes)
    top_k = rows / PROCESSORS * TOP_K_CYCLES_PER_ROW / c.clock_hz
    return (passes + entries * SORT_SECONDS_PER_ENTRY + top_k) / c.torch_calls_share
