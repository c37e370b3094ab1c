"""The VQ-VAE: images to multi-scale tokens and back.

Module names are those of the original VAR checkpoints, so their state dicts load strictly.
Axes: B images, I image channels, C codebook width, N tokens of one scale, L tokens of all scales;
H W is the feature map, Y X the image.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from variant.models.autocast import autocast_of
from variant.models.config import GROUPS, VQVAEConfig
from variant.models.initialised import conv2d
from variant.models.parts import explained, explains
from variant.models.quantizer import MultiScaleQuantizer
from variant_kernels.arguments import instance, integer
from variant_kernels.linear import has_values
from variant_kernels.ops.contract import check_tensor

# The halves of a VQ-VAE: a function that uses one may be called where the other was removed.
ENCODER, DECODER = ("encoder", "quant_conv"), ("decoder", "post_quant_conv")


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, channels, eps=1e-6)


def _conv3(channels_in: int, channels_out: int) -> nn.Conv2d:
    return conv2d(channels_in, channels_out, kernel_size=3, padding=1)


def unit_range(images: Tensor) -> Tensor:
    """Images clamped to [-1, 1] and mapped to [0, 1]."""
    return images.clamp(-1, 1).add(1).mul(0.5)


class ResidualBlock(nn.Module):
    """Twice norm, SiLU and 3x3 convolution, plus the identity (or a 1x1 convolution)."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.norm1 = _norm(channels_in)
        self.conv1 = _conv3(channels_in, channels_out)
        self.norm2 = _norm(channels_out)
        self.conv2 = _conv3(channels_out, channels_out)
        self.nin_shortcut: nn.Module = nn.Identity()
        if channels_in != channels_out:
            self.nin_shortcut = conv2d(channels_in, channels_out, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class SpatialAttention(nn.Module):
    """Self-attention with one head over all positions of the feature map, plus the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.qkv = conv2d(channels, 3 * channels, kernel_size=1)
        self.proj_out = conv2d(channels, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        qkv = self.qkv(self.norm(x)).view(batch, 3, channels, height * width)
        q, k, v = qkv.transpose(2, 3).unbind(1)
        weights = torch.softmax(q @ k.transpose(1, 2) * channels**-0.5, dim=2)
        h = (weights @ v).transpose(1, 2).reshape(batch, channels, height, width)
        return x + self.proj_out(h)


class Downsample(nn.Module):
    """Halves the resolution: stride 2, one row and column of zeros padded at the end."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv2d(channels, channels, kernel_size=3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles the resolution: nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _conv3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class _Middle(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels)
        self.attn_1 = SpatialAttention(channels)
        self.block_2 = ResidualBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class _Level(nn.Module):
    """The blocks of one resolution; at the lowest, attention follows each block."""

    downsample: Downsample  # in the encoder, not at the lowest resolution
    upsample: Upsample  # in the decoder, not at the highest resolution

    def __init__(
        self, channels_in: int, channels_out: int, num_blocks: int, *, attention: bool
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResidualBlock(channels_in if index == 0 else channels_out, channels_out)
            for index in range(num_blocks)
        )
        self.attn = nn.ModuleList(
            SpatialAttention(channels_out) for _ in range(num_blocks if attention else 0)
        )

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[index](x)
        return x


class Encoder(nn.Module):
    """Image (B, I, Y, X) to features (B, C, H, W)."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        lowest = len(config.ch_mult) - 1
        self.conv_in = _conv3(config.in_channels, config.ch)
        self.down = nn.ModuleList()
        channels = config.ch
        for index, multiple in enumerate(config.ch_mult):
            level = _Level(
                channels, config.ch * multiple, config.num_res_blocks, attention=index == lowest
            )
            channels = config.ch * multiple
            if index != lowest:
                level.downsample = Downsample(channels)
            self.down.append(level)
        self.mid = _Middle(channels)
        self.norm_out = _norm(channels)
        self.conv_out = _conv3(channels, config.z_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for index, level in enumerate(self.down):
            x = level(x)
            if index != len(self.down) - 1:
                x = cast("_Level", level).downsample(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Features (B, C, H, W) to image (B, I, Y, X)."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        lowest = len(config.ch_mult) - 1
        channels = config.ch * config.ch_mult[-1]
        self.conv_in = _conv3(config.z_channels, channels)
        self.mid = _Middle(channels)
        levels = []
        for index, multiple in reversed(list(enumerate(config.ch_mult))):
            level = _Level(
                channels, config.ch * multiple, config.num_res_blocks + 1, attention=index == lowest
            )
            channels = config.ch * multiple
            if index != 0:
                level.upsample = Upsample(channels)
            levels.append(level)
        self.up = nn.ModuleList(reversed(levels))  # numbered by resolution, as in the encoder
        self.norm_out = _norm(channels)
        self.conv_out = _conv3(channels, config.in_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for index in reversed(range(len(self.up))):
            x = self.up[index](x)
            if index != 0:
                x = cast("_Level", self.up[index]).upsample(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class VQVAE(nn.Module):
    """Images to multi-scale tokens and back (VAR, arXiv 2404.02905, section 3.2).

    Values of tokens and images are checked on the CPU only; on a GPU the check would synchronise.
    """

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        self.config = instance("VQVAE", "config", config, VQVAEConfig)
        self.layout = config.layout
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = MultiScaleQuantizer(config)
        kernel = config.quant_conv_ks
        width = config.z_channels
        self.quant_conv = conv2d(width, width, kernel, padding=kernel // 2)
        self.post_quant_conv = conv2d(width, width, kernel, padding=kernel // 2)

    @explains("VQVAE.features", *DECODER)
    def features(self, images_BIYX: Tensor) -> Tensor:
        """Features (B, C, H, W) before quantisation, of images (B, I, Y, X) in [-1, 1]."""
        return self.quant_conv(self.encoder(images_BIYX))

    @explains("VQVAE.encode", *DECODER)
    @torch.no_grad()
    def encode(self, images_BIYX: Tensor) -> Tensor:
        """Tokens (B, L) int64 of images (B, I, Y, X) in [-1, 1].

        Raises:
            ValueError: a wrong shape, or (on the CPU) values outside [-1, 1].
        """
        self._check_images("VQVAE.encode", images_BIYX)
        return self.quantize.encode(self.features(images_BIYX).float())

    @explains("VQVAE.teacher_input", *ENCODER)
    @torch.no_grad()
    def teacher_input(self, tokens_BL: Tensor) -> Tensor:
        """The transformer's input at every scale but the first, (B, L - N_0, C) float32.

        At scale k+1 it is the sum of the contributions of scales 0..k, at that scale's resolution.

        Raises:
            ValueError: tokens of a wrong shape, or (on CPU) outside [0, vocab_size).
        """
        self._check_tokens("VQVAE.teacher_input", tokens_BL)
        f_hat_BCHW = self.new_features(tokens_BL.shape[0])
        inputs = [f_hat_BCHW.new_zeros(tokens_BL.shape[0], 0, self.config.z_channels)]
        for k in range(self.layout.num_scales - 1):
            self.accumulate(f_hat_BCHW, tokens_BL[:, self.layout.slice(k)], k)
            inputs.append(self.next_scale_input(f_hat_BCHW, k))
        return torch.cat(inputs, dim=1)

    @explains("VQVAE.decode", *ENCODER)
    @torch.no_grad()
    def decode(self, tokens_BL: Tensor) -> Tensor:
        """Images (B, I, Y, X) float in [0, 1] of tokens (B, L), int64 or int32.

        Raises:
            ValueError: tokens of a wrong shape, or (on CPU) outside [0, vocab_size).
        """
        self._check_tokens("VQVAE.decode", tokens_BL)
        f_hat_BCHW = self.new_features(tokens_BL.shape[0])
        for k in range(self.layout.num_scales):
            self.accumulate(f_hat_BCHW, tokens_BL[:, self.layout.slice(k)], k)
        return self.decode_features(f_hat_BCHW)

    def decode_by_scale(self, tokens_BL: Tensor) -> Iterator[Tensor]:
        """:meth:`decode` from the first k scales of the tokens, for every k from 1.

        Raises:
            ValueError: as :meth:`decode`.
        """
        with explained("VQVAE.decode_by_scale", self, ENCODER):
            self._check_tokens("VQVAE.decode_by_scale", tokens_BL)
        return self._decoded_by_scale(tokens_BL)

    @torch.no_grad()
    def _decoded_by_scale(self, tokens_BL: Tensor) -> Iterator[Tensor]:
        f_hat_BCHW = None
        for k in range(self.layout.num_scales):
            with explained("VQVAE.decode_by_scale", self, ENCODER):
                if f_hat_BCHW is None:
                    f_hat_BCHW = self.new_features(tokens_BL.shape[0])
                self.accumulate(f_hat_BCHW, tokens_BL[:, self.layout.slice(k)], k)
                images = self.decode_features(f_hat_BCHW)
            yield images

    def new_features(self, batch: int) -> Tensor:
        """Zeros (B, C, H, W) float32 to accumulate on, on the device of the codebook."""
        height, width = self.layout.shapes[-1]
        return torch.zeros(
            batch,
            self.config.z_channels,
            height,
            width,
            dtype=torch.float32,  # whatever torch.set_default_dtype says
            device=self.quantize.embedding.weight.device,
        )

    @torch.no_grad()
    def accumulate(self, f_hat_BCHW: Tensor, tokens_BN: Tensor, k: int) -> Tensor:
        """Adds the term of scale k's tokens (B, N) to the float32 feature map, in place."""
        return f_hat_BCHW.add_(self.quantize.contribution(tokens_BN, k))

    @torch.no_grad()
    def accumulate_codes(self, f_hat_BCHW: Tensor, codes_BNC: Tensor, k: int) -> Tensor:
        """:meth:`accumulate` for scale k's codes, or mixtures of codes, (B, N, C)."""
        codes_BNC = codes_BNC.to(self.quantize.embedding.weight.dtype)
        return f_hat_BCHW.add_(self.quantize.contribution_of_codes(codes_BNC, k))

    @torch.no_grad()
    def next_scale_input(self, f_hat_BCHW: Tensor, k: int) -> Tensor:
        """The transformer's input at scale k+1 from the feature map, (B, N, C) float32."""
        return self.quantize.next_input(f_hat_BCHW, k)

    @explains("VQVAE.decode_features", *ENCODER)
    @torch.no_grad()
    def decode_features(self, f_hat_BCHW: Tensor) -> Tensor:
        """Images (B, I, Y, X) in [0, 1], in the weights' dtype."""
        f_hat_BCHW = f_hat_BCHW.to(self.post_quant_conv.weight.dtype)
        return unit_range(self.decoder(self.post_quant_conv(f_hat_BCHW)))

    @explains("VQVAE.forward")
    def forward(
        self, images_BIYX: Tensor, num_scales: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """For training: reconstruction (B, I, Y, X) in about [-1, 1], quantisation loss, usage.

        The quantiser has the straight-through gradient; usage is (K,), the fraction of the codebook
        in use at each scale. ``num_scales`` reconstructs from the first scales only.
        """
        self._check_images("VQVAE.forward", images_BIYX)
        if num_scales is not None:
            num_scales = integer(
                "VQVAE.forward", "num_scales", num_scales, 1, self.layout.num_scales
            )
        f_hat_BCHW, loss, usage = self.quantize(self.features(images_BIYX), num_scales)
        return self.decoder(self.post_quant_conv(f_hat_BCHW)), loss, usage

    def _check_images(self, op: str, images: Tensor) -> None:
        self._check_placement(op, "images", images, self.quant_conv.weight.device)
        size = self.config.image_size
        expected = (self.config.in_channels, size, size)
        if images.dim() != 4 or tuple(images.shape[1:]) != expected or not len(images):
            raise ValueError(
                f"{op}: images must be (B, {', '.join(map(str, expected))}) with B >= 1; "
                f"got {tuple(images.shape)}"
            )
        if not images.is_floating_point():
            raise ValueError(f"{op}: images must be floating point; got {images.dtype}")
        own = self.quant_conv.weight.dtype
        if images.dtype != own and autocast_of(images) is None:
            raise ValueError(
                f"{op}: images must have the dtype of the weights ({own}); got {images.dtype}. "
                "Cast them, or use torch.autocast"
            )
        # Values are checked where there are any to read without a wait: not on a GPU, in a graph or
        # of fake tensors. Written so that NaN fails too.
        if has_values(images) and not (images.abs().max() <= 1.001):
            raise ValueError(
                f"{op}: images must be in [-1, 1]; "
                f"got values from {float(images.min()):.4g} to {float(images.max()):.4g}"
            )

    def _check_placement(self, op: str, name: str, tensor: Tensor, own: torch.device) -> None:
        check_tensor(op, name, tensor)
        if tensor.device != own:
            raise ValueError(
                f"{op}: {name} must be on the device of the weights ({own}); got {tensor.device}"
            )

    def _check_tokens(self, op: str, tokens: Tensor) -> None:
        self._check_placement(op, "tokens", tokens, self.quantize.embedding.weight.device)
        if tokens.dim() != 2 or tokens.shape[1] != self.layout.total:
            raise ValueError(
                f"{op}: tokens must be (B, {self.layout.total}); got {tuple(tokens.shape)}"
            )
        if tokens.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"{op}: tokens must be int64 or int32; got {tokens.dtype}")
        vocab = self.config.vocab_size
        if has_values(tokens) and not (tokens.min() >= 0 and tokens.max() < vocab):
            raise ValueError(
                f"{op}: tokens must be in [0, {vocab}); "
                f"got values from {int(tokens.min())} to {int(tokens.max())}"
            )
