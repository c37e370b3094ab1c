"""FlexAttention, torch's attention and the original's generation: published figures and counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from benchmarks.prediction.attention import ISSUE_SLOTS, Kernel, chosen, rounds
from benchmarks.prediction.constants import Constants
from benchmarks.prediction.generation import MODEL, generation
from benchmarks.prediction.sampling import torch_calls_seconds
from variant.models.flops import attention_flop
from variant.models.presets import VAR_PRESETS
from variant_kernels import DepthSchedule

# A block of FlexAttention's mask, and of its tiles at head width 64 on sm_90: queries x keys of
# the forward pass; in the backward pass 128 x 64 for dQ and 64 x 128 for dK and dV, 8 warps.
FLEX_BLOCK = 128
FLEX_SIZES = {"forward": (128, 128), "dq": (128, 64), "dkv": (64, 128)}


def _even_tiles(
    lengths: Sequence[int], kind: str, *, block_q: int, block_k: int
) -> list[tuple[int, int]]:
    """(pairs, masked) of each program: blocks of the mask that hold a visible pair, cut evenly."""
    total = sum(lengths)
    ends = [end for i, n in enumerate(lengths) for end in [sum(lengths[: i + 1])] * n]
    blocks = -(-total // FLEX_BLOCK)
    # Of each block of queries: blocks of keys that some row sees, and that all rows see whole.
    seen, whole = [], []
    for block in range(blocks):
        rows = ends[block * FLEX_BLOCK : (block + 1) * FLEX_BLOCK]
        seen.append(-(-max(rows) // FLEX_BLOCK))
        # Rows past the end of the sequence see nothing: their block is a partial one.
        full = min(rows) // FLEX_BLOCK if len(rows) == FLEX_BLOCK else 0
        whole.append(full)
    per_pair = FLEX_BLOCK // (block_k if kind != "dkv" else block_q)
    if kind == "dkv":
        tiles = []
        for key in range(blocks):
            visited = sum(key < n for n in seen)
            unmasked = sum(key < n for n in whole)
            tiles += [(visited * per_pair, (visited - unmasked) * per_pair)] * (
                FLEX_BLOCK // block_k
            )
        return tiles
    return [
        (seen[b] * per_pair, (seen[b] - whole[b]) * per_pair)
        for b in range(blocks)
        for _ in range(FLEX_BLOCK // block_q)
    ]


def _flex_kernel(kind: str) -> Kernel:
    """Ours with FlexAttention's block sizes: the same loads, products and softmax."""
    sizes = FLEX_SIZES[kind]
    (kernel, *_) = [k for k in chosen(kind, 64) if (k.block_q, k.block_k) == sizes]
    # Eight warps without a cap on registers: one program on a processor.
    return replace(kernel, programs=1)


def flex_seconds(c: Constants, direction: str, patch_nums: Sequence[int], heads: int) -> float:
    """FlexAttention's Triton kernels, head width 64; direction: forward, or backward alone.

    Its tiles are cut evenly and have masks where a block of 128 x 128 is partly visible. Against a
    plain Triton kernel of the same class it reaches c.flex_share: 408 TFLOP/s at 16,384 tokens and
    head width 128 on an H100 (tritonbench, pytorch/benchmark pull request 2443: 5.389 ms for 16
    heads) beside 477 (Triton's in FlashAttention-3, arXiv 2407.08608).
    """
    lengths = tuple(n * n for n in patch_nums)
    seconds = 0.0
    for kind in ("forward",) if direction == "forward" else ("dq", "dkv"):
        kernel = _flex_kernel(kind)
        tiles = _even_tiles(lengths, kind, block_q=kernel.block_q, block_k=kernel.block_k)
        seconds += kernel.seconds(c, tiles, heads)
    return seconds / c.flex_share


# FlashAttention-3, head width 64, H100 (arXiv 2407.08608): forward 497 TFLOP/s without a mask at
# 16,384 tokens gives the cycles of a pair of 128 x 128, then 265 with a causal mask at 1,024 those
# of a program, whose beginning and end no other program hides; backward 363 without a mask at
# 1,024. flash-attn 4 is the same design on sm_90.
FLASH_PAIR = {"forward": 2038.0, "backward": 6350.0}
FLASH_PROGRAM = 5000.0


def flash_seconds(c: Constants, direction: str, patch_nums: Sequence[int], heads: int) -> float:
    """FlexAttention with its FLASH backend: tiles of 128 x 128, one program on a processor.

    A partial block costs the mask of our own kernel besides.
    """
    lengths = tuple(n * n for n in patch_nums)
    kind = "forward" if direction == "forward" else "dkv"
    kernel = _flex_kernel("forward")
    mask = (kernel.masked - kernel.full) * kernel.num_warps / ISSUE_SLOTS
    tiles = _even_tiles(lengths, kind, block_q=128, block_k=128)
    cycles = [p * FLASH_PAIR[direction] + m * mask + FLASH_PROGRAM for p, m in tiles]
    return rounds(cycles, heads, 1) / c.clock_hz / c.flash_share


# torch's attention on contiguous K and V, head width 64, H100, without a mask at 1,024 to 2,048
# tokens: FlashAttention-2, which it calls, in arXiv 2407.08608.
TORCH_ATTENTION_FLOPS = 290e12

# Bytes of memory that the original's calls read and write in a generation for one entry of the
# stream in one layer, products and attention aside. It runs under autocast with a float32 stream.
# Norm 8, scale 8, shift 8 and the cast to 16 bits 6, twice; norms of q (30) and k (22) in float32
# and back; torch.cat of the K/V cache, 8 for each visible token; the heads' copy 4; gates 4 and
# additions 10, twice; GELU 4 x 4.
ORIGINAL_BYTES = 2 * (8 + 8 + 8 + 6) + 30 + 22 + 4 + 2 * (4 + 10) + 16
ORIGINAL_CACHE_BYTES = 8


def original_seconds(c: Constants, batch: int) -> float:
    """Seconds of the original's generation without the decoder, bound by the GPU at large batches.

    Its products are ours; its attention is torch's.
    """
    config = VAR_PRESETS[MODEL]
    layout = config.layout
    full = DepthSchedule.full(config.depth, layout.num_scales)
    entries = 2 * batch * config.embed_dim * config.depth
    visible = sum(layout.visible(scale) for scale in range(layout.num_scales))
    moved = entries * (ORIGINAL_BYTES * layout.total + ORIGINAL_CACHE_BYTES * visible)
    attention = attention_flop(config, full, batch) / TORCH_ATTENTION_FLOPS
    sampling = sum(torch_calls_seconds(c, batch * tokens) for tokens in layout.tokens)
    gemms = generation(c, batch, config.depth).gemms
    rest = c.scale_seconds * layout.num_scales
    return (gemms + attention + moved / (c.row_share * c.copy_bytes) + sampling + rest) / (
        c.original_share
    )
