"""Sampling with guidance, top-k and top-p: our kernel, and the original's calls of torch."""

from __future__ import annotations

from benchmarks.prediction.attention import ISSUE_SLOTS, PROCESSORS
from benchmarks.prediction.constants import Constants

VOCAB = 4096
# Of `sample_tokens/V 4096, filtered, for a graph` with Triton 3.6.0 for sm_90, counted in its
# machine code: instructions outside its loops, without the branch of equal entries at the boundary,
# and in a pass of each; block barriers likewise. The first two probes are unrolled, outside their
# loop. float64 instructions take two issue slots.
WARPS, PROGRAMS = 4, 3
STRAIGHT, STRAIGHT_FLOAT64, STRAIGHT_BARRIERS = 2188, 400, 19
PROBE, PROBE_BARRIERS = 126, 3  # of the k-th largest entry
TOP_K_SHRINK, TOP_K_SHRINK_BARRIERS = 731, 15  # with three bisections
HALVING, HALVING_BARRIERS = 185, 3  # of the mass of top-p
TOP_P_SHRINK, TOP_P_SHRINK_BARRIERS = 237, 6
# Mean passes over 64 rows of logits with a standard deviation of three in bfloat16, guidance 1.5,
# top_k 900 and top_p 0.96: the benchmark's case.
PROBES, TOP_K_SHRINKS, HALVINGS, TOP_P_SHRINKS = 8.05 - 2, 0.22, 6.47, 1.47
# From the last warp's arrival at a barrier to the next instruction, and its shared-memory round
# trip: about 60 cycles, of which the other programs of the processor fill their share.
BARRIER_CYCLES = 60.0 / PROGRAMS


def sampling_seconds(c: Constants, rows: int) -> float:
    """Seconds of our kernel for ``rows`` tokens: bound by its instructions, not by memory."""
    issued = STRAIGHT + STRAIGHT_FLOAT64 + PROBES * PROBE + TOP_K_SHRINKS * TOP_K_SHRINK
    issued += HALVINGS * HALVING + TOP_P_SHRINKS * TOP_P_SHRINK
    waits = STRAIGHT_BARRIERS + PROBES * PROBE_BARRIERS + TOP_K_SHRINKS * TOP_K_SHRINK_BARRIERS
    waits += HALVINGS * HALVING_BARRIERS + TOP_P_SHRINKS * TOP_P_SHRINK_BARRIERS
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
