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
FIXED_BITS = tl.constexpr(45)
# exp(-32) is below 2^-46: weights of entries that are farther below the largest one are zero.
FAR = tl.constexpr(40.0)
LOG2_E = tl.constexpr(1.4426950408889634)
# Adding 1.5 * 2^52 rounds a float64 to an integer, which is then in the low bits.
ROUND = tl.constexpr(6755399441055744.0)
# 2^x = sum of these times x^i for |x| <= 1/2, to a relative error of 4.1e-11: least maximum.
EXP2 = tl.constexpr(
    (
        0.9999999999616821,
        0.6931471807284477,
        0.2402265119815715,
        0.05550410353445903,
        0.009618027253746029,
        0.001333392256557191,
        0.000154692911203878,
        1.520192106716739e-05,
    )
)
# Probes of the search for the k-th largest entry: some bisect, since peaks make the interval long;
# then false position (the Illinois variant), as most entries lie close together. What is left after
# so many holds few entries, or equal ones.
BISECTIONS = tl.constexpr(3)
PROBES = tl.constexpr(10)
# The longest interval that is bisected by value; longer ones are bisected by the order of floats.
NEAR = tl.constexpr(1024.0)
HALVINGS = tl.constexpr(3)
# Bisections of the mass before the interval is shrunk to its entries.
HALVINGS_OF_MASS = tl.constexpr(6)


@triton.jit
def fixed_exp(d):
    """round(2^45 exp(d)), int64, for float64 d in [-100, 0]: to 4.1e-11 of it, and one half."""
    one = tl.full(d.shape, 1.0, tl.float64)
    log2_e = one * LOG2_E
    shifted = tl.fma(d, log2_e, one * ROUND)
    x = tl.fma(d, log2_e, ROUND - shifted)
    p = one * (EXP2[7] * 2.0**FIXED_BITS)
    for i in tl.static_range(6, -1, -1):
        p = tl.fma(p, x, one * (EXP2[i] * 2.0**FIXED_BITS))
    # The low bits of shifted are the exponent.
    scaled = p.to(tl.int64, bitcast=True) + (shifted.to(tl.int64, bitcast=True) << 52)
    rounded = (scaled.to(tl.float64, bitcast=True) + ROUND).to(tl.int64, bitcast=True)
    return rounded & 0x7FFFFFFFFFFFF


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
def after(x, steps):
    """The float32 that is so many floats above the scalar x."""
    return value_of(rank_of(x) + steps)


@triton.jit
def top_k_threshold(a, smallest, largest, entries, top_k, BLOCK: tl.constexpr):
    """A threshold such that ``a >= threshold`` selects the top_k largest and ties of the last.

    top_k < entries. smallest: of all entries.
    """
    # At least top_k entries are >= low, fewer are >= high.
    low, high = smallest, after(largest, 1)
    count = tl.zeros((), tl.int32) + entries
    # How far the ends' counts are from top_k; halved for an end that stays, or it would stay again.
    low_excess = (count - top_k).to(tl.float32)
    high_lack = tl.zeros((), tl.float32) + top_k
    side = tl.zeros((), tl.int32)  # the end that moved last
    step = tl.zeros((), tl.int32)
    middle = 0.5 * low + 0.5 * high
    while (count != top_k) & (step < PROBES) & (low < middle) & (middle < high):
        # The sign bit takes one instruction less an entry than a comparison.
        reached = BLOCK - tl.sum((a - middle).to(tl.uint32, bitcast=True) >> 31, 0).to(tl.int32)
        enough = reached >= top_k
        difference = (reached - top_k).to(tl.float32)
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
        count = tl.where(enough, reached, count)
        low_excess, high_lack = (
            tl.where(enough, difference, tl.where(side < 0, 0.5 * low_excess, low_excess)),
            tl.where(enough, tl.where(side > 0, 0.5 * high_lack, high_lack), -difference),
        )
        side = tl.where(enough, 1, -1)
        step += 1
        share = tl.where(step < BISECTIONS, 0.5, low_excess / (low_excess + high_lack))
        middle = low + (high - low) * share
    # Shrink the interval to the entries in it, so that every bisection separates some of them.
    first, last_rank = rank_of(low), rank_of(high) - 1
    shrinks = count != top_k
    while shrinks:
        low = tl.min(tl.where(a >= value_of(first), a, float("inf")), 0)
        high = tl.max(tl.where(a <= value_of(last_rank), a, float("-inf")), 0)
        first, last_rank = rank_of(low), rank_of(high)
        for _ in tl.static_range(HALVINGS):
            # By the order of floats, upwards: above first, at most last.
            middle_rank = first + (last_rank - first + 1) // 2
            halved = rank_of(0.5 * low + 0.5 * high)
            by_value = (high - low < NEAR) & (halved > first) & (halved <= last_rank)
            middle_rank = tl.where(by_value, halved, middle_rank)
            reached = tl.sum((a >= value_of(middle_rank)).to(tl.int32), 0)
            enough = (reached >= top_k) | (first == last_rank)
            first = tl.where(enough, middle_rank, first)
            last_rank = tl.where(enough, last_rank, middle_rank - 1)
            low, high = value_of(first), value_of(last_rank)
            count = tl.where(enough & (first != last_rank), reached, count)
        shrinks = (count != top_k) & (first < last_rank)
    return value_of(first)


@triton.jit
def top_p_weights(a, weights, floor, largest, total, allowance, ROUNDED: tl.constexpr):
    """The weights after top-p, with zeros for dropped entries, and their sum.

    In ascending order of a, lower index first among equals, every entry whose cumulative weight is
    at most ``allowance`` is dropped, except the last. floor: no entry below it has a weight.
    """
    # All entries up to low can be dropped, all up to high cannot: the boundary is in (low, high].
    low = after(floor, -1)
    below = tl.zeros((), tl.int64)
    bottom, high = floor, largest
    step = tl.zeros((), tl.int32)
    while bottom < high:
        middle = 0.5 * bottom + 0.5 * high
        middle = tl.where(middle < high, middle, bottom)  # no float in between
        mass = tl.sum(tl.where(a <= middle, weights, 0), 0)
        fits = mass <= allowance
        low, bottom = tl.where(fits, middle, low), tl.where(fits, middle, bottom)
        high, below = tl.where(fits, high, middle), tl.where(fits, mass, below)
        step += 1
        if step >= HALVINGS_OF_MASS:
            # Shrink the interval to the entries in it, so that a bisection separates some of them.
            bottom = tl.min(tl.where(a > low, a, float("inf")), 0)
            high = tl.max(tl.where(a <= high, a, float("-inf")), 0)
    weights = tl.where(a < high, 0, weights)
    total -= below
    weight = fixed_exp(from_largest(high, largest, ROUNDED))
    # Of several equal entries at the boundary some may be dropped.
    if (weight > 0) & (allowance - below >= weight):
        equal = a == high
        order = tl.cumsum(equal.to(tl.int32), 0)
        others = tl.sum(equal.to(tl.int32), 0) - (high == largest).to(tl.int32)
        dropped = equal & (order <= others) & (order.to(tl.int64) * weight <= allowance - below)
        weights = tl.where(dropped, 0, weights)
        total = tl.sum(weights, 0)
    return weights, total


@triton.jit
def from_largest(a, largest, ROUNDED: tl.constexpr):
    """a - largest in float64; ROUNDED to float32, as in torch's softmax."""
    return (a - largest).to(tl.float64) if ROUNDED else a.to(tl.float64) - largest.to(tl.float64)


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
    cond_ptr = logits_ptr + b * stride_b + t * stride_t
    # Without masks where no thread is idle: the compiler does not see that all are true.
    inside = v < V if V < BLOCK_V else None
    a = tl.load(cond_ptr + v, mask=inside).to(tl.float32)
    if GUIDED:
        if guidance_ptr is not None:
            guidance = tl.load(guidance_ptr)
            cond_weight, uncond_weight = (1.0 + guidance).to(tl.float32), guidance.to(tl.float32)
        # Without guidance the unconditional rows are not loaded.
        if uncond_weight != 0.0:
            uncond_ptr = cond_ptr + tl.cast(batch, tl.int64) * stride_b
            uncond = tl.load(uncond_ptr + v, mask=inside).to(tl.float32)
            # Each product is rounded: the launcher forbids fused multiply-adds.
            a = a * cond_weight - uncond * uncond_weight
    if V < BLOCK_V:
        a = tl.where(v < V, a, float("-inf"))
    # Logits are not validated. A row from which nothing can be drawn has no weights: token 0.
    largest = tl.max(tl.where(a == a, a, float("inf")), 0)
    valid = (largest > float("-inf")) & (largest < float("inf"))
    largest = tl.where(valid, largest, 0.0)

    # The clamp keeps fixed_exp in its range. Where float32 numbers are farther apart, floor is
    # the largest entry itself: the entries below it are dropped as well.
    floor = largest - FAR
    weights = fixed_exp(from_largest(tl.maximum(a, floor), largest, exponential_ptr is not None))
    floor = tl.where(valid, floor, float("nan"))
    if TOP_K:
        smallest = tl.min(a if V == BLOCK_V else tl.where(v < V, a, float("inf")), 0)
        # A row that is not valid has nothing to be searched for.
        smallest = tl.where(valid, smallest, largest)
        threshold = top_k_threshold(a, smallest, largest, V, top_k, BLOCK_V)
        floor = tl.where(threshold > floor, threshold, floor)
    weights = tl.where(a >= floor, weights, 0)
    total = tl.sum(weights, 0)
    if TOP_P:
        allowance = (tl.cast(one_minus_top_p, tl.float64) * total.to(tl.float64)).to(tl.int64)
        weights, total = top_p_weights(
            a, weights, floor, largest, total, allowance, exponential_ptr is not None
        )

    if exponential_ptr is not None:
        exponential = tl.load(exponential_ptr + row * V + v, mask=inside)
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
        beyond = (target - tl.cumsum(weights, 0)).to(tl.uint64, bitcast=True) >> 63
        token = BLOCK_V - tl.sum(beyond.to(tl.int32), 0).to(tl.int64)
    tl.store(out_ptr + row, token)


# --- launcher -----------------------------------------------------------------------------------

# Entries of a row that one thread holds. Sums over a program cost each warp the same: for sm_90 32
# take fewer issue cycles a row than 16, and 168 registers (Triton 3.6): three programs; 64 spill.
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
