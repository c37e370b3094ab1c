"""L2 normalisation of queries and keys: ``qk_norm``.

Axes: B batch, T tokens, H heads, D width of one head, 1 broadcast.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from variant_kernels.dispatch.request import Request
from variant_kernels.dispatch.select import Backend
from variant_kernels.dispatch.support import (
    always,
    cpu_unsupported,
    cuda_unsupported,
    triton_unsupported,
)
from variant_kernels.ops import contract
from variant_kernels.ops.registry import Op

MAX_LOG_SCALE = math.log(100)
NORM_EPS = 1e-12


# --- the definition -----------------------------------------------------------------------------


def _unit(x_BTHD: Tensor) -> tuple[Tensor, Tensor]:
    """x / max(|x|, 1e-12) and 1 / max(|x|, 1e-12), in float32 or wider."""
    wide_BTHD = x_BTHD.to(torch.promote_types(x_BTHD.dtype, torch.float32))
    norm_BTH1 = torch.linalg.vector_norm(wide_BTHD, dim=-1, keepdim=True)
    inverse_BTH1 = 1 / norm_BTH1.clamp_min(NORM_EPS)
    return wide_BTHD * inverse_BTH1, inverse_BTH1


def _log_scale_11H1(scale_mul_1H11: Tensor, wide: torch.dtype) -> Tensor:
    return scale_mul_1H11.to(wide).transpose(1, 2)


def reference_qk_norm_forward(
    *, q_BTHD: Tensor, k_BTHD: Tensor, scale_mul_1H11: Tensor
) -> tuple[Tensor, Tensor]:
    unit_q_BTHD, _ = _unit(q_BTHD)
    unit_k_BTHD, _ = _unit(k_BTHD)
    scale_11H1 = _log_scale_11H1(scale_mul_1H11, unit_q_BTHD.dtype).clamp_max(MAX_LOG_SCALE).exp()
    q_out_BTHD = (unit_q_BTHD * scale_11H1).to(q_BTHD.dtype).contiguous()
    return q_out_BTHD, unit_k_BTHD.to(k_BTHD.dtype).contiguous()


def _unit_backward(grad_BTHD: Tensor, x_BTHD: Tensor) -> Tensor:
    """Gradient of x / max(|x|, eps): (g - n (g . n)) / |x|, and g / eps below eps."""
    unit_BTHD, inverse_BTH1 = _unit(x_BTHD)
    along_BTH1 = (grad_BTHD * unit_BTHD).sum(-1, keepdim=True)
    clamped_BTH1 = inverse_BTH1 >= 1 / NORM_EPS
    return inverse_BTH1 * (grad_BTHD - unit_BTHD * along_BTH1.masked_fill(clamped_BTH1, 0))


def reference_qk_norm_backward(
    *,
    grad_q_BTHD: Tensor,
    grad_k_BTHD: Tensor,
    q_BTHD: Tensor,
    k_BTHD: Tensor,
    scale_mul_1H11: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(q_BTHD.dtype, torch.float32)
    log_scale_11H1 = _log_scale_11H1(scale_mul_1H11, wide)
    scale_11H1 = log_scale_11H1.clamp_max(MAX_LOG_SCALE).exp()
    wide_grad_q_BTHD = grad_q_BTHD.to(wide)
    unit_q_BTHD, _ = _unit(q_BTHD)
    grad_scale_11H1 = (wide_grad_q_BTHD * unit_q_BTHD).sum((0, 1, 3)).view(1, 1, -1, 1)
    # The clamp passes gradient up to and including its bound, as torch.clamp_max does.
    grad_scale_11H1 = grad_scale_11H1 * scale_11H1 * (log_scale_11H1 <= MAX_LOG_SCALE)
    dq_BTHD = _unit_backward(wide_grad_q_BTHD * scale_11H1, q_BTHD)
    dk_BTHD = _unit_backward(grad_k_BTHD.to(wide), k_BTHD)
    return (
        dq_BTHD.to(q_BTHD.dtype).contiguous(),
        dk_BTHD.to(k_BTHD.dtype).contiguous(),
        grad_scale_11H1.transpose(1, 2).to(scale_mul_1H11.dtype).contiguous(),
    )


# --- the declaration ----------------------------------------------------------------------------


def _check(q_BTHD: Tensor, k_BTHD: Tensor, scale_mul_1H11: Tensor) -> None:
    op = "qk_norm"
    contract.check_float(op, "q_BTHD", q_BTHD)
    contract.check_float(op, "k_BTHD", k_BTHD)
    contract.check_ndim(op, "q_BTHD", q_BTHD, "(B, T, H, D)")
    contract.check_head_dim(op, "q_BTHD", q_BTHD.shape[-1])
    contract.check_shape(op, "k_BTHD", k_BTHD, tuple(q_BTHD.shape), "to match q_BTHD")
    contract.check_same(op, "k_BTHD", k_BTHD, "q_BTHD", q_BTHD)
    check_scale_mul(op, scale_mul_1H11, "q_BTHD", q_BTHD)


def check_scale_mul(op: str, scale_mul_1H11: Tensor, name: str, like_BTHD: Tensor) -> None:
    """One logarithm per head of ``name``, float32 or of its dtype."""
    contract.check_float(op, "scale_mul_1H11", scale_mul_1H11)
    heads = like_BTHD.shape[2]
    contract.check_shape(
        op, "scale_mul_1H11", scale_mul_1H11, (1, heads, 1, 1), f"for {name}'s heads"
    )
    if scale_mul_1H11.dtype not in (like_BTHD.dtype, torch.float32):
        raise TypeError(
            f"{op}: scale_mul_1H11 must be float32 or have the dtype of {name} "
            f"({like_BTHD.dtype}); got {scale_mul_1H11.dtype}"
        )
    contract.check_device(op, "scale_mul_1H11", scale_mul_1H11, name, like_BTHD)


def _like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in tensors)


qk_norm_op = Op(
    "qk_norm(Tensor q_BTHD, Tensor k_BTHD, Tensor scale_mul_1H11, str backend)"
    " -> (Tensor q_BTHD, Tensor k_BTHD)",
    check=_check,
    request=lambda q, k, scale: Request(q.device.type, (q.dtype, scale.dtype), q.shape[-1]),
    fake=lambda q, k, *_: _like(q, k),
    backends={
        "triton": Backend(
            triton_unsupported,
            "triton_ops.qk_norm.launch_qk_norm_forward",
            "triton_ops.qk_norm.launch_qk_norm_backward",
        ),
        "cuda": Backend(
            cuda_unsupported,
            "cuda_ops.qk_norm.launch_qk_norm_forward",
            "cuda_ops.qk_norm.launch_qk_norm_backward",
        ),
        "cpu": Backend(
            cpu_unsupported,
            "cpu_ops.qk_norm.launch_qk_norm_forward",
            "cpu_ops.qk_norm.launch_qk_norm_backward",
        ),
        "reference": Backend(always, reference_qk_norm_forward, reference_qk_norm_backward),
    },
    backward="qk_norm_backward(Tensor grad_q_BTHD, Tensor grad_k_BTHD, Tensor q_BTHD,"
    " Tensor k_BTHD, Tensor scale_mul_1H11, str backend) -> (Tensor, Tensor, Tensor)",
    backward_fake=lambda grad_q, grad_k, q, k, scale, *_: _like(q, k, scale),
)


# --- public function ----------------------------------------------------------------------------


def qk_norm(
    q_BTHD: Tensor, k_BTHD: Tensor, scale_mul_1H11: Tensor, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Unit-length queries and keys, queries times a learned scale per head.

        q' = q / max(|q|, 1e-12) * exp(min(scale_mul, log 100))
        k' = k / max(|k|, 1e-12)

    Norms are float32, over D. Attention then uses ``softmax_scale=1``.
    Source: VAR (arXiv 2404.02905), attention with L2 norm.

    Args:
        q_BTHD, k_BTHD: same shape, dtype and device; float32, float16 or bfloat16; strided views
            of a packed projection are taken as they are. D: a multiple of 8 from 16 to 256.
        scale_mul_1H11: logarithm of each head's scale, (1, H, 1, 1); float32 or q's dtype.
    Returns:
        q' and k', new contiguous (B, T, H, D) tensors of q's dtype.
    Raises:
        ValueError: shapes or devices disagree.  TypeError: dtype not listed.
        NotImplementedError: a second or a forward-mode derivative is wanted.
    Gradient: all three tensors; none through scale_mul above log 100.
    """
    return qk_norm_op(q_BTHD, k_BTHD, scale_mul_1H11, backend)


def sample_inputs(dtype: torch.dtype, generator: torch.Generator) -> list[tuple[Tensor, ...]]:
    """Packed projections, a vector of zeros, and scales on both sides of the clamp."""
    cases = []
    for batch, tokens, heads, head_dim in (
        (1, 1, 1, 16),
        (2, 5, 3, 24),
        (2, 9, 2, 64),
        (1, 3, 2, 256),
    ):
        packed = torch.randn(
            batch, tokens, 3, heads, head_dim, generator=generator, device="cpu"
        ).to(dtype)
        packed[0, 0, 0, 0] = 0
        scale_mul = torch.linspace(-1, 5, heads, device="cpu").view(1, heads, 1, 1)
        for scale in {dtype: scale_mul.to(dtype), torch.float32: scale_mul}.values():
            cases.append((packed[:, :, 0], packed[:, :, 1], scale))
    return cases
