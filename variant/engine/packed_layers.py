"""Linear layers and convolutions of the engine: weights are cast once and packed once.

Given plain weights, a torch operator reorders them into the blocked layout of the matrix library at
every call, and for float32 on a CPU it uses another library. oneDNN's own operators take weights
that are packed already, and fuse a GELU into the product. On two Zen 4 cores, 512 tokens by 1024 x
4096: 206 GFLOP/s with the GELU against 132 without it in float32; with 2 tokens, where the time to
read the weights decides, 90 against 16 (bfloat16: 146 against 59).

Packed weights are a second copy of the model: ``can_pack`` returns whether they are used,
and ``Engine(pack=False)`` turns them off.

Axes: R tokens of all sequences, I inputs, O outputs, C channels, H W a feature map.
"""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from variant.models.parts import is_plain
from variant.models.vqvae import VQVAE, ResidualBlock, Upsample, unit_range
from variant_kernels.dispatch.request import Request
from variant_kernels.dispatch.select import choose_name
from variant_kernels.ops.group_norm import group_norm_silu, group_norm_silu_op
from variant_kernels.packed_linear import pack, packed_linear


@cache
def fused_gelu(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's fused product and GELU computes the tanh form on this device.

    cuBLASLt's epilogue does; torch's fallback elsewhere may compute the exact form, and neither is
    documented. So one product is tried, at inputs where the two differ by 5e-4 and more.
    """
    return device.type == "cuda" and computes_tanh(device, dtype)


def computes_tanh(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's fused product and GELU is nearer to the tanh form than to the exact one."""
    x = torch.linspace(-3, 3, 64, device=device).to(dtype).view(64, 1).repeat(1, 16)
    weight, zero = torch.eye(16, device=device, dtype=dtype), torch.zeros(16, device=device)
    activated = torch.ops.aten._addmm_activation(
        zero.to(dtype), x, weight.t(), use_gelu=True
    ).double()
    tanh, exact = (
        (F.gelu(x.double(), approximate=form) - activated).abs().mean() for form in ("tanh", "none")
    )
    return bool(tanh < exact)


class CastBuffer:
    """One buffer into which every weight is cast before it is packed.

    Separate casts would be freed between packed weights that stay, and leave holes in the heap:
    320 MiB of them after packing VAR-d16 in bfloat16.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._buffer = torch.empty(0, dtype=dtype, device="cpu")

    def __call__(self, weight: Tensor) -> Tensor:
        """``weight`` in the dtype: itself, or the buffer, which the next call overwrites."""
        weight = weight.detach()
        if weight.dtype == self.dtype:
            return weight
        if self._buffer.numel() < weight.numel():
            self._buffer = weight.new_empty(weight.numel(), dtype=self.dtype)
        return self._buffer[: weight.numel()].view(weight.shape).copy_(weight)


class Linear:
    """``x @ weight.T + bias``, then a tanh-approximated GELU if ``gelu``.

    Args:
        weight_OI, bias_O: any floating dtype; shared, not copied, where they have ``dtype``.
        dtype: of the product and of x.
        packed: keep the weight in oneDNN's blocked layout.
        cast_buffer: receives the cast of a weight that is packed; None allocates a buffer for it.
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
        cast_buffer: CastBuffer | None = None,
    ) -> None:
        self._bias_O = bias_O.detach().to(dtype)
        self._packed, self._gelu = packed, gelu
        self._epilogue = gelu and fused_gelu(weight_OI.device, dtype)
        if packed:
            self._weight_OI = pack((cast_buffer or CastBuffer(dtype))(weight_OI))
        else:
            self._weight_OI = weight_OI.detach().to(dtype)

    @property
    def num_bytes(self) -> int:
        """Bytes of the weight."""
        return self._weight_OI.numel() * self._weight_OI.itemsize

    def shares(self, weight_OI: Tensor) -> bool:
        """Whether the weight is this tensor, not a packed, cast or merged copy of it."""
        return not self._packed and self._weight_OI.data_ptr() == weight_OI.data_ptr()

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
    """A convolution with a packed weight; input and output are channels last."""

    def __init__(self, conv: nn.Conv2d, cast_buffer: CastBuffer) -> None:
        super().__init__()
        padding = [int(p) for p in conv.padding]
        self.geometry = padding, list(conv.stride), list(conv.dilation), conv.groups
        self.bias = None
        if conv.bias is not None:  # oneDNN does not look at its stride
            self.bias = conv.bias.detach().to(cast_buffer.dtype).contiguous()
        self.packed = torch.ops.mkldnn._reorder_convolution_weight(
            cast_buffer(conv.weight), *self.geometry, None
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
    """:class:`variant.models.vqvae.ResidualBlock`; overwrites x unless a shortcut copies it.

    Allocating a tensor of the last level costs as much time in page faults as its arithmetic.
    """

    def __init__(self, block: ResidualBlock, cast_buffer: CastBuffer) -> None:
        super().__init__()
        self.norm1, self.norm2 = (
            block.norm1.to(cast_buffer.dtype),
            block.norm2.to(cast_buffer.dtype),
        )
        self.conv1 = PackedConv2d(block.conv1, cast_buffer)
        self.conv2 = PackedConv2d(block.conv2, cast_buffer)
        self.nin_shortcut = _pack(block.nin_shortcut, cast_buffer)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x), inplace=True))
        return self.conv2.add_to(self.nin_shortcut(x), F.silu(self.norm2(h), inplace=True))


class PackedPointwise(nn.Module):
    """A 1x1 convolution computed as a linear layer over pixels.

    640 to 1920 channels at 16 x 16 in bfloat16: 2 ms, against 36 ms as a convolution.
    """

    def __init__(self, conv: nn.Conv2d, cast_buffer: CastBuffer) -> None:
        super().__init__()
        bias = conv.weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias
        weight_OI = conv.weight.flatten(1)
        self.linear = Linear(
            weight_OI, bias, cast_buffer.dtype, packed=True, cast_buffer=cast_buffer
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.linear(x_BCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class MergedUpsample(nn.Module):
    """Nearest-neighbour doubling and the 3x3 convolution after it, as one transposed convolution.

    Along one axis, output 2i reads input i - 1 once and input i twice; output 2i + 1 reads input i
    twice and i + 1 once. Weights of the same input are added in advance, which leaves 4 of 9
    products: a transposed convolution of stride 2, padding 1 and a 4x4 kernel M w M^T.
    """

    # Row u: the taps of the 3x3 kernel, along one axis, whose sum is tap u of the 4x4 kernel.
    TAPS = ((0.0, 0.0, 1.0), (0.0, 1.0, 1.0), (1.0, 1.0, 0.0), (1.0, 0.0, 0.0))

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype) -> None:
        super().__init__()
        taps = torch.tensor(self.TAPS, dtype=torch.float32, device=conv.weight.device)
        # Summed in float32, rounded once.
        merged = torch.einsum("up,vq,oipq->iouv", taps, taps, conv.weight.detach().float())
        self.weight = merged.to(dtype).to(memory_format=torch.channels_last)
        self.bias = None if conv.bias is None else conv.bias.detach().to(dtype)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, 2H, 2W)."""
        return F.conv_transpose2d(x_BCHW, self.weight, self.bias, stride=2, padding=1)


def _copied_decoder(vae: VQVAE) -> nn.Module:
    """Copies of the decoder's modules, in which some are replaced; they share its tensors.

    So each weight is cast, and packed, directly from the model.
    """
    layers = nn.Sequential(vae.post_quant_conv, vae.decoder)
    # Among the members are weights that a hook computes of others (pruning, older weight norm).
    members = (value for module in layers.modules() for value in vars(module).values())
    tensors = (*layers.parameters(), *(value for value in members if isinstance(value, Tensor)))
    return deepcopy(layers, {id(tensor): tensor.detach() for tensor in tensors})


class PackedDecoder:
    """The VQ-VAE's decoder with packed convolutions, channels last, in ``dtype``.

    Images are decoded one at a time: larger batches exceed the processor's cache and are not faster
    (160 channels at 256 x 256 in bfloat16: 455 GFLOP/s for one image, 403 for four).
    """

    def __init__(self, vae: VQVAE, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.layers = _pack(_copied_decoder(vae), CastBuffer(dtype)).requires_grad_(False).eval()

    @torch.no_grad()
    def __call__(self, f_hat_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) float32 to images (B, I, Y, X) float32 in [0, 1]."""
        images = []
        for one_CHW in f_hat_BCHW.unbind(0):
            x = one_CHW.unsqueeze(0).to(self.dtype, memory_format=torch.channels_last)
            images.append(unit_range(self.layers(x).float()).contiguous())
        return torch.cat(images)


class ChannelsLastNorm(nn.Module):
    """A group norm, and SiLU where ``silu``, of a feature map whose channels stay last.

    torch's CUDA kernel makes its input and its result contiguous in the other order: two copies of
    the feature map beside each norm.
    """

    def __init__(self, norm: nn.GroupNorm, *, silu: bool) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias
        self.num_groups, self.eps, self.silu = norm.num_groups, norm.eps, silu

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BHWC = x_BCHW.permute(0, 2, 3, 1).contiguous()
        y_BHWC = group_norm_silu(
            x_BHWC, self.weight, self.bias, self.num_groups, eps=self.eps, silu=self.silu
        )
        return y_BHWC.permute(0, 3, 1, 2)


class ChannelsLastBlock(nn.Module):
    """:class:`variant.models.vqvae.ResidualBlock` with :class:`ChannelsLastNorm`."""

    def __init__(self, block: ResidualBlock) -> None:
        super().__init__()
        self.norm1 = ChannelsLastNorm(block.norm1, silu=True)
        self.norm2 = ChannelsLastNorm(block.norm2, silu=True)
        self.conv1, self.conv2, self.nin_shortcut = block.conv1, block.conv2, block.nin_shortcut

    def forward(self, x: Tensor) -> Tensor:
        return self.nin_shortcut(x) + self.conv2(self.norm2(self.conv1(self.norm1(x))))


def keeps_channels_last(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a kernel of ours serves the norms; without one, torch's own norm is used."""
    request = Request(device.type, (dtype,))
    name = choose_name("group_norm_silu", group_norm_silu_op.backends, "auto", request)
    return name == "triton"


def with_channels_last_norms(module: nn.Module) -> nn.Module:
    """``module`` with every group norm below it replaced, in place."""
    if _is_own_block(module):
        return ChannelsLastBlock(cast("ResidualBlock", module))
    if is_plain(module, nn.GroupNorm):
        return ChannelsLastNorm(cast("nn.GroupNorm", module), silu=False)
    for name, child in module.named_children():
        setattr(module, name, with_channels_last_norms(child))
    return module


class CastDecoder:
    """A copy of the VQ-VAE's decoder in ``dtype``, channels last, for convolutions on a GPU."""

    def __init__(self, vae: VQVAE, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.layers = _copied_decoder(vae).to(dtype).requires_grad_(False).eval()
        for weight in self.layers.parameters():
            if weight.ndim == 4:
                weight.data = weight.to(memory_format=torch.channels_last)
        if keeps_channels_last(vae.post_quant_conv.weight.device, dtype):
            self.layers = with_channels_last_norms(self.layers)

    @torch.no_grad()
    def __call__(self, f_hat_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) float32 to images (B, I, Y, X) float32 in [0, 1]."""
        x = f_hat_BCHW.to(self.dtype, memory_format=torch.channels_last)
        return unit_range(self.layers(x).float()).contiguous()


def _pack(module: nn.Module, cast_buffer: CastBuffer) -> nn.Module:
    """``module`` with every layer below it in the buffer's dtype, convolutions packed.

    A layer of another kind in the place of one of ours keeps its own forward.
    """
    if is_plain(module, Upsample) and _is_own_conv(module._modules.get("conv"), kernel=3):
        return MergedUpsample(cast("nn.Conv2d", module.conv), cast_buffer.dtype)
    if _is_own_block(module):
        return PackedResidualBlock(cast("ResidualBlock", module), cast_buffer)
    if _is_own_conv(module):
        conv = cast("nn.Conv2d", module)
        pointwise = conv.kernel_size == conv.stride == (1, 1)
        pointwise = pointwise and conv.padding == (0, 0) and conv.groups == 1
        return PackedPointwise(conv, cast_buffer) if pointwise else PackedConv2d(conv, cast_buffer)
    for name, child in module.named_children():
        setattr(module, name, _pack(child, cast_buffer))
    return module.to(cast_buffer.dtype)


def _is_own_block(module: nn.Module) -> bool:
    """Whether it is a residual block whose parts are those that it was built with."""
    if not is_plain(module, ResidualBlock):
        return False
    parts = module._modules
    shortcut = parts.get("nin_shortcut")
    return (
        all(_is_kept(parts.get(name), nn.GroupNorm) for name in ("norm1", "norm2"))
        and all(_is_own_conv(parts.get(name)) for name in ("conv1", "conv2"))
        and (_is_kept(shortcut, nn.Identity) or _is_own_conv(shortcut))
    )


def _is_kept(module: nn.Module | None, kind: type[nn.Module]) -> bool:
    return module is not None and is_plain(module, kind)


def _is_own_conv(module: nn.Module | None, kernel: int | None = None) -> bool:
    """Whether it is a convolution of torch's with zeros as padding.

    Args:
        kernel: also of this size, which keeps the feature map's.
    """
    if not _is_kept(module, nn.Conv2d):
        return False
    conv = cast("nn.Conv2d", module)
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return False
    if kernel is None:
        return True
    kept = conv.stride == conv.dilation == (1, 1) and conv.padding == (kernel // 2, kernel // 2)
    return kept and conv.kernel_size == (kernel, kernel) and conv.groups == 1
