"""sample_tokens in Triton. B images, T tokens, V codebook entries, R = B * T rows.

A program holds one row in registers. The thresholds of top-k and top-p are found by bisection,
without sorting. Weights are exp of a float64 difference in fixed point with 45 fractional bits:
their sums are exact, so tokens depend neither on the order of additions nor on the GPU.
"""

# Triton's compiler gives a kernel's arguments other types than Python's checker sees.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportInvalidTypeForm=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

from variant_kernels.tensors import last_contiguous
from variant_kernels.triton_ops.common import on_device_of, padded
from variant_kernels.triton_ops.rows import num_warps_for

# The sum of 2^16 weights of at most 2^45 fits an int64. Entries below 2^-46 of the largest weight
# are never drawn; all of them together would be drawn once in 10^9 times.
FIXED = tl.constexpr(2.0**45)
# The longest interval that is bisected by value; longer ones are bisected by the order of floats.
NEAR = tl.constexpr(1024.0)
HALVINGS_BY_VALUE = tl.constexpr(24)
HALVINGS = tl.constexpr(3)


@triton.jit
def exp_wide(d):
    """exp(d) for float64 d <= 0, as in the C++ kernel: to about 3e-10, d clamped to -700."""
    d = tl.where(d < -700.0, -700.0, d)
    # Adding 1.5 * 2^52 rounds to an integer, which is then in the low bits.
    shifted = d * 1.4426950408889634 + 6755399441055744.0
    n = shifted - 6755399441055744.0
    # log 2 in two parts: the first has enough trailing zeros for n times it to be exact.
    r = (d - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10
    p = r * (1.0 / 40320) + 1.0 / 5040
    p = p * r + 1.0 / 720
    p = p * r + 1.0 / 120
    p = p * r + 1.0 / 24
    p = p * r + 1.0 / 6
    p = p * r + 0.5
    p = p * r + 1.0
    p = p * r + 1.0
    exponent = shifted.to(tl.int64, bitcast=True) - 0x4338000000000000
    return p * ((exponent + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def rank_of(x):
    """An int64 with the order of the float32 scalar x; both zeros have the same."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def value_of(rank):
    """The inverse of :func:`rank_of`."""
    bits = rank.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def top_k_threshold(a, smallest, largest, entries, top_k):
    """A threshold such that ``a >= threshold`` selects the top_k largest and ties of the last.

    top_k < entries.
    """
    # At least top_k entries are >= low, fewer are >= high.
    low, high = rank_of(smallest), rank_of(largest) + 1
    count = tl.zeros((), tl.int32) + entries
    step = tl.zeros((), tl.int32)
    while (count != top_k) & (high - low > 1):
        low_value, high_value = value_of(low), value_of(high)
        by_value = (high_value - low_value < NEAR) & (step < HALVINGS_BY_VALUE)
        halved = rank_of(0.5 * low_value + 0.5 * high_value)
        middle = tl.where(by_value, halved, low + (high - low) // 2)
        middle = tl.minimum(tl.maximum(middle, low + 1), high - 1)
        reached = tl.sum((a >= value_of(middle)).to(tl.int32), 0)
        enough = reached >= top_k
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
        count = tl.where(enough, reached, count)
        step += 1
    return value_of(low)


@triton.jit
def top_p_weights(a, weights, largest, allowance):
    """The weights after top-p, with zeros for dropped entries.

    In ascending order of a, lower index first among equals, every entry whose cumulative weight is
    at most ``allowance`` is dropped, except the last.
    """
    nonzero = weights > 0
    # All entries up to low can be dropped, all up to high cannot: the boundary is in (low, high].
    low = tl.full((), float("-inf"), tl.float32)
    below = tl.zeros((), tl.int64)
    bottom, high = tl.min(tl.where(nonzero, a, largest), 0), largest
    while bottom < high:
        for _ in tl.static_range(HALVINGS):
            middle = 0.5 * bottom + 0.5 * high
            middle = tl.where(middle < high, middle, bottom)  # no float in between
            mass = tl.sum(tl.where(a <= middle, weights, 0), 0)
            fits = mass <= allowance
            low, bottom = tl.where(fits, middle, low), tl.where(fits, middle, bottom)
            high, below = tl.where(fits, high, middle), tl.where(fits, mass, below)
        # Shrink the interval to the entries in it, so that every bisection separates some of them.
        between = nonzero & (a > low) & (a <= high)
        bottom = tl.min(tl.where(between, a, float("inf")), 0)
        high = tl.max(tl.where(between, a, float("-inf")), 0)
    equal = a == high
    weight = tl.max(tl.where(equal, weights, 0), 0)
    droppable = tl.sum(equal.to(tl.int32), 0) - (high == largest).to(tl.int32)
    dropped_ties = tl.minimum((allowance - below) // tl.maximum(weight, 1), droppable.to(tl.int64))
    weights = tl.where(a < high, 0, weights)
    if dropped_ties > 0:
        order = tl.cumsum(equal.to(tl.int32), 0)
        weights = tl.where(equal & (order <= dropped_ties), 0, weights)
    return weights


@triton.jit
def uniform(seed, image, position):
    """float64 in [0, 1): 53 random bits keyed by (seed, image, position), all int64 scalars."""
    zero = (position * 0).to(tl.uint32)
    word0, word1, _, _ = tl.philox(
        seed, position.to(tl.uint32), zero, image.to(tl.uint32), (image >> 32).to(tl.uint32)
    )
    bits = ((word0 >> 5).to(tl.int64) << 26) + (word1 >> 6).to(tl.int64)
    return bits.to(tl.float64) * 1.1102230246251565e-16


@triton.jit(do_not_specialize=["batch", "tokens", "top_k", "seed", "position"])
def sample_tokens_kernel(
    logits_ptr,
    guidance_ptr,
    seed_ptr,
    image_ids_ptr,
    exponential_ptr,
    out_ptr,
    stride_b,
    stride_t,
    image_stride,
    batch,
    tokens,
    cond_weight,
    uncond_weight,
    top_k,
    one_minus_top_p,
    seed: tl.int64,
    position: tl.int64,
    GUIDED: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Sample the token of one row.

    cond_weight and uncond_weight are 1 + guidance and guidance, unless guidance_ptr is given.
    """
    row = tl.program_id(0).to(tl.int64)
    b, t = row // tokens, row % tokens
    v = tl.arange(0, BLOCK_V)
    inside = v < V
    cond_ptr = logits_ptr + b * stride_b + t * stride_t
    a = tl.load(cond_ptr + v, mask=inside, other=0.0).to(tl.float32)
    if GUIDED:
        uncond_mask = inside
        if guidance_ptr is not None:
            guidance = tl.load(guidance_ptr)
            cond_weight, uncond_weight = (1.0 + guidance).to(tl.float32), guidance.to(tl.float32)
            # Without guidance the unconditional rows are not loaded.
            uncond_mask = v < tl.where(guidance == 0.0, 0, V)
        uncond_offset = tl.cast(batch, tl.int64) * stride_b
        uncond = tl.load(cond_ptr + uncond_offset + v, mask=uncond_mask, other=0.0).to(tl.float32)
        # Each product is rounded: the launcher forbids fused multiply-adds.
        a = a * cond_weight - uncond * uncond_weight
    a = tl.where(inside, a, float("-inf"))
    # Logits are not validated. A row from which nothing can be drawn gives token 0.
    largest = tl.max(tl.where(a == a, a, float("inf")), 0)
    valid = (largest > float("-inf")) & (largest < float("inf"))
    a = tl.where(v < tl.where(valid, BLOCK_V, 0), a, tl.where(v == 0, 0.0, float("-inf")))
    largest = tl.where(valid, largest, 0.0)

    if exponential_ptr is not None:
        # Rounded to float32, as in torch's softmax.
        d = (a - largest).to(tl.float64)
    else:
        d = a.to(tl.float64) - largest.to(tl.float64)
    weights = (exp_wide(d) * FIXED + 0.5).to(tl.int64)
    if TOP_K:
        smallest = tl.min(tl.where(inside, a, float("inf")), 0)
        weights = tl.where(a >= top_k_threshold(a, smallest, largest, V, top_k), weights, 0)
    if TOP_P:
        total = tl.sum(weights, 0).to(tl.float64)
        weights = top_p_weights(
            a, weights, largest, (tl.cast(one_minus_top_p, tl.float64) * total).to(tl.int64)
        )
    total = tl.sum(weights, 0)

    if exponential_ptr is not None:
        exponential = tl.load(exponential_ptr + row * V + v, mask=inside, other=1.0)
        probs = weights.to(tl.float64) * (1.0 / total.to(tl.float64))
        ratio = tl.div_rn(probs.to(tl.float32), exponential)
        ratio = tl.where(weights > 0, ratio, -1.0)
        token = tl.argmax(ratio, 0, tie_break_left=True).to(tl.int64)
    else:
        image = tl.load(image_ids_ptr + b * image_stride)
        if seed_ptr is not None:
            seed = tl.load(seed_ptr)
        target = (uniform(seed, image, position + t) * total.to(tl.float64)).to(tl.int64)
        # u * total may round up to the total, which would be past the last entry.
        target = tl.minimum(target, total - 1)
        token = tl.sum((tl.cumsum(weights, 0) <= target).to(tl.int32), 0).to(tl.int64)
    tl.store(out_ptr + row, token)


# --- launcher -----------------------------------------------------------------------------------

# Entries of a row that one thread holds. Sums over a program cost each warp the same: for sm_90 32
# take 20 % fewer issue cycles a row than 16, and 196 registers (Triton 3.6); 64 spill.
ENTRIES_PER_THREAD = 32
MIN_BLOCK = 16


def launch_sample_tokens(
    *,
    logits_2BTV: torch.Tensor,
    guidance: float | torch.Tensor,
    top_k: int,
    top_p: float,
    seed: int | torch.Tensor,
    image_ids_B: torch.Tensor,
    position: int,
    exponential_RV: torch.Tensor | None,
) -> torch.Tensor:
    """Guide, filter and draw one token per row; conditional rows come first in logits_2BTV.

    The random number is Philox keyed with (seed, image, position + t); with exponential_RV
    (float32, contiguous, rows in (b, t) order) the token is argmax(p / exponential_RV) instead.
    guidance and seed may be 0-d tensors (float64, int64), which each replay of a captured graph
    reads again. A row with NaN or +inf after guidance, or without a finite entry, gives token 0.

    Returns:
        tokens_BT: int64.
    """
    logits_2BTV = last_contiguous(logits_2BTV)
    images, tokens, entries = logits_2BTV.shape
    batch = images // 2
    tokens_BT = logits_2BTV.new_empty((batch, tokens), dtype=torch.int64)
    if tokens_BT.numel() == 0:
        return tokens_BT
    guidance_on_device = isinstance(guidance, torch.Tensor)
    guidance_scale = 0.0 if isinstance(guidance, torch.Tensor) else float(guidance)
    block = max(MIN_BLOCK, padded(entries))
    with on_device_of(logits_2BTV):
        sample_tokens_kernel[(batch * tokens,)](
            logits_2BTV,
            guidance if guidance_on_device else None,
            seed if isinstance(seed, torch.Tensor) else None,
            image_ids_B,
            exponential_RV,
            tokens_BT,
            *logits_2BTV.stride()[:2],
            image_ids_B.stride(0),
            batch,
            tokens,
            1.0 + guidance_scale,
            guidance_scale,
            top_k,
            1.0 - top_p,
            0 if isinstance(seed, torch.Tensor) else seed,
            position,
            GUIDED=guidance_on_device or guidance_scale != 0.0,
            TOP_K=0 < top_k < entries,
            TOP_P=0.0 < top_p < 1.0,
            V=entries,
            BLOCK_V=block,
            num_warps=num_warps_for(block, logits_2BTV.device, ENTRIES_PER_THREAD),
            enable_fp_fusion=False,
        )
    return tokens_BT
