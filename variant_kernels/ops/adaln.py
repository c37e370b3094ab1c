"""Adaptive layer norm: ``adaln_modulate`` and ``gated_residual_adaln``.

Axes: B batch, T tokens, C width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from variant_kernels.dispatch.request import Request
from variant_kernels.dispatch.select import Impl, Lazy, choose, choose_backward
from variant_kernels.dispatch.support import cpu_unsupported, cuda_unsupported, triton_unsupported
from variant_kernels.ops import contract
from variant_kernels.ops.registry import differentiate, forbid_gradient, register
from variant_kernels.tensors import last_contiguous

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


# --- backends -----------------------------------------------------------------------------------

_CPU = "variant_kernels.cpu_ops.adaln"
_TRITON = "variant_kernels.triton_ops.adaln"
_CUDA = "variant_kernels.cuda_ops.adaln"

ADALN_IMPLS = {
    "reference": Impl(reference_adaln_forward, reference_adaln_backward),
    "cpu": Impl(
        Lazy(_CPU, "launch_adaln_forward"), Lazy(_CPU, "launch_adaln_backward"), cpu_unsupported
    ),
    "triton": Impl(
        Lazy(_TRITON, "launch_adaln_forward"),
        Lazy(_TRITON, "launch_adaln_backward"),
        triton_unsupported,
    ),
    "cuda": Impl(
        Lazy(_CUDA, "launch_adaln_forward"),
        Lazy(_CUDA, "launch_adaln_backward"),
        cuda_unsupported,
    ),
}

GATED_IMPLS = {
    "reference": Impl(reference_gated_adaln_forward, reference_gated_adaln_backward),
    "cpu": Impl(
        Lazy(_CPU, "launch_gated_adaln_forward"),
        Lazy(_CPU, "launch_gated_adaln_backward"),
        cpu_unsupported,
    ),
    "triton": Impl(
        Lazy(_TRITON, "launch_gated_adaln_forward"),
        Lazy(_TRITON, "launch_gated_adaln_backward"),
        triton_unsupported,
    ),
    "cuda": Impl(
        Lazy(_CUDA, "launch_gated_adaln_forward"),
        Lazy(_CUDA, "launch_gated_adaln_backward"),
        cuda_unsupported,
    ),
}

IMPLS = {"adaln_modulate": ADALN_IMPLS, "gated_residual_adaln": GATED_IMPLS}


def _request(make: Callable[..., Request], x: Tensor, narrow: Tensor) -> Request:
    batch, tokens, width = x.shape
    rows = batch * tokens
    return make(x.device.type, (x.dtype, narrow.dtype), None, width, None, None, rows)


def _choose(op: str, backend: str, x: Tensor, narrow: Tensor) -> Impl:
    return choose(op, IMPLS[op], backend, _request(contract.request, x, narrow))


def _choose_backward(op: str, backend: str, x: Tensor, narrow: Tensor) -> str:
    return choose_backward(op, IMPLS[op], backend, _request(Request, x, narrow))


# --- registration -------------------------------------------------------------------------------


def _adaln(x, scale, shift, eps, backend):
    impl = _choose("adaln_modulate", backend, x, scale)
    return impl.forward(x_BTC=x, scale_BC=scale, shift_BC=shift, eps=eps)


def _statistics_like(x):
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape[:2], dtype=wide), x.new_empty(x.shape[:2], dtype=wide)


def _adaln_fake(x, scale, shift, eps, backend):
    return x.new_empty(x.shape, dtype=scale.dtype), *_statistics_like(x)


def _adaln_backward(grad_y, x, scale, mean, rstd, backend):
    impl = _choose("adaln_modulate", backend, x, scale)
    return impl.backward(grad_y_BTC=grad_y, x_BTC=x, scale_BC=scale, mean_BT=mean, rstd_BT=rstd)


def _adaln_backward_fake(grad_y, x, scale, mean, rstd, backend):
    return x.new_empty(x.shape), scale.new_empty(scale.shape), scale.new_empty(scale.shape)


adaln_op = register(
    "adaln_modulate(Tensor x, Tensor scale, Tensor shift, float eps, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    implementation=_adaln,
    fake=_adaln_fake,
)
adaln_backward_op = register(
    "adaln_modulate_backward(Tensor grad_y, Tensor x, Tensor scale, Tensor mean, Tensor rstd,"
    " str backend) -> (Tensor, Tensor, Tensor)",
    implementation=_adaln_backward,
    fake=_adaln_backward_fake,
)


def _adaln_setup(ctx, inputs, output):
    x, scale, _, _, backend = inputs
    # The backward pass runs where the forward ran, whatever use_backend says by then.
    ctx.backend = _choose_backward("adaln_modulate", backend, x, scale)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, scale, output[1], output[2])


def _adaln_autograd(ctx, grad_y, grad_mean, grad_rstd):
    if grad_y is None:
        return None, None, None, None, None
    x, scale, mean, rstd = ctx.saved_tensors
    grads = adaln_backward_op(last_contiguous(grad_y), x, scale, mean, rstd, ctx.backend)
    return *grads, None, None


differentiate("adaln_modulate", setup_context=_adaln_setup, backward=_adaln_autograd)
forbid_gradient("adaln_modulate_backward")


def _gated(x, y, gate, scale, shift, eps, backend):
    impl = _choose("gated_residual_adaln", backend, x, y)
    return impl.forward(x_BTC=x, y_BTC=y, gate_BC=gate, scale_BC=scale, shift_BC=shift, eps=eps)


def _gated_fake(x, y, gate, scale, shift, eps, backend):
    return x.new_empty(x.shape), y.new_empty(y.shape), *_statistics_like(x)


def _gated_backward(grad_x_out, grad_h, x_out, y, gate, scale, mean, rstd, backend):
    impl = _choose("gated_residual_adaln", backend, x_out, y)
    return impl.backward(
        grad_x_out_BTC=grad_x_out,
        grad_h_BTC=grad_h,
        x_out_BTC=x_out,
        y_BTC=y,
        gate_BC=gate,
        scale_BC=scale,
        mean_BT=mean,
        rstd_BT=rstd,
    )


def _gated_backward_fake(grad_x_out, grad_h, x_out, y, gate, scale, mean, rstd, backend):
    rows = [gate.new_empty(gate.shape) for _ in range(3)]
    return x_out.new_empty(x_out.shape), y.new_empty(y.shape), *rows


gated_op = register(
    "gated_residual_adaln(Tensor x, Tensor y, Tensor gate, Tensor scale, Tensor shift, float eps,"
    " str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    implementation=_gated,
    fake=_gated_fake,
)
gated_backward_op = register(
    "gated_residual_adaln_backward(Tensor grad_x_out, Tensor grad_h, Tensor x_out, Tensor y,"
    " Tensor gate, Tensor scale, Tensor mean, Tensor rstd, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    implementation=_gated_backward,
    fake=_gated_backward_fake,
)


def _gated_setup(ctx, inputs, output):
    x, y, gate, scale, _, _, backend = inputs
    ctx.backend = _choose_backward("gated_residual_adaln", backend, x, y)
    x_out, _, mean, rstd = output
    ctx.save_for_backward(x_out, y, gate, scale, mean, rstd)


def _gated_autograd(ctx, grad_x_out, grad_h, grad_mean, grad_rstd):
    x_out, y, gate, scale, mean, rstd = ctx.saved_tensors
    grads = gated_backward_op(
        last_contiguous(grad_x_out),
        last_contiguous(grad_h),
        x_out,
        y,
        gate,
        scale,
        mean,
        rstd,
        ctx.backend,
    )
    return *grads, None, None


differentiate("gated_residual_adaln", setup_context=_gated_setup, backward=_gated_autograd)
forbid_gradient("gated_residual_adaln_backward")


# --- public functions ---------------------------------------------------------------------------


def _fits(x_BTC: Tensor, like: Tensor, rows: Sequence[Tensor], eps: float) -> bool:
    """Whether :func:`_check` has nothing to say."""
    if not contract.all_tensors(x_BTC, like, *rows):
        return False
    shape, dtype, device = x_BTC.shape, like.dtype, like.device
    if not (
        len(shape) == 3
        and 0 <= eps < float("inf")
        and dtype in contract.FLOAT_DTYPES
        and x_BTC.dtype in (torch.float32, dtype)
        and x_BTC.device == device
        and x_BTC.stride()[2] == like.stride()[-1] == 1
    ):
        return False
    rows_shape = (shape[0], shape[2])
    for row_BC in rows:
        if not (
            row_BC.shape == rows_shape
            and row_BC.dtype == dtype
            and row_BC.device == device
            and row_BC.stride()[1] == 1
        ):
            return False
    return True


def fits_adaln(x_BTC: Tensor, scale_BC: Tensor, shift_BC: Tensor, eps: float = 1e-6) -> bool:
    """Whether no check of :func:`adaln_modulate` has anything to say."""
    return _fits(x_BTC, scale_BC, (scale_BC, shift_BC), eps)


def fits_gated(
    x_BTC: Tensor,
    y_BTC: Tensor,
    gate_BC: Tensor,
    scale_BC: Tensor,
    shift_BC: Tensor,
    eps: float = 1e-6,
) -> bool:
    """Whether no check of :func:`gated_residual_adaln` has anything to say."""
    return _fits(x_BTC, y_BTC, (gate_BC, scale_BC, shift_BC), eps) and y_BTC.shape == x_BTC.shape


def _check(
    op: str, x_BTC: Tensor, rows: dict[str, Tensor], narrow: tuple[str, Tensor], eps: float
) -> None:
    contract.check_float(op, "x_BTC", x_BTC)
    contract.check_ndim(op, "x_BTC", x_BTC, "(B, T, C)")
    if not 0 <= eps < float("inf"):
        raise ValueError(f"{op}: eps must be >= 0 and finite; got {eps}")
    name, like = narrow
    if x_BTC.dtype not in (like.dtype, torch.float32):
        raise TypeError(
            f"{op}: x_BTC must be float32 or have the dtype of {name} ({like.dtype}); "
            f"got {x_BTC.dtype}"
        )
    batch, _, width = x_BTC.shape
    for row_name, row_BC in rows.items():
        contract.check_float(op, row_name, row_BC)
        contract.check_shape(
            op, row_name, row_BC, (batch, width), f"to match x_BTC {tuple(x_BTC.shape)}"
        )
        contract.check_same(op, row_name, row_BC, name, like)
        contract.check_device(op, row_name, row_BC, "x_BTC", x_BTC)


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

    var is the biased variance over C. Statistics are float32.
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
    Gradient: x_BTC, scale_BC, shift_BC.
    """
    op = "adaln_modulate"
    if not fits_adaln(x_BTC, scale_BC, shift_BC, eps):
        contract.check_float(op, "scale_BC", scale_BC)
        rows = {"scale_BC": scale_BC, "shift_BC": shift_BC}
        _check(op, x_BTC, rows, ("scale_BC", scale_BC), eps)
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

    Statistics are float32 and taken from x' as it is stored. One pass over the tokens where the
    composition needs three. Source: VAR (arXiv 2404.02905), adaptive layer norm.

    Args:
        x_BTC: residual stream; float32, or y_BTC's dtype.
        y_BTC: output of the branch; float32, float16 or bfloat16; last axis contiguous.
        gate_BC, scale_BC, shift_BC: dtype and device of y_BTC; rows may be strided.
        eps: added to the variance; same unit as x squared.
    Returns:
        x'_BTC of x_BTC's dtype and h_BTC of y_BTC's dtype, new tensors.
    Raises:
        ValueError: shapes or devices disagree.  TypeError: dtype not listed.
    Gradient: all five tensors.
    """
    op = "gated_residual_adaln"
    if not fits_gated(x_BTC, y_BTC, gate_BC, scale_BC, shift_BC, eps):
        rows = {"gate_BC": gate_BC, "scale_BC": scale_BC, "shift_BC": shift_BC}
        contract.check_float(op, "y_BTC", y_BTC)
        _check(op, x_BTC, rows, ("y_BTC", y_BTC), eps)
        contract.check_shape(op, "y_BTC", y_BTC, tuple(x_BTC.shape), "to match x_BTC")
    x_out_BTC, h_BTC, _, _ = gated_op(x_BTC, y_BTC, gate_BC, scale_BC, shift_BC, eps, backend)
    return x_out_BTC, h_BTC


def sample_inputs(dtype: torch.dtype, generator: torch.Generator) -> list[tuple[Tensor, ...]]:
    """Arguments of ``gated_residual_adaln`` (its first and last two: ``adaln_modulate``'s).

    One token, ragged widths, strided rows and a float32 stream beside 16-bit rows are among them.
    """
    cases = []
    for batch, tokens, width in ((1, 1, 8), (2, 5, 33), (3, 7, 64), (2, 16, 192), (1, 3, 1030)):
        for stream in {dtype, torch.float32}:
            x = torch.randn(batch, tokens + 2, width, generator=generator).to(stream)
            y = torch.randn(batch, tokens, width + 5, generator=generator).to(dtype)
            rows = torch.randn(batch, 3, width, generator=generator).to(dtype)
            gate, scale, shift = (0.5 * rows).unbind(1)
            cases.append((x[:, 1 : tokens + 1], y[..., :width], gate, scale, shift))
    # Dense but permuted: batch and tokens change places.
    x, y = (torch.randn(5, 3, 16, generator=generator).to(dtype) for _ in range(2))
    gate, scale, shift = torch.randn(3, 3, 16, generator=generator).to(dtype).unbind(0)
    cases.append((x.transpose(0, 1), y.transpose(0, 1), gate, scale, shift))
    return cases
