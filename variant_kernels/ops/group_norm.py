"""Group normalisation of channels-last feature maps, with SiLU: ``group_norm_silu``.

Axes: B batch, Y X the feature map, C channels, G groups of channels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from variant_kernels.arguments import boolean, integer, real
from variant_kernels.dispatch.request import Request
from variant_kernels.dispatch.select import Backend
from variant_kernels.dispatch.support import always, cpu_unsupported, triton_unsupported
from variant_kernels.ops import contract
from variant_kernels.ops.registry import Op


def reference_group_norm_silu(
    *, x_BYXC: Tensor, weight_C: Tensor, bias_C: Tensor, num_groups: int, eps: float, silu: bool
) -> Tensor:
    """The definition in plain torch; float32 or wider inside."""
    wide = torch.promote_types(x_BYXC.dtype, torch.float32)
    x_BCYX = x_BYXC.to(wide).permute(0, 3, 1, 2)
    y_BCYX = F.group_norm(x_BCYX, num_groups, weight_C.to(wide), bias_C.to(wide), eps)
    y_BCYX = F.silu(y_BCYX) if silu else y_BCYX
    return y_BCYX.permute(0, 2, 3, 1).to(x_BYXC.dtype).contiguous()


def _check(x_BYXC: Tensor, weight_C: Tensor, bias_C: Tensor) -> None:
    op = "group_norm_silu"
    contract.check_float(op, "x_BYXC", x_BYXC)
    contract.check_ndim(op, "x_BYXC", x_BYXC, "(B, Y, X, C)")
    for name, tensor in (("weight_C", weight_C), ("bias_C", bias_C)):
        contract.check_float(op, name, tensor)
        contract.check_shape(op, name, tensor, (x_BYXC.shape[3],), "for x_BYXC's channels")
        contract.check_same(op, name, tensor, "x_BYXC", x_BYXC)


group_norm_silu_op = Op(
    "group_norm_silu(Tensor x_BYXC, Tensor weight_C, Tensor bias_C, int num_groups, float eps,"
    " bool silu, str backend) -> Tensor",
    check=_check,
    request=lambda x, *_: Request(x.device.type, (x.dtype,)),
    fake=lambda x, *_: x.new_empty(x.shape),
    backends={
        "triton": Backend(triton_unsupported, "triton_ops.group_norm.launch_group_norm_silu"),
        "cpu": Backend(cpu_unsupported, "cpu_ops.group_norm.launch_group_norm_silu"),
        "reference": Backend(always, reference_group_norm_silu),
    },
)


def group_norm_silu(
    x_BYXC: Tensor,
    weight_C: Tensor,
    bias_C: Tensor,
    num_groups: int,
    *,
    eps: float = 1e-6,
    silu: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Normalise groups of channels over the whole feature map, then SiLU; channels stay last.

        n = (x - mean) / sqrt(var + eps) * weight + bias,   y = n / (1 + exp(-n))

    mean and var (biased) are those of an image's C / G neighbouring channels over Y and X; float32.
    Source: group normalisation (arXiv 1803.08494). Two passes over the map, where torch's CUDA
    kernel copies it to another layout and back besides.

    Args:
        x_BYXC: float32, float16 or bfloat16; last axis contiguous.
        weight_C, bias_C: of its dtype and device.
        num_groups: G, a divisor of C.
        eps: added to the variance, in [0, 1].
        silu: False leaves the activation out: y = n.
    Returns:
        y_BYXC, a new contiguous tensor of x's dtype.
    Raises:
        ValueError: shapes or devices disagree, or C is no multiple of G.  TypeError: dtype not
            listed.  NotImplementedError: a derivative is wanted.
    """
    op = "group_norm_silu"
    num_groups = integer(op, "num_groups", num_groups, 1)
    eps, silu = real(op, "eps", eps, 0.0, 1.0), boolean(op, "silu", silu)
    if isinstance(x_BYXC, Tensor) and x_BYXC.ndim and x_BYXC.shape[-1] % num_groups:
        raise ValueError(
            f"{op}: num_groups must divide the {x_BYXC.shape[-1]} channels of x_BYXC; "
            f"got {num_groups}"
        )
    return group_norm_silu_op(x_BYXC, weight_C, bias_C, num_groups, eps, silu, backend)


def sample_inputs(
    dtype: torch.dtype, generator: torch.Generator
) -> list[tuple[Tensor, Tensor, Tensor, int]]:
    """x, weight, bias, groups: groups of 1 to 20 channels; a far mean; a strided view."""
    cases = []
    for batch, height, width, channels, groups in (
        (1, 1, 1, 4, 2),
        (2, 3, 5, 12, 4),
        (2, 8, 8, 160, 32),
        (1, 16, 17, 100, 5),
        (3, 2, 2, 7, 7),
    ):
        x = torch.randn(batch, height, width, channels, generator=generator, device="cpu")
        x = x * torch.rand(channels, generator=generator, device="cpu") + 3
        weight, bias = torch.randn(2, channels, generator=generator, device="cpu")
        cases.append((x.to(dtype), weight.to(dtype), bias.to(dtype), groups))
    x, weight, bias, groups = cases[2]
    return [*cases, (x[:, 1:, ::2], weight, bias, groups)]
