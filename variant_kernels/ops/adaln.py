"""Adaptive layer norm: ``adaln_modulate`` and ``gated_residual_adaln``.

Axes: B batch, T tokens, C width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from variant_kernels.arguments import real
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

# --- the definition -----------------------------------------------------------------------------


def _normalise(x_BTC: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    # float32 statistics (float64 for float64 input): bfloat16 keeps 8 significant bits.
    wide_BTC = x_BTC.to(torch.promote_types(x_BTC.dtype, torch.float32))
    variance_BT, mean_BT = torch.var_mean(wide_BTC, dim=-1, correction=0)
    rstd_BT = torch.rsqrt(variance_BT + eps)
    return (wide_BTC - mean_BT.unsqueeze(-1)) * rstd_BT.unsqueeze(-1), mean_BT, rstd_BT


def reference_adaln_forward(
    *, x_BTC: Tensor, scale_BC: Tensor, shift_BC: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    normed_BTC, mean_BT, rstd_BT = _normalise(x_BTC, eps)
    wide = normed_BTC.dtype
    y_BTC = normed_BTC * (1 + scale_BC.to(wide).unsqueeze(1)) + shift_BC.to(wide).unsqueeze(1)
    return y_BTC.to(scale_BC.dtype).contiguous(), mean_BT.contiguous(), rstd_BT.contiguous()


def _normalise_backward(
    grad_y_BTC: Tensor, x_BTC: Tensor, scale_BC: Tensor, mean_BT: Tensor, rstd_BT: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, scale and shift, in the wide dtype.

    With n = (x - mean) * rstd and g = grad_y * (1 + scale):
        grad_x = rstd * (g - mean_C(g) - n * mean_C(g * n))
    """
    wide = mean_BT.dtype
    grad_y_BTC = grad_y_BTC.to(wide)
    normed_BTC = (x_BTC.to(wide) - mean_BT.unsqueeze(-1)) * rstd_BT.unsqueeze(-1)
    grad_scale_BC = (grad_y_BTC * normed_BTC).sum(1)
    grad_shift_BC = grad_y_BTC.sum(1)
    g_BTC = grad_y_BTC * (1 + scale_BC.to(wide).unsqueeze(1))
    grad_x_BTC = g_BTC - g_BTC.mean(-1, keepdim=True)
    grad_x_BTC = grad_x_BTC - normed_BTC * (g_BTC * normed_BTC).mean(-1, keepdim=True)
    return grad_x_BTC * rstd_BT.unsqueeze(-1), grad_scale_BC, grad_shift_BC


def reference_adaln_backward(
    *, grad_y_BTC: Tensor, x_BTC: Tensor, scale_BC: Tensor, mean_BT: Tensor, rstd_BT: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x_BTC, grad_scale_BC, grad_shift_BC = _normalise_backward(
        grad_y_BTC, x_BTC, scale_BC, mean_BT, rstd_BT
    )
    narrow = scale_BC.dtype
    grad_x_BTC = grad_x_BTC.to(x_BTC.dtype).contiguous()
    return grad_x_BTC, grad_scale_BC.to(narrow), grad_shift_BC.to(narrow)


def reference_gated_adaln_forward(
    *,
    x_BTC: Tensor,
    y_BTC: Tensor,
    gate_BC: Tensor,
    scale_BC: Tensor,
    shift_BC: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(x_BTC.dtype, torch.float32)
    sum_BTC = x_BTC.to(wide) + gate_BC.to(wide).unsqueeze(1) * y_BTC.to(wide)
    x_out_BTC = sum_BTC.to(x_BTC.dtype).contiguous()
    h_BTC, mean_BT, rstd_BT = reference_adaln_forward(
        x_BTC=x_out_BTC, scale_BC=scale_BC, shift_BC=shift_BC, eps=eps
    )
    return x_out_BTC, h_BTC, mean_BT, rstd_BT


def reference_gated_adaln_backward(
    *,
    grad_x_out_BTC: Tensor,
    grad_h_BTC: Tensor,
    x_out_BTC: Tensor,
    y_BTC: Tensor,
    gate_BC: Tensor,
    scale_BC: Tensor,
    mean_BT: Tensor,
    rstd_BT: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad_sum_BTC, grad_scale_BC, grad_shift_BC = _normalise_backward(
        grad_h_BTC, x_out_BTC, scale_BC, mean_BT, rstd_BT
    )
    wide, narrow = grad_sum_BTC.dtype, y_BTC.dtype
    grad_sum_BTC = grad_sum_BTC + grad_x_out_BTC.to(wide)
    grad_gate_BC = (grad_sum_BTC * y_BTC.to(wide)).sum(1)
    grad_y_BTC = grad_sum_BTC * gate_BC.to(wide).unsqueeze(1)
    return (
        grad_sum_BTC.to(x_out_BTC.dtype).contiguous(),
        grad_y_BTC.to(narrow).contiguous(),
        grad_gate_BC.to(narrow),
        grad_scale_BC.to(narrow),
        grad_shift_BC.to(narrow),
    )


# --- the declarations ---------------------------------------------------------------------------


def _check(
    op: str, x_BTC: Tensor, modulation: dict[str, Tensor], narrow: tuple[str, Tensor]
) -> None:
    contract.check_float(op, "x_BTC", x_BTC)
    contract.check_ndim(op, "x_BTC", x_BTC, "(B, T, C)")
    name, like = narrow
    if x_BTC.dtype not in (like.dtype, torch.float32):
        raise TypeError(
            f"{op}: x_BTC must be float32 or have the dtype of {name} ({like.dtype}); "
            f"got {x_BTC.dtype}"
        )
    batch, _, width = x_BTC.shape
    reason = f"to match x_BTC {tuple(x_BTC.shape)}"
    for argument, vector_BC in modulation.items():
        contract.check_float(op, argument, vector_BC)
        contract.check_shape(op, argument, vector_BC, (batch, width), reason)
        contract.check_same(op, argument, vector_BC, name, like)
        contract.check_device(op, argument, vector_BC, "x_BTC", x_BTC)


def _check_adaln(x_BTC: Tensor, scale_BC: Tensor, shift_BC: Tensor) -> None:
    op = "adaln_modulate"
    contract.check_float(op, "scale_BC", scale_BC)
    modulation = {"scale_BC": scale_BC, "shift_BC": shift_BC}
    _check(op, x_BTC, modulation, ("scale_BC", scale_BC))


def _check_gated(
    x_BTC: Tensor, y_BTC: Tensor, gate_BC: Tensor, scale_BC: Tensor, shift_BC: Tensor
) -> None:
    op = "gated_residual_adaln"
    contract.check_float(op, "y_BTC", y_BTC)
    modulation = {"gate_BC": gate_BC, "scale_BC": scale_BC, "shift_BC": shift_BC}
    _check(op, x_BTC, modulation, ("y_BTC", y_BTC))
    contract.check_shape(op, "y_BTC", y_BTC, tuple(x_BTC.shape), "to match x_BTC")


def _request(x_BTC: Tensor, narrow: Tensor, *_: Tensor) -> Request:
    return Request(x_BTC.device.type, (x_BTC.dtype, narrow.dtype), row_width=x_BTC.shape[-1])


def _like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in tensors)


def _statistics_like(x_BTC: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x_BTC.dtype, torch.float32)
    mean_BT, rstd_BT = (x_BTC.new_empty(x_BTC.shape[:2], dtype=wide) for _ in range(2))
    return mean_BT, rstd_BT


adaln_op = Op(
    "adaln_modulate(Tensor x_BTC, Tensor scale_BC, Tensor shift_BC, float eps, str backend)"
    " -> (Tensor y_BTC, Tensor mean_BT, Tensor rstd_BT)",
    check=_check_adaln,
    request=_request,
    fake=lambda x, scale, *_: (x.new_empty(x.shape, dtype=scale.dtype), *_statistics_like(x)),
    backends={
        "triton": Backend(
            triton_unsupported,
            "triton_ops.adaln.launch_adaln_forward",
            "triton_ops.adaln.launch_adaln_backward",
        ),
        "cuda": Backend(
            cuda_unsupported,
            "cuda_ops.adaln.launch_adaln_forward",
            "cuda_ops.adaln.launch_adaln_backward",
        ),
        "cpu": Backend(
            cpu_unsupported,
            "cpu_ops.adaln.launch_adaln_forward",
            "cpu_ops.adaln.launch_adaln_backward",
        ),
        "reference": Backend(always, reference_adaln_forward, reference_adaln_backward),
    },
    backward="adaln_modulate_backward(Tensor grad_y_BTC, Tensor x_BTC, Tensor scale_BC,"
    " Tensor mean_BT, Tensor rstd_BT, str backend) -> (Tensor, Tensor, Tensor)",
    backward_fake=lambda grad_y, x, scale, *_: _like(x, scale, scale),
)

gated_op = Op(
    "gated_residual_adaln(Tensor x_BTC, Tensor y_BTC, Tensor gate_BC, Tensor scale_BC,"
    " Tensor shift_BC, float eps, str backend)"
    " -> (Tensor x_out_BTC, Tensor h_BTC, Tensor mean_BT, Tensor rstd_BT)",
    check=_check_gated,
    request=_request,
    fake=lambda x, y, *_: (*_like(x, y), *_statistics_like(x)),
    backends={
        "triton": Backend(
            triton_unsupported,
            "triton_ops.adaln.launch_gated_adaln_forward",
            "triton_ops.adaln.launch_gated_adaln_backward",
        ),
        "cuda": Backend(
            cuda_unsupported,
            "cuda_ops.adaln.launch_gated_adaln_forward",
            "cuda_ops.adaln.launch_gated_adaln_backward",
        ),
        "cpu": Backend(
            cpu_unsupported,
            "cpu_ops.adaln.launch_gated_adaln_forward",
            "cpu_ops.adaln.launch_gated_adaln_backward",
        ),
        "reference": Backend(always, reference_gated_adaln_forward, reference_gated_adaln_backward),
    },
    backward="gated_residual_adaln_backward(Tensor grad_x_out_BTC, Tensor grad_h_BTC,"
    " Tensor x_out_BTC, Tensor y_BTC, Tensor gate_BC, Tensor scale_BC, Tensor mean_BT,"
    " Tensor rstd_BT, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    backward_fake=lambda grad_x_out, grad_h, x, y, gate, *_: _like(x, y, gate, gate, gate),
)


# --- public functions ---------------------------------------------------------------------------


def adaln_modulate(
    x_BTC: Tensor,
    scale_BC: Tensor,
    shift_BC: Tensor,
    *,
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    """Normalise each token, then scale and shift it by its image's condition.

        y = (x - mean(x)) / sqrt(var(x) + eps) * (1 + scale) + shift

    var is the biased variance over C. Statistics are float32; where var exceeds its range (entries
    beyond 1e19) backends differ.
    Source: VAR (arXiv 2404.02905), adaptive layer norm.

    Args:
        x_BTC: tokens; float32, float16 or bfloat16; last axis contiguous. May be float32 while
            scale and shift have 16 bits: the residual stream of a 16-bit model.
        scale_BC, shift_BC: of one dtype, on x_BTC's device; rows may be strided.
        eps: added to the variance; same unit as x squared.
    Returns:
        y_BTC, a new tensor of scale_BC's dtype.
    Raises:
        ValueError: shapes or devices disagree.  TypeError: dtype not listed.
        NotImplementedError: a second or a forward-mode derivative is wanted.
    Gradient: x_BTC, scale_BC, shift_BC.
    """
    eps = real("adaln_modulate", "eps", eps, 0)
    return adaln_op(x_BTC, scale_BC, shift_BC, eps, backend)[0]


def gated_residual_adaln(
    x_BTC: Tensor,
    y_BTC: Tensor,
    gate_BC: Tensor,
    scale_BC: Tensor,
    shift_BC: Tensor,
    *,
    eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Add a gated branch to the residual stream and modulate the sum for the next branch.

        x' = x + gate * y
        h  = (x' - mean(x')) / sqrt(var(x') + eps) * (1 + scale) + shift

    Statistics are float32 and taken from x' as it is stored; where var exceeds the range of float32
    (entries beyond 1e19) backends differ. One pass over the tokens where the composition needs
    three. Source: VAR (arXiv 2404.02905), adaptive layer norm.

    Args:
        x_BTC: residual stream; float32, or y_BTC's dtype.
        y_BTC: output of the branch; float32, float16 or bfloat16; last axis contiguous.
        gate_BC, scale_BC, shift_BC: dtype and device of y_BTC; rows may be strided.
        eps: added to the variance; same unit as x squared.
    Returns:
        x'_BTC of x_BTC's dtype and h_BTC of y_BTC's dtype, new tensors.
    Raises:
        ValueError: shapes or devices disagree.  TypeError: dtype not listed.
        NotImplementedError: a second or a forward-mode derivative is wanted.
    Gradient: all five tensors.
    """
    eps = real("gated_residual_adaln", "eps", eps, 0)
    x_out_BTC, h_BTC, _, _ = gated_op(x_BTC, y_BTC, gate_BC, scale_BC, shift_BC, eps, backend)
    return x_out_BTC, h_BTC


def sample_inputs(dtype: torch.dtype, generator: torch.Generator) -> list[tuple[Tensor, ...]]:
    """Arguments of ``gated_residual_adaln`` (its first and last two: ``adaln_modulate``'s).

    The cases include one token, ragged widths, strided vectors, and a float32 residual stream with
    16-bit vectors.
    """
    cases = []
    for batch, tokens, width in ((1, 1, 8), (2, 5, 33), (3, 7, 64), (2, 16, 192), (1, 3, 1030)):
        for stream in dict.fromkeys((dtype, torch.float32)):
            x = torch.randn(batch, tokens + 2, width, generator=generator, device="cpu").to(stream)
            y = torch.randn(batch, tokens, width + 5, generator=generator, device="cpu").to(dtype)
            modulation = torch.randn(batch, 3, width, generator=generator, device="cpu").to(dtype)
            gate, scale, shift = (0.5 * modulation).unbind(1)
            cases.append((x[:, 1 : tokens + 1], y[..., :width], gate, scale, shift))
    # Dense but permuted: batch and tokens change places.
    x, y = (torch.randn(5, 3, 16, generator=generator, device="cpu").to(dtype) for _ in range(2))
    gate, scale, shift = (
        torch.randn(3, 3, 16, generator=generator, device="cpu").to(dtype).unbind(0)
    )
    cases.append((x.transpose(0, 1), y.transpose(0, 1), gate, scale, shift))
    return cases
