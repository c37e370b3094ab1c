"""Attention of a whole multi-scale sequence at once: ``block_causal_attention``.

Axes: B batch, L tokens of all scales, H heads, D width of one head.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from variant_kernels.dispatch.request import Request
from variant_kernels.dispatch.select import Backend, Launcher
from variant_kernels.dispatch.support import (
    always,
    cpu_unsupported,
    cuda_unsupported,
    flex_unsupported,
    triton_unsupported,
)
from variant_kernels.ops import contract
from variant_kernels.ops.qk_norm import check_scale_mul, qk_norm, qk_norm_op
from variant_kernels.ops.registry import Op
from variant_kernels.plans.scale_layout import ScaleLayout
from variant_kernels.wording import counted

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


# --- the declarations ---------------------------------------------------------------------------

OP = "block_causal_attention"
# Under torch.compile "auto" does not take FlexAttention: its gradient is torch's own, outside the
# op (see block_causal_attention), and a graph does not tell whether a gradient will be needed.
_EAGER_ONLY = ("flex",)


def _check(
    q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, scale_mul_1H11: Tensor | None = None
) -> None:
    contract.check_float(OP, "q_BLHD", q_BLHD)
    contract.check_ndim(OP, "q_BLHD", q_BLHD, "(B, L, H, D)")
    contract.check_head_dim(OP, "q_BLHD", q_BLHD.shape[-1])
    for name, tensor in (("k_BLHD", k_BLHD), ("v_BLHD", v_BLHD)):
        contract.check_float(OP, name, tensor)
        contract.check_shape(OP, name, tensor, tuple(q_BLHD.shape), "to match q_BLHD")
        contract.check_same(OP, name, tensor, "q_BLHD", q_BLHD)
    if scale_mul_1H11 is not None:
        check_scale_mul(OP, scale_mul_1H11, "q_BLHD", q_BLHD)


def _check_normalised(
    q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, scale_mul_1H11: Tensor
) -> None:
    _check(q_BLHD, k_BLHD, v_BLHD)
    check_scale_mul(OP, scale_mul_1H11, "q_BLHD", q_BLHD)


def _request(q: Tensor, *_: Tensor) -> Request:
    return Request(q.device.type, (q.dtype,), q.shape[-1])


def _launch(launcher: Launcher, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    arguments["scale_lengths"] = tuple(arguments["scale_lengths"])
    return launcher(**arguments)


def _fake(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty((batch, heads, length), dtype=wide)


def _like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in tensors)


block_causal_attention_op = Op(
    "block_causal_attention(Tensor q_BLHD, Tensor k_BLHD, Tensor v_BLHD, int[] scale_lengths,"
    " float softmax_scale, str backend) -> (Tensor out_BLHD, Tensor lse_BHL)",
    check=_check,
    request=_request,
    fake=_fake,
    launch=_launch,
    exclude=_EAGER_ONLY,
    backends={
        "triton": Backend(
            triton_unsupported,
            "triton_ops.block_causal_attention.launch_block_causal_attention_forward",
            "triton_ops.block_causal_attention_backward.launch_block_causal_attention_backward",
        ),
        "cuda": Backend(
            cuda_unsupported,
            "cuda_ops.block_causal_attention.launch_block_causal_attention_forward",
            "cuda_ops.block_causal_attention.launch_block_causal_attention_backward",
        ),
        "flex": Backend(
            flex_unsupported,
            "library_ops.flex.launch_block_causal_attention_forward",
            "library_ops.flex.refuse_backward",
        ),
        "cpu": Backend(
            cpu_unsupported,
            "cpu_ops.block_causal_attention.launch_block_causal_attention_forward",
            "cpu_ops.block_causal_attention.launch_block_causal_attention_backward",
        ),
        "reference": Backend(
            always,
            reference_block_causal_attention_forward,
            reference_block_causal_attention_backward,
        ),
    },
    backward="block_causal_attention_backward(Tensor grad_out_BLHD, Tensor q_BLHD, Tensor k_BLHD,"
    " Tensor v_BLHD, Tensor out_BLHD, Tensor lse_BHL, int[] scale_lengths, float softmax_scale,"
    " str backend) -> (Tensor, Tensor, Tensor)",
    backward_fake=lambda grad_out, *inputs: _like(*inputs[:3]),
)


def _after_qk_norm(name: str) -> Backend:
    """Attention of the queries and keys that the same backend's qk_norm makes.

    The backward pass normalises again instead of saving the normalised tensors.
    """
    attention, norm = block_causal_attention_op.backends[name], qk_norm_op.backends[name]

    def forward(*, q_BLHD, k_BLHD, scale_mul_1H11, **rest):
        q_BLHD, k_BLHD = norm.forward(q_BTHD=q_BLHD, k_BTHD=k_BLHD, scale_mul_1H11=scale_mul_1H11)
        return attention.forward(q_BLHD=q_BLHD, k_BLHD=k_BLHD, **rest)

    def backward(*, q_BLHD, k_BLHD, scale_mul_1H11, **rest):
        inputs = {"q_BTHD": q_BLHD, "k_BTHD": k_BLHD, "scale_mul_1H11": scale_mul_1H11}
        q_BLHD, k_BLHD = norm.forward(**inputs)
        dq_BLHD, dk_BLHD, dv_BLHD = attention.backward(q_BLHD=q_BLHD, k_BLHD=k_BLHD, **rest)
        dq_BLHD, dk_BLHD, dscale = norm.backward(grad_q_BTHD=dq_BLHD, grad_k_BTHD=dk_BLHD, **inputs)
        return dq_BLHD, dk_BLHD, dv_BLHD, dscale

    return Backend(attention.unsupported, forward, backward)


block_causal_attention_qk_norm_op = Op(
    "block_causal_attention_qk_norm(Tensor q_BLHD, Tensor k_BLHD, Tensor v_BLHD,"
    " Tensor scale_mul_1H11, int[] scale_lengths, float softmax_scale, str backend)"
    " -> (Tensor out_BLHD, Tensor lse_BHL)",
    title=OP,
    check=_check_normalised,
    request=_request,
    fake=_fake,
    launch=_launch,
    # No "flex": its gradient is torch's own, so qk_norm runs before it, outside the op.
    backends={
        "triton": Backend(
            triton_unsupported,
            "triton_ops.block_causal_attention.launch_block_causal_attention_forward",
            "triton_ops.block_causal_attention_backward"
            ".launch_block_causal_attention_qk_norm_backward",
        ),
        **{name: _after_qk_norm(name) for name in ("cuda", "cpu", "reference")},
    },
    backward="block_causal_attention_qk_norm_backward(Tensor grad_out_BLHD, Tensor q_BLHD,"
    " Tensor k_BLHD, Tensor v_BLHD, Tensor scale_mul_1H11, Tensor out_BLHD, Tensor lse_BHL,"
    " int[] scale_lengths, float softmax_scale, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    backward_fake=lambda grad_out, *inputs: _like(*inputs[:4]),
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
        softmax_scale: factor on the scores, at most 2^20 in magnitude; None is 1/sqrt(D), or 1
            with ``scale_mul_1H11``. Scores of 2^24 and more have no digits left for exp in
            float32; backends then differ.
    Returns:
        (B, L, H, D), a new contiguous tensor of q's dtype.
    Raises:
        ValueError: shapes, devices or layout disagree.  TypeError: dtype not listed.
        NotImplementedError: a second or a forward-mode derivative is wanted.
    Gradient: q, k, v; and scale_mul, none above log 100. It comes from probabilities that are
        computed again from a float32 logarithm of their sum: where scores are near S, each is off
        by a relative S * 2^-23 at most, 0.1 % at 2^13.
    """
    normalise = () if scale_mul_1H11 is None else (scale_mul_1H11,)
    # FlexAttention runs outside the ops, so the backend is resolved here.
    backend = block_causal_attention_op.resolve(backend, q_BLHD, k_BLHD, v_BLHD, *normalise)
    if not isinstance(layout, ScaleLayout):
        raise TypeError(f"{OP}: layout must be a ScaleLayout; got {type(layout).__name__}")
    if q_BLHD.shape[1] != layout.total:
        raise ValueError(
            f"{OP}: q_BLHD must have {counted(layout.total, 'token')} to match layout "
            f"{layout.tokens}; got {q_BLHD.shape[1]}"
        )
    softmax_scale = contract.softmax_scale(OP, softmax_scale)
    if softmax_scale is None:
        softmax_scale = 1.0 if normalise else contract.default_softmax_scale(q_BLHD)
    if backend == "flex":
        from variant_kernels.library_ops import flex

        if scale_mul_1H11 is not None:
            q_BLHD, k_BLHD = qk_norm(q_BLHD, k_BLHD, scale_mul_1H11)
        return flex.attend(q_BLHD, k_BLHD, v_BLHD, layout.tokens, softmax_scale)[0]
    op = block_causal_attention_qk_norm_op if normalise else block_causal_attention_op
    inputs = q_BLHD, k_BLHD, v_BLHD, *normalise
    return op.overload(*inputs, layout.tokens, softmax_scale, backend)[0]


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
        packed = torch.randn(
            batch, layout.total, 3, heads, head_dim, generator=generator, device="cpu"
        )
        q, k, v = packed.to(dtype).unbind(2)
        cases.append((q, k, v, layout))
    return cases
