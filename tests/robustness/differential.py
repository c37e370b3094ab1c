"""Random good cases of every op, forward and backward: each backend against float64.

Axes in memory are permuted and padded, page tables shuffled, free pages and tail slots hold NaN.
The expected value is a plain-torch definition in float64. The same definition in the case's dtype
has an error too, and a backend's may be a few times as large: in a single case 4 times and 4 units
in the last place; in the worst of all cases of an op, dtype and result twice (gradients: 3 times).

    python -m tests.robustness.differential --seed 7 --cases 500
"""

from __future__ import annotations

import argparse
import math
import os
import random
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.robustness import forked
from tests.robustness.forked import Failed
from variant_kernels import (
    ScaleLayout,
    adaln_modulate,
    append_paged_kv,
    available_backends,
    block_causal_attention,
    gated_residual_adaln,
    paged_attention,
    qk_norm,
    qk_norm_append_paged_kv,
    sample_tokens,
)
from variant_kernels.kv_quantization import KV8_DTYPE

MODULE = "tests.robustness.differential"
SINGLE_TIMES, SINGLE_ULPS = 4.0, 4.0
WORST_TIMES, WORST_GRADIENT_TIMES = 2.0, 3.0
# Errors of fewer cases than this say little about the worst.
LEAST_CASES = 20


class Draw:
    """The random numbers of one case, and tensors in random layouts."""

    def __init__(self, rng: random.Random, dtype: torch.dtype) -> None:
        self.rng, self.dtype = rng, dtype
        self.generator = torch.Generator().manual_seed(rng.getrandbits(60))

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(dtype or self.dtype)

    def tensor(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normal values; all axes but the last in a random order in memory, with gaps."""
        order = list(range(len(shape) - 1))
        self.rng.shuffle(order)
        gaps = [self.rng.choice((0, 0, 1, 3)) for _ in shape]
        stored = self.normal(
            *[shape[axis] + gaps[axis] for axis in order], shape[-1] + gaps[-1], dtype=dtype
        )
        back = [order.index(axis) for axis in range(len(shape) - 1)]
        view = stored.permute(*back, len(shape) - 1)
        for axis, size in enumerate(shape):
            view = view.narrow(axis, self.rng.randint(0, gaps[axis]), size)
        return view


@dataclass
class Case:
    """Inputs of one op, the definition and the call.

    plain: the definition on tensors of any float dtype; ours: the op on the case's own tensors.
    sizes: largest terms of gradients that are sums which may cancel, by name; from float64 inputs
        and the weights of the results.
    """

    name: str
    inputs: dict[str, Tensor]
    plain: Callable[..., tuple[Tensor, ...]]
    ours: Callable[..., tuple[Tensor, ...]]
    results: tuple[str, ...] = ("out",)
    differentiable: bool = True
    sizes: Callable[[dict[str, Tensor], list[Tensor]], dict[str, float]] = lambda wide, weights: {}


# --- definitions ----------------------------------------------------------------------------------


def plain_adaln(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    normed = F.layer_norm(x, x.shape[-1:], eps=eps)
    return (normed * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)).to(scale.dtype)


def plain_gated(x, y, gate, scale, shift, eps):
    out = (x + gate.unsqueeze(1) * y).to(x.dtype)
    return out, plain_adaln(out, scale, shift, eps)


def plain_qk_norm(q, k, scale_mul):
    factor = scale_mul.clamp_max(math.log(100)).exp().transpose(1, 2)
    q_out = F.normalize(q, dim=-1, eps=1e-12) * factor
    return q_out.to(q.dtype), F.normalize(k, dim=-1, eps=1e-12)


def plain_attention(q, k, v, mask, scale):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)


# --- cases ----------------------------------------------------------------------------------------


def _adaln(d: Draw, backend: str) -> Case:
    batch, tokens, width = d.rng.randint(1, 4), d.rng.randint(1, 20), d.rng.randint(1, 300)
    eps = d.rng.choice((1e-6, 1e-5, 0.1))
    wide = d.rng.choice((d.dtype, torch.float32))
    inputs = {"x": d.tensor(batch, tokens, width, dtype=wide)}
    inputs |= {name: d.tensor(batch, width) for name in ("scale", "shift")}
    return Case(
        "adaln_modulate",
        inputs,
        lambda x, scale, shift: (plain_adaln(x, scale, shift, eps),),
        lambda x, scale, shift: (adaln_modulate(x, scale, shift, eps=eps, backend=backend),),
        sizes=lambda wide, weights: _of_rows(wide["x"], wide["scale"], weights[0], eps),
    )


def _gated(d: Draw, backend: str) -> Case:
    batch, tokens, width = d.rng.randint(1, 4), d.rng.randint(1, 20), d.rng.randint(1, 300)
    wide = d.rng.choice((d.dtype, torch.float32))
    inputs = {"x": d.tensor(batch, tokens, width, dtype=wide), "y": d.tensor(batch, tokens, width)}
    inputs |= {name: d.tensor(batch, width) for name in ("gate", "scale", "shift")}
    return Case(
        "gated_residual_adaln",
        inputs,
        lambda x, y, gate, scale, shift: plain_gated(x, y, gate, scale, shift, 1e-6),
        lambda *tensors: gated_residual_adaln(*tensors, backend=backend),
        ("x_out", "h"),
        sizes=lambda wide, weights: _of_rows(
            wide["x"] + wide["gate"].unsqueeze(1) * wide["y"], wide["scale"], weights[1], 1e-6
        ),
    )


def _of_rows(x: Tensor, scale: Tensor, weight: Tensor, eps: float) -> dict[str, float]:
    """The gradient through a normalisation: a short row's is a difference of terms of this size."""
    rstd = torch.rsqrt(x.var(-1, correction=0, keepdim=True) + eps)
    size = float((rstd * (1 + scale.unsqueeze(1)) * weight.double()).abs().max())
    return dict.fromkeys(("dx", "dy", "dgate"), size)


def _of_heads(terms: Tensor) -> dict[str, float]:
    """The gradient of each head's scale: a sum over all other axes."""
    return {"dscale_mul": float(terms.abs().sum((0, 1, 3)).max())}


HEAD_DIMS = (16, 24, 40, 64, 72, 128, 256)


def _scale_mul(d: Draw, heads: int) -> Tensor:
    dtype = d.rng.choice((d.dtype, torch.float32))
    return (2 * d.normal(1, heads, 1, 1, dtype=torch.float32) + 1).to(dtype)


def _qk_norm(d: Draw, backend: str) -> Case:
    heads = d.rng.randint(1, 4)
    shape = (d.rng.randint(1, 3), d.rng.randint(1, 20), heads, d.rng.choice(HEAD_DIMS))
    inputs = {"q": d.tensor(*shape), "k": d.tensor(*shape), "scale_mul": _scale_mul(d, heads)}
    return Case(
        "qk_norm",
        inputs,
        plain_qk_norm,
        lambda q, k, scale_mul: qk_norm(q, k, scale_mul, backend=backend),
        ("q", "k"),
        sizes=lambda wide, weights: _of_heads(plain_qk_norm(**wide)[0] * weights[0].double()),
    )


def _block_causal(d: Draw, backend: str) -> Case:
    sides = [(d.rng.randint(1, 5), d.rng.randint(1, 6)) for _ in range(d.rng.randint(1, 8))]
    layout = ScaleLayout.from_patch_nums(sides)
    heads = d.rng.randint(1, 3)
    shape = (d.rng.randint(1, 2), layout.total, heads, d.rng.choice(HEAD_DIMS))
    scale = d.rng.choice((None, 1.0, 0.1, -0.3))
    number = torch.repeat_interleave(torch.arange(len(sides)), torch.tensor(layout.tokens))
    mask = number.unsqueeze(1) >= number
    inputs = {name: d.tensor(*shape) for name in "qkv"}
    normalised = d.rng.random() < 0.5
    if normalised:
        inputs["scale_mul"] = _scale_mul(d, heads)

    def plain(q, k, v, scale_mul=None):
        if scale_mul is not None:
            q, k = plain_qk_norm(q, k, scale_mul)
        factor = 1.0 if scale is None and scale_mul is not None else scale
        return (plain_attention(q, k, v, mask, factor),)

    def ours(q, k, v, scale_mul=None):
        options = {"scale_mul_1H11": scale_mul, "softmax_scale": scale, "backend": backend}
        return (block_causal_attention(q, k, v, layout, **options),)

    def sizes(wide: dict[str, Tensor], weights: list[Tensor]) -> dict[str, float]:
        factor = 1.0 if scale is None and normalised else scale
        q, k = wide["q"], wide["k"]
        if normalised:
            q, k = plain_qk_norm(q, k, wide["scale_mul"])
        q = q.detach().requires_grad_()
        v = wide["v"].detach().requires_grad_()
        out = plain_attention(q, k, v, mask, factor)
        # Every probability is off by S * 2^-23 of it, where scores are near S: as documented.
        scores = torch.einsum("bqhd,bkhd->bhqk", q.detach(), k)
        largest_score = float(scores.abs().max()) * abs(
            shape[-1] ** -0.5 if factor is None else factor
        )
        times = max(1.0, largest_score / SINGLE_ULPS)
        of_v = torch.autograd.grad((out * weights[0].double().abs()).sum(), v, retain_graph=True)[0]
        if normalised:
            of_q = torch.autograd.grad((out * weights[0].double()).sum(), q)[0]
            found = _of_heads(q.detach() * of_q)
        else:
            # p * (dp - sum(p dp)) k, where p is almost 1: a difference of terms of this size.
            terms = float((weights[0].double().abs() * wide["v"].abs()).sum(-1).max())
            terms *= abs(shape[-1] ** -0.5 if scale is None else scale)
            largest = {name: float(wide[name].abs().max()) for name in "qk"}
            found = {"dq": terms * largest["k"], "dk": terms * largest["q"]}
        found["dv"] = float(of_v.max())
        return {name: times * size for name, size in found.items()}

    name = "block_causal_attention" + ("+qk_norm" if normalised else "")
    return Case(name, inputs, plain, ours, sizes=sizes)


@dataclass
class Pool:
    """Shuffled pages of some sequences; what no sequence uses is NaN.

    dense_k, dense_v: (B, S, H, D) float64, what the used slots hold.
    """

    pages: dict[str, Tensor]
    table: Tensor
    lens: Tensor
    dense_k: Tensor
    dense_v: Tensor


def _pool(d: Draw, batch: int, heads: int, width: int, eight_bits: bool) -> Pool:
    page_size = d.rng.choice((1, 2, 3, 5, 16, 64))
    lens = [d.rng.choice((0, 1, d.rng.randint(0, 90))) for _ in range(batch)]
    entries = -(-max(lens) // page_size) + d.rng.randint(0, 2)
    num_pages = batch * entries + d.rng.randint(0, 3)
    shape = (num_pages, page_size, heads, width)
    # Slabs of K and V in one tensor, as the cache has them, or apart.
    pools = [torch.full(shape, torch.nan) for _ in "kv"]
    scales = [torch.full(shape[:3], 255, dtype=torch.uint8) for _ in "kv"]
    odd = torch.tensor([-1, 10**6, 2**31 - 1, -(2**31), 0])
    table = odd[torch.randint(5, (batch, entries), generator=d.generator)].int()
    dense = [torch.zeros(batch, max([1, *lens]), heads, width, dtype=torch.float64) for _ in "kv"]
    free = torch.randperm(num_pages, generator=d.generator).tolist()
    for row, length in enumerate(lens):
        for entry in range(-(-length // page_size)):
            page = free.pop()
            table[row, entry] = page
            first = entry * page_size
            here = min(page_size, length - first)
            for pool, scale, logical in zip(pools, scales, dense, strict=True):
                values = d.normal(here, heads, width, dtype=d.dtype).float()
                pool[page, :here] = values
                if eight_bits:
                    values = values.to(KV8_DTYPE).float()
                    exponents = torch.randint(120, 131, (here, heads), generator=d.generator)
                    scale[page, :here] = exponents.to(torch.uint8)
                    values = values * torch.exp2(exponents.float() - 127).unsqueeze(-1)
                logical[row, first : first + here] = values.double()
    kind = KV8_DTYPE if eight_bits else d.dtype
    pages = dict(zip(("k_pages_PNHD", "v_pages_PNHD"), (p.to(kind) for p in pools), strict=True))
    if eight_bits:
        pages |= zip(("k_scales_PNH", "v_scales_PNH"), scales, strict=True)
    return Pool(pages, table, torch.tensor(lens, dtype=torch.int32), *dense)


def _eight_bits(d: Draw, backend: str, share: float) -> bool:
    """Whether pages have 8 bits; none have beside float16 tokens of the C++ backend."""
    return d.rng.random() < share and (backend, d.dtype) != ("cpu", torch.float16)


def _paged(d: Draw, backend: str) -> Case:
    batch, heads, width = d.rng.randint(1, 3), d.rng.randint(1, 3), d.rng.choice(HEAD_DIMS)
    eight_bits = _eight_bits(d, backend, 0.3)
    pool = _pool(d, batch, heads, width, eight_bits)
    scale = d.rng.choice((None, 1.0, 0.05))
    visible = torch.arange(pool.dense_k.shape[1]) < pool.lens.unsqueeze(1)
    mask = visible.view(batch, 1, 1, -1)

    def plain(q):
        k, v = pool.dense_k.to(q.dtype), pool.dense_v.to(q.dtype)
        out = plain_attention(q, k, v, mask, scale)
        return (torch.where((pool.lens == 0).view(-1, 1, 1, 1), 0, out),)

    def ours(q):
        options = {"softmax_scale": scale, "backend": backend}
        return (
            paged_attention(
                q, page_table_BM=pool.table, kv_lens_B=pool.lens, **pool.pages, **options
            ),
        )

    inputs = {"q": d.tensor(batch, d.rng.randint(1, 30), heads, width)}
    name = "paged_attention" + ("+kv8" if eight_bits else "")
    return Case(name, inputs, plain, ours, differentiable=False)


OPS: dict[str, Callable[[Draw, str], Case]] = {
    "adaln_modulate": _adaln,
    "gated_residual_adaln": _gated,
    "qk_norm": _qk_norm,
    "block_causal_attention": _block_causal,
    "paged_attention": _paged,
}


# --- comparison -----------------------------------------------------------------------------------


def check_case(build: Callable[[str], Case], backend: str) -> list[tuple[str, float, float]]:
    """Compare one case; (name of a result, our relative error, plain torch's) for each.

    Raises:
        Failed: a result is too far from float64.
    """
    case = build(backend)
    wide = {name: value.double() for name, value in case.inputs.items()}
    weights: list[Tensor] = []
    exact = _evaluate(case.plain, wide, case, weights)
    plain = _evaluate(case.plain, case.inputs, case, weights)
    ours = _evaluate(case.ours, case.inputs, case, weights)
    gradients = [x for name, x in exact.items() if name.startswith("d") and x is not None]
    largest = max((float(x.abs().max()) for x in gradients if x.numel()), default=0.0)
    sizes = case.sizes(wide, weights) if weights else {}
    errors = []
    for name, expected in exact.items():
        result, theirs = ours[name], plain[name].nan_to_num()
        what = f"{case.name} [{backend}] {name} {tuple(result.shape)} {result.dtype}"
        if result.shape != expected.shape:
            raise Failed(f"{what}: expected the shape {tuple(expected.shape)}")
        if result.dtype != plain[name].dtype:
            raise Failed(f"{what}: expected {plain[name].dtype}")
        if not torch.isfinite(result).all():
            raise Failed(f"{what}: not finite")
        if expected.numel() == 0:
            continue
        our_error = float((result.double() - expected).abs().max())
        plain_error = float((theirs.double() - expected).abs().max())
        size = largest if name.startswith("d") else float(expected.abs().max())
        size = max(size, sizes.get(name, 0.0))
        # A wide result of narrow inputs is as exact as they are.
        eps = max(torch.finfo(x.dtype).eps for x in (result, *case.inputs.values()))
        allowed = SINGLE_TIMES * plain_error + SINGLE_ULPS * eps * size
        if our_error > allowed:
            # Plain torch may be lucky, e.g. in the rounding of a score of some hundreds.
            plain_error = max(plain_error, _moved_by_rounding(case, wide, weights, name, expected))
            allowed = SINGLE_TIMES * plain_error + SINGLE_ULPS * eps * size
        if our_error > allowed:
            raise Failed(
                f"{what}: error {our_error:.3g}, plain torch {plain_error:.3g}, "
                f"allowed {allowed:.3g}"
            )
        if size > 0:
            dtype = str(result.dtype).removeprefix("torch.")
            errors.append(
                (f"{case.name} {backend} {dtype} {name}", our_error / size, plain_error / size)
            )
    return errors


def _moved_by_rounding(
    case: Case, wide: dict[str, Tensor], weights: list[Tensor], name: str, expected: Tensor
) -> float:
    """How far a result moves when every input changes by a unit in the last place of its dtype.

    The condition of the case: no algorithm that rounds terms of the size of its inputs is closer.
    """
    generator = torch.Generator().manual_seed(3)
    furthest = 0.0
    for _ in range(4):
        rounded = {}
        for key, value in wide.items():
            signs = torch.randint(0, 2, value.shape, generator=generator) * 2 - 1
            rounded[key] = value * (1 + torch.finfo(case.inputs[key].dtype).eps * signs)
        result = _evaluate(case.plain, rounded, case, weights)[name]
        furthest = max(furthest, float((result - expected).abs().max()))
    return furthest


def _evaluate(
    function: Callable[..., tuple[Tensor, ...]],
    inputs: dict[str, Tensor],
    case: Case,
    weights: list[Tensor],
) -> dict[str, Tensor]:
    """Results by name, and gradients (``dNAME``) of a weighted sum of them."""
    # Not cloned: a clone would have other strides.
    leaves = {name: x.detach().requires_grad_(case.differentiable) for name, x in inputs.items()}
    results = function(*leaves.values())
    named = dict(zip(case.results, (x.detach() for x in results), strict=True))
    if not case.differentiable:
        return named
    if not weights:
        generator = torch.Generator().manual_seed(5)
        for x in results:
            # Of 8 bits, so that the weights are exact in every dtype.
            weights.append(torch.randn(x.shape, generator=generator).bfloat16())
    total = sum((x * w.to(x.dtype)).sum() for x, w in zip(results, weights, strict=True))
    assert isinstance(total, Tensor)
    gradients = torch.autograd.grad(total, list(leaves.values()))
    return named | {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}


def worst_of(values: list[list[tuple[str, float, float]]]) -> list[str]:
    """Results whose worst error over all cases is too large beside plain torch's worst."""
    ours: dict[str, list[float]] = defaultdict(list)
    plain: dict[str, list[float]] = defaultdict(list)
    for errors in values:
        for name, our_error, plain_error in errors:
            ours[name].append(our_error)
            plain[name].append(plain_error)
    failures = []
    for name in sorted(ours):
        dtype, result = name.split()[-2:]
        times = WORST_GRADIENT_TIMES if result.startswith("d") else WORST_TIMES
        allowed = times * max(plain[name]) + torch.finfo(getattr(torch, dtype)).eps
        if len(ours[name]) >= LEAST_CASES and max(ours[name]) > allowed:
            failures.append(
                f"{name}: worst error of {len(ours[name])} cases {max(ours[name]):.3g}, "
                f"plain torch {max(plain[name]):.3g}, allowed {allowed:.3g}"
            )
    return failures


# --- ops whose results are exact ------------------------------------------------------------------


def check_append(d: Draw, backend: str) -> None:
    """The written slots hold the tokens, bit by bit, and no other byte changes."""
    batch, tokens, heads = d.rng.randint(1, 3), d.rng.randint(1, 20), d.rng.randint(1, 3)
    width, eight_bits = d.rng.choice(HEAD_DIMS), _eight_bits(d, backend, 0.4)
    page_size = d.rng.choice((1, 2, 3, 16))
    num_pages = -(-batch * tokens // page_size) + d.rng.randint(0, 3)
    slots = torch.randperm(num_pages * page_size, generator=d.generator)[: batch * tokens]
    slots = slots.view(batch, tokens)
    slots[torch.rand(batch, tokens, generator=d.generator) < 0.2] = -1
    kind = KV8_DTYPE if eight_bits else d.dtype
    shape = (num_pages, page_size, heads, width)
    # K and V interleaved in one slab, or apart.
    slab = d.normal(*shape[:2], 2, *shape[2:]).to(kind)
    pages = [slab.select(2, i) for i in (0, 1)]
    if d.rng.random() < 0.5:
        pages = [x.clone() for x in pages]
    scales = [
        torch.randint(100, 140, shape[:3], generator=d.generator).to(torch.uint8) for _ in "kv"
    ]
    factor = d.rng.choice((1.0, 1e-3, 300.0))
    name = d.rng.choice(("append_paged_kv", "qk_norm_append_paged_kv"))
    options: dict[str, Any] = {"slots_BT": slots, "backend": backend}
    options |= zip(("k_pages_PNHD", "v_pages_PNHD"), pages, strict=True)
    if eight_bits:
        options |= zip(("k_scales_PNH", "v_scales_PNH"), scales, strict=True)
    before = [x.clone() for x in (*pages, *scales)]
    what = f"{name} [{backend}] {'8-bit ' if eight_bits else ''}{kind}"
    exact_k = True
    if name == "append_paged_kv":
        k, v = ((factor * d.tensor(batch, tokens, heads, width)).to(d.dtype) for _ in "kv")
        append_paged_kv(k, v, **options)
    else:
        qkv = (factor * d.tensor(batch, tokens, 3, heads, width)).to(d.dtype)
        scale_mul = d.rng.choice((None, _scale_mul(d, heads)))
        q = qk_norm_append_paged_kv(qkv, scale_mul, **options)
        q_in, k, v = qkv.unbind(2)
        if scale_mul is None:
            _require(torch.equal(q, q_in), f"{what}: q is not a copy")
        else:
            exact_k = False
            wide = (x.double() for x in (q_in, k, scale_mul))
            q_exact, k_exact = plain_qk_norm(*wide)
            eps = torch.finfo(d.dtype).eps
            error = float((q.double() - q_exact).abs().max() / q_exact.abs().max())
            _require(error <= 2 * eps, f"{what}: q is off by {error:.3g} of its largest")
            k = k_exact
    kept = slots >= 0
    index = slots[kept] // page_size, slots[kept] % page_size
    untouched = torch.ones(shape[:2], dtype=torch.bool)
    untouched[index] = False
    for i, new in enumerate((k, v)):
        exact = exact_k or i == 1
        _check_pool(
            what, d.dtype, pages[i], scales[i] if eight_bits else None, new[kept], index, exact
        )
        for now, then in ((pages[i], before[i]), (scales[i], before[2 + i])):
            same = torch.equal(_bits(now[untouched]), _bits(then[untouched]))
            _require(same, f"{what}: another slot was written")


def _check_pool(what, dtype, pages, scales, new, index, exact) -> None:
    """Rows at ``index`` hold ``new`` (S, H, D), exactly or up to the rounding of ``dtype``."""
    eps = torch.finfo(dtype).eps
    if scales is None:
        stored = pages[index]
        if exact:
            _require(torch.equal(stored, new), f"{what}: a slot does not hold its token")
            return
        error = float((stored.double() - new).abs().max()) if new.numel() else 0.0
        _require(error <= 2 * eps, f"{what}: k is off by {error:.3g}")
        return
    values, factors = pages[index].double(), torch.exp2(scales[index].double() - 127)
    new = new.double()
    largest = new.abs().amax(-1) if new.numel() else factors
    # The smallest power of two s with max|x| <= 448 s, at least 2^-126.
    exponent = torch.frexp(largest / 448)[1]
    exponent = exponent - (largest <= 448 * torch.exp2((exponent - 1).double())).int()
    expected = torch.exp2(exponent.clamp(min=-126).double())
    if exact:
        _require(torch.equal(factors, expected), f"{what}: a scale is not the smallest")
        rounded = (new / expected.unsqueeze(-1)).float().to(KV8_DTYPE).double()
        _require(torch.equal(values, rounded), f"{what}: a value is not the nearest of 8 bits")
        return
    allowed = new.abs() * (2.0**-4 + 4 * eps) + factors.unsqueeze(-1) * 2.0**-9
    off = (values * factors.unsqueeze(-1) - new).abs() - allowed
    most = float(off.max()) if off.numel() else 0.0  # of no token
    _require(most <= 0, f"{what}: 8-bit k is off by {most:.3g} too much")


def check_sampling(d: Draw, backend: str) -> None:
    """Tokens equal those of an own Philox and inverse transform, but for draws on an edge."""
    batch, tokens = d.rng.randint(1, 3), d.rng.randint(1, 5)
    entries = d.rng.choice((1, 2, 7, 64, 100, 515, 1000))
    logits = 3 * d.tensor(2 * batch, tokens, entries)
    logits = logits.to(d.dtype)
    guidance = d.rng.choice((0.0, 1.5, d.rng.uniform(0, 8)))
    top_k = d.rng.choice((0, 1, 5, 40, 2000))
    top_p = d.rng.choice((0.0, 0.9, 0.5, 1.0))
    seed, position = d.rng.getrandbits(63), d.rng.choice((0, 5, 2**32 - tokens))
    ids = torch.tensor([d.rng.choice((0, 7, 2**40 + 3, -5)) for _ in range(batch)])
    drawn = sample_tokens(
        logits,
        guidance=guidance,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        image_ids=ids,
        position=position,
        backend=backend,
    )
    cond, uncond = logits.float().chunk(2)
    guided = cond * (1 + guidance) - uncond * guidance if guidance else cond
    for b in range(batch):
        for t in range(tokens):
            allowed = _tokens_of(
                guided[b, t], top_k, top_p, _uniform(seed, int(ids[b]), position + t)
            )
            got = int(drawn[b, t])
            _require(
                got in allowed,
                f"sample_tokens [{backend}] {d.dtype}: token {got} of {entries}; "
                f"expected {sorted(allowed)[:4]}",
            )


def _tokens_of(logits: Tensor, top_k: int, top_p: float, u: float) -> set[int]:
    """The token of one draw; several where rounding decides."""
    x = logits.double()
    if 0 < top_k < len(x):
        x = x.masked_fill(x < x.topk(top_k).values[-1], -math.inf)
    masks = [torch.isfinite(x)]
    if top_p > 0:
        order = torch.sort(x, stable=True).indices
        cumulative = x[order].softmax(0).cumsum(0)
        masks = []
        for margin in (-3e-6, 0, 3e-6):
            keep = torch.zeros(len(x), dtype=torch.bool)
            kept = cumulative > 1 - top_p + margin
            kept[-1] = True
            keep[order[kept]] = True
            masks.append(keep & torch.isfinite(x))
    found = set()
    for mask in masks:
        mass = x.masked_fill(~mask, -math.inf).softmax(0).cumsum(0)
        for shift in (-2e-6, 0, 2e-6):
            target = min(max(u + shift, 0.0), 1 - 1e-12) * float(mass[-1])
            token = int(
                torch.searchsorted(mass, torch.tensor(target, dtype=torch.float64), right=True)
            )
            found.add(min(token, int(mask.nonzero().max())))
    return found


def _uniform(seed: int, image: int, position: int) -> float:
    """Philox4x32-10 in plain integers: 53 bits keyed by the seed, at (position, 0, image)."""
    word = 0xFFFFFFFF
    c = [position & word, 0, image & word, (image >> 32) & word]
    k = [seed & word, (seed >> 32) & word]
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & word, (p0 >> 32) ^ c[3] ^ k[1], p0 & word]
        k = [(k[0] + 0x9E3779B9) & word, (k[1] + 0xBB67AE85) & word]
    return (((c[0] >> 5) << 26) + (c[1] >> 6)) * 2.0**-53


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def _require(holds: bool, text: str) -> None:
    if not holds:
        raise Failed(text)


# --- the command ----------------------------------------------------------------------------------

EXACT = {"append": check_append, "sample_tokens": check_sampling}
DTYPES = {
    "reference": (torch.float32, torch.bfloat16, torch.float16),
    "cpu": (torch.float32, torch.bfloat16),
    # The interpreter computes bfloat16 wrongly.
    "triton": (torch.float32, torch.float16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}
ON_PAGES = ("paged_attention", "append")


def run(seed: int, number: int, backends: tuple[str, ...], only: str | None) -> Any:
    rng = forked.rng_of(seed, number)
    names = [name for name in (*OPS, *EXACT) if not only or only in name]
    name, backend = rng.choice(names), rng.choice(backends)
    also = (torch.float16,) if backend == "cpu" and name in ON_PAGES else ()
    dtype = rng.choice((*DTYPES[backend], *also))
    state = rng.getstate()
    if name in EXACT:
        EXACT[name](Draw(rng, dtype), backend)
        return None

    def build(backend: str) -> Case:
        rng.setstate(state)
        return OPS[name](Draw(rng, dtype), backend)

    return check_case(build, backend)


def main() -> int:
    chosen: dict[str, Any] = {}

    def extra(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--only", help="part of the name of an op")
        parser.add_argument("--backend", choices=sorted(DTYPES), help="default: all that run here")

    def prepare(arguments: argparse.Namespace) -> str:
        here = tuple(name for name in DTYPES if name in available_backends())
        chosen["backends"] = (arguments.backend,) if arguments.backend else here
        chosen["only"] = arguments.only
        words = [("--only", arguments.only), ("--backend", arguments.backend)]
        return "".join(f" {option} {value}" for option, value in words if value)

    sys.path.insert(0, os.getcwd())
    return forked.main(
        MODULE,
        lambda seed, case: run(seed, case, **chosen),
        forked.option("CASES", 500),
        forked.Limits(cpu_seconds=60),
        extra=extra,
        prepare=prepare,
        finish=worst_of,
    )


if __name__ == "__main__":
    raise SystemExit(main())
