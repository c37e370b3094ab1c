"""Linear layers and convolutions as the engine runs them: weights cast once and packed once.

A torch operator that gets plain weights brings them into the matrix library's blocked order at
every call, and for float32 on a CPU takes another library altogether. oneDNN's own operators take
weights that were packed beforehand and a GELU that runs while the product is in registers. On two
Zen 4 cores, 512 rows by 1024 x 4096: 206 GFLOP/s with the GELU against 132 without it in float32;
with 2 rows, where only the weights count, 90 against 16 (bfloat16: 146 against 59).

Packed weights are a second copy: ``can_pack`` says where they are used, and the engine's
``pack`` turns them off.

Axes: R rows, I inputs, O outputs, C channels, H W a feature map.
"""

from __future__ import annotations

from copy import deepcopy
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from variant.models.vqvae import VQVAE, ResidualBlock, Upsample, unit_range
from variant_kernels.packed_linear import pack, packed_linear


@cache
def fused_gelu(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's product with a GELU behind it has the tanh form on this device.

    cuBLASLt's epilogue has; torch's stand-in elsewhere may have the exact form, and neither is
    documented. So it is looked at once, where the two differ by 5e-4 and more.
    """
    if device.type != "cuda":
        return False
    x = torch.linspace(-3, 3, 64, device=device).to(dtype).view(64, 1).repeat(1, 16)
    weight, zero = torch.eye(16, device=device, dtype=dtype), torch.zeros(16, device=device)
    found = torch.ops.aten._addmm_activation(zero.to(dtype), x, weight.t(), use_gelu=True).double()
    tanh, exact = (
        (F.gelu(x.double(), approximate=form) - found).abs().mean() for form in ("tanh", "none")
    )
    return bool(tanh < exact)


class Staging:
    """Where weights are cast on their way to being packed: one place for all of them.

    A cast of its own for each would be freed between packed weights that stay, and the allocator
    keeps such holes: 320 MiB of them after packing VAR-d16 in bfloat16.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._room = torch.empty(0, dtype=dtype)

    def __call__(self, weight: Tensor) -> Tensor:
        """``weight`` in the dtype; itself if it has it, else overwritten by the next call."""
        weight = weight.detach()
        if weight.dtype == self.dtype:
            return weight
        if self._room.numel() < weight.numel():
            self._room = weight.new_empty(weight.numel(), dtype=self.dtype)
        return self._room[: weight.numel()].view(weight.shape).copy_(weight)


class Linear:
    """``x @ weight.T + bias``, then a tanh-approximated GELU if asked.

    Args:
        weight_OI, bias_O: any floating dtype; shared, not copied, where they have ``dtype``.
        dtype: of the product; x must have it.
        packed: keep the weight in oneDNN's order.
        staging: where to cast a weight that is packed; None makes room for it alone.
        gelu: apply the activation.
    """

    def __init__(
        self,
        weight_OI: Tensor,
        bias_O: Tensor,
        dtype: torch.dtype,
        *,
        packed: bool,
        gelu: bool = False,
        staging: Staging | None = None,
    ) -> None:
        self._bias_O = bias_O.detach().to(dtype)
        self._packed, self._gelu = packed, gelu
        self._epilogue = gelu and fused_gelu(weight_OI.device, dtype)
        if packed:
            self._weight_OI = pack((staging or Staging(dtype))(weight_OI))
        else:
            self._weight_OI = weight_OI.detach().to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """(..., I) to (..., O), a new tensor."""
        if self._packed:
            return packed_linear(x, self._weight_OI, self._bias_O, gelu=self._gelu)
        if self._epilogue:
            y_RO = torch.ops.aten._addmm_activation(
                self._bias_O, x.flatten(0, -2), self._weight_OI.t(), use_gelu=True
            )
            return y_RO.view(*x.shape[:-1], -1)
        y = F.linear(x, self._weight_OI, self._bias_O)
        return F.gelu(y, approximate="tanh") if self._gelu else y


class PackedConv2d(nn.Module):
    """A convolution with a packed weight; channels last in, channels last out."""

    def __init__(self, conv: nn.Conv2d, staging: Staging) -> None:
        super().__init__()
        padding = [int(p) for p in conv.padding]
        self.geometry = padding, list(conv.stride), list(conv.dilation), conv.groups
        self.bias = None if conv.bias is None else conv.bias.detach().to(staging.dtype)
        self.packed = torch.ops.mkldnn._reorder_convolution_weight(
            staging(conv.weight), *self.geometry, None
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return torch.ops.mkldnn._convolution_pointwise(
            x_BCHW, self.packed, self.bias, *self.geometry, "none", [], ""
        )

    def add_to(self, sum_BCHW: Tensor, x_BCHW: Tensor) -> Tensor:
        """Adds the convolution of x to ``sum_BCHW`` in place and returns it."""
        return torch.ops.mkldnn._convolution_pointwise_.binary(
            sum_BCHW, x_BCHW, self.packed, self.bias, *self.geometry, "add", 1.0, None, [], None
        )


class PackedResidualBlock(nn.Module):
    """:class:`variant.vqvae.ResidualBlock` in place: x is overwritten where no shortcut copies it.

    A fresh tensor of the last level costs as much in page faults as in arithmetic.
    """

    def __init__(self, block: ResidualBlock, staging: Staging) -> None:
        super().__init__()
        self.norm1, self.norm2 = block.norm1.to(staging.dtype), block.norm2.to(staging.dtype)
        self.conv1 = PackedConv2d(block.conv1, staging)
        self.conv2 = PackedConv2d(block.conv2, staging)
        self.nin_shortcut = _pack(block.nin_shortcut, staging)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x), inplace=True))
        return self.conv2.add_to(self.nin_shortcut(x), F.silu(self.norm2(h), inplace=True))


class PackedPointwise(nn.Module):
    """A 1x1 convolution as a linear layer over pixels: 640 to 1920 channels at 16 x 16 in bfloat16
    takes 2 ms so, and 36 ms as a convolution."""

    def __init__(self, conv: nn.Conv2d, staging: Staging) -> None:
        super().__init__()
        bias = conv.weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias
        weight_OI = conv.weight.flatten(1)
        self.linear = Linear(weight_OI, bias, staging.dtype, packed=True, staging=staging)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.linear(x_BCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class MergedUpsample(nn.Module):
    """Nearest-neighbour doubling and the 3x3 convolution after it, as one transposed convolution.

    Output 2i sees input i - 1 once and input i twice, output 2i + 1 sees input i twice and i + 1
    once. Weights that meet the same input are added beforehand, which leaves 4 products of 9: a
    transposed convolution of stride 2, padding 1 and a 4x4 kernel M w M^T.
    """

    # Row u: which of the three taps, along one axis, the transposed kernel's tap u adds up.
    TAPS = ((0.0, 0.0, 1.0), (0.0, 1.0, 1.0), (1.0, 1.0, 0.0), (1.0, 0.0, 0.0))

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype) -> None:
        super().__init__()
        taps = torch.tensor(self.TAPS)
        # Summed in float32, rounded once.
        merged = torch.einsum("up,vq,oipq->iouv", taps, taps, conv.weight.detach().float())
        self.weight = merged.to(dtype).to(memory_format=torch.channels_last)
        self.bias = None if conv.bias is None else conv.bias.detach().to(dtype)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, 2H, 2W)."""
        return F.conv_transpose2d(x_BCHW, self.weight, self.bias, stride=2, padding=1)


class PackedDecoder:
    """The VQ-VAE's decoder with packed convolutions, channels last, in ``dtype``.

    Images are decoded one at a time: larger batches leave the cache and gain nothing (455 GFLOP/s
    for one image, 403 for four, 160 channels at 256 x 256 in bfloat16).
    """

    def __init__(self, vae: VQVAE, dtype: torch.dtype) -> None:
        self.dtype = dtype
        layers = nn.Sequential(vae.post_quant_conv, vae.decoder)
        # Swapped in a copy; the modules' own forward stays the definition. Weights are not copied:
        # each is cast and packed straight from the model.
        memo = {id(p): p.detach() for p in layers.parameters()}
        self.layers = _pack(deepcopy(layers, memo), Staging(dtype)).requires_grad_(False).eval()

    @torch.no_grad()
    def __call__(self, f_hat_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) float32 to images (B, I, Y, X) float32 in [0, 1]."""
        images = []
        for one_CHW in f_hat_BCHW.unbind(0):
            x = one_CHW.unsqueeze(0).to(self.dtype, memory_format=torch.channels_last)
            images.append(unit_range(self.layers(x).float()).contiguous())
        return torch.cat(images)


class CastDecoder:
    """A copy of the VQ-VAE's decoder in ``dtype``; channels last, as a GPU's convolutions want."""

    def __init__(self, vae: VQVAE, dtype: torch.dtype) -> None:
        self.dtype = dtype
        layers = deepcopy(nn.Sequential(vae.post_quant_conv, vae.decoder)).requires_grad_(False)
        self.layers = layers.to(dtype).eval()
        for weight in self.layers.parameters():
            if weight.ndim == 4:
                weight.data = weight.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def __call__(self, f_hat_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) float32 to images (B, I, Y, X) float32 in [0, 1]."""
        x = f_hat_BCHW.to(self.dtype, memory_format=torch.channels_last)
        return unit_range(self.layers(x).float()).contiguous()


def _pack(module: nn.Module, staging: Staging) -> nn.Module:
    """``module`` with every layer below it in the staging's dtype, convolutions packed."""
    if isinstance(module, Upsample):
        return MergedUpsample(module.conv, staging.dtype)
    if isinstance(module, ResidualBlock):
        return PackedResidualBlock(module, staging)
    if isinstance(module, nn.Conv2d):
        pointwise = module.kernel_size == module.stride == (1, 1)
        return PackedPointwise(module, staging) if pointwise else PackedConv2d(module, staging)
    for name, child in module.named_children():
        setattr(module, name, _pack(child, staging))
    return module.to(staging.dtype)
