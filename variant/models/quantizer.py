"""The multi-scale residual quantiser of VAR (arXiv 2404.02905, algorithms 1 and 2).

Axes: B images, K scales, N tokens of one scale, L tokens of all scales, V codebook entries,
C codebook width, H W feature map, R vectors (tokens of all images of a batch).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from variant.models.autocast import autocast_of, no_autocast
from variant.models.config import VQVAEConfig
from variant.models.initialised import initialised

Method = TypeVar("Method", bound=Callable[..., Any])


def _without_autocast(method: Method) -> Method:
    """Runs a method of the quantiser in the dtypes of its tensors, also inside autocast.

    As in the original: in 16 bits, near codes could not be told apart, and training, encoding and
    decoding would round the feature map in different ways.
    """

    @wraps(method)
    def inner(self: Any, *args: Any, **rest: Any) -> Any:
        with no_autocast(self.embedding.weight):
            return method(self, *args, **rest)

    return cast(Method, inner)


def residual_conv_of_scale(num_scales: int, num_convs: int) -> tuple[int, ...]:
    """The residual convolution of each scale: the one whose tick is nearest to k/(K-1).

    ``residual_conv_of_scale(10, 4)`` is (0, 0, 1, 1, 1, 2, 2, 3, 3, 3).
    """
    # Scales 2 and 7 of ten are halfway between two ticks. The rounding of exactly these float64
    # expressions decides which tick is nearer, and trained checkpoints depend on it.
    margin = 1 / 3 / num_convs if num_convs == 4 else 1 / 2 / num_convs
    ticks = np.linspace(margin, 1 - margin, num_convs)
    positions = [k / (num_scales - 1) if num_scales > 1 else 0.0 for k in range(num_scales)]
    return tuple(int(np.argmin(np.abs(ticks - position))) for position in positions)


class ResidualConv(nn.Conv2d):
    """``(1 - r) * h + r * conv3x3(h)``: smooths an upsampled token map. (B, C, H, W) kept."""

    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__(channels, channels, kernel_size=3, padding=1)
        initialised(self)
        self.ratio = ratio

    def forward(self, input: Tensor) -> Tensor:
        return input * (1 - self.ratio) + self._convolution(input) * self.ratio

    def _convolution(self, input: Tensor) -> Tensor:
        """The convolution; of float32 never in TF32 where no gradient is wanted.

        TF32 keeps 10 bits, and cuDNN takes it by default: the feature map, from which the next
        scale's tokens are drawn, would be another on a GPU than on a CPU. The argument of torch's
        operator is used, not ``torch.backends.cudnn.flags``, which sets it for all threads.
        """
        inside = autocast_of(input) is not None
        if input.dtype != torch.float32 or torch.is_grad_enabled() or inside or self._was_changed:
            return super().forward(input)
        cudnn = torch.backends.cudnn
        return torch.ops.aten._convolution(
            input,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            False,  # transposed
            (0, 0),  # output_padding
            self.groups,
            cudnn.benchmark,
            cudnn.deterministic or torch.are_deterministic_algorithms_enabled(),
            cudnn.enabled,
            False,  # allow_tf32
        )

    @property
    def _was_changed(self) -> bool:
        """Whether it pads otherwise than with zeros, as for images that repeat seamlessly."""
        padded = self.padding_mode != "zeros" or isinstance(self.padding, str)
        return padded or "_conv_forward" in vars(self)


class _SharedConv(nn.Module):
    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.qresi = conv

    def __getitem__(self, index: int) -> nn.Module:
        return self.qresi


class _PartlySharedConvs(nn.Module):
    def __init__(self, convs: list[nn.Module]) -> None:
        super().__init__()
        self.qresi_ls = nn.ModuleList(convs)

    def __getitem__(self, index: int) -> nn.Module:
        return self.qresi_ls[index]


class MultiScaleQuantizer(nn.Module):
    """Feature map to token maps and back, coarse to fine; each scale codes the remaining residual.

    The module and buffer names are those of the original VAR checkpoints.
    """

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.layout = config.layout
        num_scales = self.layout.num_scales
        num_convs = config.share_quant_resi or num_scales
        self._conv_of_scale = residual_conv_of_scale(num_scales, num_convs)

        def conv() -> nn.Module:
            if config.quant_resi == 0:
                return nn.Identity()
            return ResidualConv(config.z_channels, config.quant_resi)

        convs = [conv() for _ in range(num_convs)]
        self.quant_resi: nn.ModuleList | _SharedConv | _PartlySharedConvs
        if config.share_quant_resi == 0:
            self.quant_resi = nn.ModuleList(convs)
        elif config.share_quant_resi == 1:
            self.quant_resi = _SharedConv(convs[0])
        else:
            self.quant_resi = _PartlySharedConvs(convs)
        # Takes the residual (B, C, H, W), with its gradient to the features, the tokens (B, N) and
        # the scale in training, in place of the running mean below; set by what trains in several
        # parts or processes.
        self.on_scale: Callable[[Tensor, Tensor, int], None] | None = None
        # Running mean of the hits of each code per training step.
        self.register_buffer("ema_vocab_hit_SV", torch.zeros(num_scales, config.vocab_size))
        self.embedding = nn.Embedding(config.vocab_size, config.z_channels)
        nn.init.uniform_(self.embedding.weight, -1 / config.vocab_size, 1 / config.vocab_size)
        self.register_load_state_dict_pre_hook(self._keep_own_hits)

    @staticmethod
    def _keep_own_hits(
        module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object
    ) -> None:
        # A checkpoint of other scales still loads: only its usage statistics have another shape.
        key = prefix + "ema_vocab_hit_SV"
        own = module.get_buffer("ema_vocab_hit_SV")
        if key in state_dict and state_dict[key].shape != own.shape:
            state_dict[key] = own

    @_without_autocast
    def nearest(self, vectors_RC: Tensor) -> Tensor:
        """Index of the code nearest to each vector, (R,) int64."""
        codes_VC = self.embedding.weight.detach().to(vectors_RC.dtype)
        if self.config.using_znorm:
            unit_VC = F.normalize(codes_VC, dim=-1)
            return (F.normalize(vectors_RC, dim=-1) @ unit_VC.T).argmax(dim=1)
        # |r - c|^2, summed in the order of the original, so that near ties give the same code.
        distance_RV = vectors_RC.square().sum(dim=1, keepdim=True) + codes_VC.square().sum(dim=1)
        return distance_RV.addmm_(vectors_RC, codes_VC.T, alpha=-2).argmin(dim=1)

    def residual_vectors(self, rest_BCHW: Tensor, k: int) -> Tensor:
        """The residual of the feature map at the resolution of scale k, as vectors (R, C)."""
        if k != self.layout.num_scales - 1:
            rest_BCHW = F.interpolate(rest_BCHW, size=self.layout.shapes[k], mode="area")
        return rest_BCHW.permute(0, 2, 3, 1).reshape(-1, rest_BCHW.shape[1])

    def tokens_of_residual(self, rest_BCHW: Tensor, k: int) -> Tensor:
        """Scale k's tokens (B, N) for the residual of the feature map, (B, C, H, W)."""
        return self.nearest(self.residual_vectors(rest_BCHW, k)).view(rest_BCHW.shape[0], -1)

    def contribution(self, tokens_BN: Tensor, k: int) -> Tensor:
        """The term of scale k's tokens in the feature map, (B, C, H, W) in the weights' dtype."""
        return self.contribution_of_codes(self.embedding(tokens_BN), k)

    @_without_autocast
    def contribution_of_codes(self, h_BNC: Tensor, k: int) -> Tensor:
        """:meth:`contribution` of scale k's codes, or of mixtures of codes, (B, N, C)."""
        last = self.layout.num_scales - 1
        height, width = self.layout.shapes[k]
        h_BCHW = h_BNC.transpose(1, 2).reshape(-1, h_BNC.shape[2], height, width)
        if k != last:
            h_BCHW = F.interpolate(h_BCHW, size=self.layout.shapes[last], mode="bicubic")
        return self.quant_resi[self._conv_of_scale[k]](h_BCHW)

    def next_input(self, f_hat_BCHW: Tensor, k: int) -> Tensor:
        """The feature map at the resolution of scale k+1, as vectors (B, N, C)."""
        small = F.interpolate(f_hat_BCHW, size=self.layout.shapes[k + 1], mode="area")
        return small.flatten(2).transpose(1, 2)

    def encode(self, f_BCHW: Tensor) -> Tensor:
        """Tokens (B, L) int64 of a float32 feature map (B, C, H, W)."""
        rest_BCHW = f_BCHW.clone()
        tokens = []
        for k in range(self.layout.num_scales):
            tokens_BN = self.tokens_of_residual(rest_BCHW, k)
            rest_BCHW -= self.contribution(tokens_BN, k)
            tokens.append(tokens_BN)
        return torch.cat(tokens, dim=1)

    @_without_autocast
    def forward(
        self, f_BCHW: Tensor, num_scales: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Quantise for training.

        Args:
            f_BCHW: features, floating point.
            num_scales: number of first scales to use; None is all of them.
        Returns:
            f_hat (B, C, H, W) float32, with the straight-through gradient to f; the loss, the mean
            over scales of ``beta * |f - f_hat|^2`` (gradient to f) plus ``|f_hat - f|^2`` (gradient
            to the codes); and (K,) the fraction of the codebook in use at each scale.
        """
        f_BCHW = f_BCHW.float()
        target_BCHW = f_BCHW.detach()
        f_hat_BCHW = torch.zeros_like(target_BCHW)
        loss = target_BCHW.new_zeros(())
        num_scales = self.layout.num_scales if num_scales is None else num_scales
        for k in range(num_scales):
            rest_BCHW = f_BCHW - f_hat_BCHW.detach()
            tokens_BN = self.tokens_of_residual(rest_BCHW.detach(), k)
            if self.training and self.on_scale is not None:
                self.on_scale(rest_BCHW, tokens_BN, k)
            elif self.training:
                self._record_hits(tokens_BN, k)
            f_hat_BCHW = f_hat_BCHW + self.contribution(tokens_BN, k)
            loss = loss + self.config.beta * F.mse_loss(f_BCHW, f_hat_BCHW.detach())
            loss = loss + F.mse_loss(f_hat_BCHW, target_BCHW)
        resized_BCHW = self._through_scale(f_BCHW, num_scales - 1)
        straight_BCHW = f_hat_BCHW.detach() - resized_BCHW.detach() + resized_BCHW
        return straight_BCHW, loss / num_scales, self._usage(f_BCHW)

    def _through_scale(self, f_BCHW: Tensor, k: int) -> Tensor:
        """The features resized to scale k and back: the part that scale k can express."""
        last = self.layout.num_scales - 1
        if k == last:
            return f_BCHW
        small = F.interpolate(f_BCHW, size=self.layout.shapes[k], mode="area")
        return F.interpolate(small, size=self.layout.shapes[last], mode="bicubic")

    def _record_hits(self, tokens_BN: Tensor, k: int) -> None:
        self.update_mean_hits(tokens_BN.flatten().bincount(minlength=self.config.vocab_size), k)

    def update_mean_hits(self, hits_V: Tensor, k: int) -> None:
        """Add the hits of each code in one training step to the running mean of scale k."""
        hits_V = hits_V.float()
        mean_V = self.get_buffer("ema_vocab_hit_SV")[k]
        # All zero before the first step, whose hits then are the mean.
        mean_V.copy_(torch.where(mean_V.any(), mean_V.lerp(hits_V, 0.01), hits_V))

    def _usage(self, f_BCHW: Tensor) -> Tensor:
        batch, _, height, width = f_BCHW.shape
        # In use: at least 8 % of the hits that uniform use of the codebook would give.
        margin = batch * height * width / self.config.vocab_size * 0.08
        return (self.get_buffer("ema_vocab_hit_SV") >= margin).float().mean(dim=1)
