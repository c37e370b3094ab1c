"""Attention of a whole multi-scale sequence at once: ``block_causal_attention``.

Axes: B batch, L tokens of all scales, H heads, D width of one head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from variant_kernels.dispatch.request import Request
from variant_kernels.dispatch.select import Impl, Lazy, choose_backward, choose_name
from variant_kernels.dispatch.support import (
    cpu_unsupported,
    cuda_unsupported,
    flex_unsupported,
    triton_unsupported,
)
from variant_kernels.ops import contract
from variant_kernels.ops.qk_norm import QK_NORM_IMPLS, check_scale_mul, qk_norm
from variant_kernels.ops.registry import differentiate, forbid_gradient, register
from variant_kernels.plans.scale_layout import ScaleLayout
from variant_kernels.tensors import last_contiguous

# --- the definition -----------------------------------------------------------------------------


@lru_cache(maxsize=64)
def dense_mask(scale_lengths: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """(L, L) bool: whether the token of a row sees the token of a column; read-only."""
    scales = [k for k, length in enumerate(scale_lengths) for _ in range(length)]
    scale_L = torch.tensor(scales, device=device)
    return scale_L.unsqueeze(1) >= scale_L.unsqueeze(0)


def _wide(*tensors_BLHD: Tensor) -> list[Tensor]:
    """(B, H, L, D) in float32 or wider."""
    wide = torch.promote_types(tensors_BLHD[0].dtype, torch.float32)
    return [x.transpose(1, 2).to(wide) for x in tensors_BLHD]


def _scores(
    q_BHLD: Tensor, k_BHLD: Tensor, lengths: tuple[int, ...], softmax_scale: float
) -> Tensor:
    scores_BHLL = (q_BHLD @ k_BHLD.transpose(-1, -2)) * softmax_scale
    return scores_BHLL.masked_fill(~dense_mask(lengths, scores_BHLL.device), -torch.inf)


def reference_block_causal_attention_forward(
    *,
    q_BLHD: Tensor,
    k_BLHD: Tensor,
    v_BLHD: Tensor,
    scale_lengths: tuple[int, ...],
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    q_BHLD, k_BHLD, v_BHLD = _wide(q_BLHD, k_BLHD, v_BLHD)
    scores_BHLL = _scores(q_BHLD, k_BHLD, scale_lengths, softmax_scale)
    lse_BHL = torch.logsumexp(scores_BHLL, dim=-1)
    # Not exp(scores - lse): a large lse has no digits left behind the point.
    out_BHLD = torch.softmax(scores_BHLL, dim=-1) @ v_BHLD
    return out_BHLD.transpose(1, 2).to(q_BLHD.dtype).contiguous(), lse_BHL.contiguous()


def reference_block_causal_attention_backward(
    *,
    grad_out_BLHD: Tensor,
    q_BLHD: Tensor,
    k_BLHD: Tensor,
    v_BLHD: Tensor,
    out_BLHD: Tensor,
    lse_BHL: Tensor,
    scale_lengths: tuple[int, ...],
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """FlashAttention-2 (arXiv 2307.08691), algorithm 2, without the tiling.

    With P = exp(S - lse) and delta = rowsum(grad_out * out):
        dV = P^T grad_out,  dS = P * (grad_out V^T - delta),
        dQ = softmax_scale dS K,  dK = softmax_scale dS^T Q
    """
    q_BHLD, k_BHLD, v_BHLD, out_BHLD, grad_BHLD = _wide(
        q_BLHD, k_BLHD, v_BLHD, out_BLHD, grad_out_BLHD
    )
    scores_BHLL = _scores(q_BHLD, k_BHLD, scale_lengths, softmax_scale)
    probs_BHLL = torch.exp(scores_BHLL - lse_BHL.unsqueeze(-1))
    delta_BHL1 = (grad_BHLD * out_BHLD).sum(-1, keepdim=True)
    dv_BHLD = probs_BHLL.transpose(-1, -2) @ grad_BHLD
    dscores_BHLL = probs_BHLL * (grad_BHLD @ v_BHLD.transpose(-1, -2) - delta_BHL1)
    dscores_BHLL = dscores_BHLL * softmax_scale
    dq_BHLD = dscores_BHLL @ k_BHLD
    dk_BHLD = dscores_BHLL.transpose(-1, -2) @ q_BHLD
    dtype = q_BLHD.dtype
    dq, dk, dv = (x.transpose(1, 2).to(dtype).contiguous() for x in (dq_BHLD, dk_BHLD, dv_BHLD))
    return dq, dk, dv


# --- backends -----------------------------------------------------------------------------------

_CPU = "variant_kernels.cpu_ops.block_causal_attention"
_TRITON = "variant_kernels.triton_ops.block_causal_attention"
_CUDA = "variant_kernels.cuda_ops.block_causal_attention"
_FLEX = "variant_kernels.library_ops.flex"

BLOCK_CAUSAL_IMPLS = {
    "reference": Impl(
        reference_block_causal_attention_forward, reference_block_causal_attention_backward
    ),
    "cpu": Impl(
        Lazy(_CPU, "launch_block_causal_attention_forward"),
        Lazy(_CPU, "launch_block_causal_attention_backward"),
        cpu_unsupported,
    ),
    "triton": Impl(
        Lazy(_TRITON, "launch_block_causal_attention_forward"),
        Lazy(f"{_TRITON}_backward", "launch_block_causal_attention_backward"),
        triton_unsupported,
    ),
    "cuda": Impl(
        Lazy(_CUDA, "launch_block_causal_attention_forward"),
        Lazy(_CUDA, "launch_block_causal_attention_backward"),
        cuda_unsupported,
    ),
    # Its gradient is torch's own: see block_causal_attention.
    "flex": Impl(
        Lazy(_FLEX, "launch_block_causal_attention_forward"),
        Lazy(_FLEX, "refuse_backward"),
        flex_unsupported,
    ),
}


def _after_qk_norm(name: str) -> Impl:
    """A backend's attention of queries and keys that its qk_norm made; the gradient makes them
    again instead of keeping them.
    """
    attention, norm = BLOCK_CAUSAL_IMPLS[name], QK_NORM_IMPLS[name]

    def forward(*, q_BLHD, k_BLHD, scale_mul_1H11, **given):
        q_BLHD, k_BLHD = norm.forward(q_BTHD=q_BLHD, k_BTHD=k_BLHD, scale_mul_1H11=scale_mul_1H11)
        return attention.forward(q_BLHD=q_BLHD, k_BLHD=k_BLHD, **given)

    def backward(*, q_BLHD, k_BLHD, scale_mul_1H11, **given):
        inputs = {"q_BTHD": q_BLHD, "k_BTHD": k_BLHD, "scale_mul_1H11": scale_mul_1H11}
        q_BLHD, k_BLHD = norm.forward(**inputs)
        dq_BLHD, dk_BLHD, dv_BLHD = attention.backward(q_BLHD=q_BLHD, k_BLHD=k_BLHD, **given)
        dq_BLHD, dk_BLHD, dscale = norm.backward(grad_q_BTHD=dq_BLHD, grad_k_BTHD=dk_BLHD, **inputs)
        return dq_BLHD, dk_BLHD, dv_BLHD, dscale

    return Impl(forward, backward, attention.unsupported)


# With scale_mul_1H11. FlexAttention's gradient is torch's own: qk_norm runs before it.
BLOCK_CAUSAL_QK_NORM_IMPLS = {
    **{name: _after_qk_norm(name) for name in ("reference", "cpu", "cuda")},
    "triton": Impl(
        Lazy(_TRITON, "launch_block_causal_attention_forward"),
        Lazy(f"{_TRITON}_backward", "launch_block_causal_attention_qk_norm_backward"),
        triton_unsupported,
    ),
}

OP = "block_causal_attention"
IMPLS = {OP: BLOCK_CAUSAL_IMPLS}


def _request(q: Tensor, gradient: bool) -> Request:
    batch, length, heads, head_dim = q.shape
    sizes = (batch * heads, length, length)
    return Request(q.device.type, (q.dtype,), head_dim, None, None, None, *sizes, gradient)


# Where a compiled graph chooses. It does not say whether a gradient will be wanted: training is
# what the op is for. FlexAttention's gradient is out of its reach.
_BEYOND_GRAPHS = ("flex",)


def _choose(impls: dict[str, Impl], backend: str, q: Tensor) -> Impl:
    return impls[choose_name(OP, impls, backend, _request(q, True), avoid=_BEYOND_GRAPHS)]


# --- registration -------------------------------------------------------------------------------


def _register(name: str, impls: dict[str, Impl], keywords: dict[str, str]) -> Callable[..., Any]:
    """The op of a table, and its gradient. keywords: launchers' name of each tensor, q first."""
    count = len(keywords)
    tensors = ", ".join(f"Tensor {tensor}" for tensor in keywords)
    rest = "int[] scale_lengths, float softmax_scale, str backend"

    def launch_forward(*arguments):
        given, (lengths, scale, backend) = arguments[:count], arguments[count:]
        return _choose(impls, backend, given[0]).forward(
            **dict(zip(keywords.values(), given, strict=True)),
            scale_lengths=tuple(lengths),
            softmax_scale=scale,
        )

    def forward_fake(q, *_):
        batch, length, heads, _ = q.shape
        wide = torch.promote_types(q.dtype, torch.float32)
        return q.new_empty(q.shape), q.new_empty((batch, heads, length), dtype=wide)

    def launch_backward(grad_out, *arguments):
        given, (out, lse, lengths, scale, backend) = arguments[:count], arguments[count:]
        return _choose(impls, backend, given[0]).backward(
            grad_out_BLHD=grad_out,
            **dict(zip(keywords.values(), given, strict=True)),
            out_BLHD=out,
            lse_BHL=lse,
            scale_lengths=tuple(lengths),
            softmax_scale=scale,
        )

    def backward_fake(grad_out, *arguments):
        return tuple(x.new_empty(x.shape) for x in arguments[:count])

    forward_op = register(
        f"{name}({tensors}, {rest}) -> (Tensor, Tensor)",
        implementation=launch_forward,
        fake=forward_fake,
    )
    backward_op = register(
        f"{name}_backward(Tensor grad_out, {tensors}, Tensor out, Tensor lse, {rest})"
        f" -> ({', '.join(['Tensor'] * count)})",
        implementation=launch_backward,
        fake=backward_fake,
    )

    def setup(ctx, inputs, output):
        *given, ctx.scale_lengths, ctx.softmax_scale, backend = inputs
        # The backward pass runs where the forward ran, whatever use_backend says by then.
        request = _request(given[0], True)
        ctx.backend = choose_backward(OP, impls, backend, request, avoid=_BEYOND_GRAPHS)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*given, *output)

    def autograd(ctx, grad_out, grad_lse):
        if grad_out is None:
            return (None,) * (count + 3)
        grads = backward_op(
            last_contiguous(grad_out),
            *ctx.saved_tensors,
            ctx.scale_lengths,
            ctx.softmax_scale,
            ctx.backend,
        )
        return *grads, None, None, None

    differentiate(name, setup_context=setup, backward=autograd)
    forbid_gradient(f"{name}_backward")
    return forward_op


_QKV = {"q": "q_BLHD", "k": "k_BLHD", "v": "v_BLHD"}
block_causal_attention_op = _register("block_causal_attention", BLOCK_CAUSAL_IMPLS, _QKV)
block_causal_attention_qk_norm_op = _register(
    "block_causal_attention_qk_norm",
    BLOCK_CAUSAL_QK_NORM_IMPLS,
    {**_QKV, "scale_mul": "scale_mul_1H11"},
)


# --- public function ----------------------------------------------------------------------------


def block_causal_attention(
    q_BLHD: Tensor,
    k_BLHD: Tensor,
    v_BLHD: Tensor,
    layout: ScaleLayout,
    *,
    scale_mul_1H11: Tensor | None = None,
    softmax_scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention in which every token sees its own scale and all earlier ones.

        out = softmax(softmax_scale * q k^T + mask) v,   mask = 0 if scale(key) <= scale(query)

    With ``scale_mul_1H11`` q and k are those of :func:`qk_norm`; no copy of them is kept for the
    backward pass. Softmax statistics and sums are float32. The backward pass is deterministic.
    Source: VAR (arXiv 2404.02905), block-wise causal attention.

    Args:
        q_BLHD, k_BLHD, v_BLHD: same shape, dtype and device; float32, float16 or bfloat16; any
            strides with a contiguous last axis. D: a multiple of 8 from 16 to 256.
        layout: tokens per scale; ``layout.total`` is L.
        scale_mul_1H11: logarithm of each head's scale, (1, H, 1, 1), float32 or q's dtype; None:
            q and k are taken as they are.
        softmax_scale: factor on the scores; None is 1/sqrt(D), or 1 with ``scale_mul_1H11``.
    Returns:
        (B, L, H, D), a new contiguous tensor of q's dtype.
    Raises:
        ValueError: shapes, devices or layout disagree.  TypeError: dtype not listed.
    Gradient: q, k, v; and scale_mul, none above log 100.
    """
    op = "block_causal_attention"
    contract.check_float(op, "q_BLHD", q_BLHD)
    contract.check_ndim(op, "q_BLHD", q_BLHD, "(B, L, H, D)")
    contract.check_head_dim(op, "q_BLHD", q_BLHD.shape[-1])
    for name, tensor in (("k_BLHD", k_BLHD), ("v_BLHD", v_BLHD)):
        contract.check_float(op, name, tensor)
        contract.check_shape(op, name, tensor, tuple(q_BLHD.shape), "to match q_BLHD")
        contract.check_same(op, name, tensor, "q_BLHD", q_BLHD)
    if not isinstance(layout, ScaleLayout):
        raise TypeError(f"{op}: layout must be a ScaleLayout; got {type(layout).__name__}")
    if q_BLHD.shape[1] != layout.total:
        raise ValueError(
            f"{op}: q_BLHD must have {layout.total} tokens to match layout {layout.tokens}; "
            f"got {q_BLHD.shape[1]}"
        )
    inputs = [q_BLHD, k_BLHD, v_BLHD]
    if scale_mul_1H11 is not None:
        check_scale_mul(op, scale_mul_1H11, "q_BLHD", q_BLHD)
        inputs.append(scale_mul_1H11)
        softmax_scale = 1.0 if softmax_scale is None else softmax_scale
    scale = contract.softmax_scale(op, softmax_scale, q_BLHD.shape[-1])
    # Choosing looks at the environment, which a graph cannot: there, the argument alone counts.
    if not torch.compiler.is_compiling():
        gradient = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
        backend = choose_name(op, BLOCK_CAUSAL_IMPLS, backend, _request(q_BLHD, gradient))
    if backend == "flex":
        from variant_kernels.library_ops import flex

        if scale_mul_1H11 is not None:
            q_BLHD, k_BLHD = qk_norm(q_BLHD, k_BLHD, scale_mul_1H11)
        return flex.attend(q_BLHD, k_BLHD, v_BLHD, layout.tokens, scale)[0]
    run = block_causal_attention_op
    if scale_mul_1H11 is not None:
        run = block_causal_attention_qk_norm_op
    return run(*inputs, layout.tokens, scale, backend)[0]


def sample_inputs(
    dtype: torch.dtype, generator: torch.Generator
) -> list[tuple[Tensor, Tensor, Tensor, ScaleLayout]]:
    """One token, ragged head widths, non-square scales, packed projections."""
    cases = []
    shapes = (
        (1, 1, 16, (1,)),
        (2, 2, 24, (1, 2, 3)),
        (1, 3, 64, (1, 2, 3, 4, 5)),
        (2, 1, 40, ((1, 2), (3, 5), (7, 4))),
        (1, 1, 256, (1, 3, 6)),
        (1, 2, 64, (1, 2, 3, 4, 6, 8, 10)),
    )
    for batch, heads, head_dim, sides in shapes:
        layout = ScaleLayout.from_patch_nums(sides)
        packed = torch.randn(batch, layout.total, 3, heads, head_dim, generator=generator)
        q, k, v = packed.to(dtype).unbind(2)
        cases.append((q, k, v, layout))
    return cases
