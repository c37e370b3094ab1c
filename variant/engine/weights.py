"""The weights of an engine: cast and packed once, shared with the model where no cast is needed.

Axes: B images, R sequences, T tokens, C width, H heads, L tokens of all scales, 6 the parts of a
modulation (gates, scales, shifts).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from variant.engine.packed_layers import CastBuffer, CastDecoder, Linear, PackedDecoder
from variant.models.var import VAR, Block, projection
from variant.models.vqvae import VQVAE

# Tokens per call of the MLP on a CPU, so that its hidden tensor stays in the cache (4096 tokens,
# 1024 x 4096 x 1024, bfloat16: 167 ms in parts of 512 tokens, 181 ms at once).
MLP_TOKENS = 512


class LayerWeights:
    """The weights of one block; its linear layers are callables."""

    def __init__(
        self, block: Block, dtype: torch.dtype, packed: bool, cast_buffer: CastBuffer
    ) -> None:
        attn, ffn = block.attn, block.ffn
        self.softmax_scale = attn.softmax_scale
        self.scale_mul_1H11 = attn.scale_mul_1H11.detach().float() if attn.attn_l2_norm else None
        self.qkv = Linear(
            attn.mat_qkv.weight, attn.qkv_bias(), dtype, packed=packed, cast_buffer=cast_buffer
        )
        self.proj = _linear(attn.proj, dtype, packed, cast_buffer)
        self.fc1 = _linear(ffn.fc1, dtype, packed, cast_buffer, gelu=True)
        self.fc2 = _linear(ffn.fc2, dtype, packed, cast_buffer)

    def mlp(self, h_RTC: Tensor) -> Tensor:
        """(R, T, C) to (R, T, C)."""
        h_NC = h_RTC.flatten(0, 1)
        if h_NC.device.type != "cpu" or len(h_NC) <= MLP_TOKENS:
            return self.fc2(self.fc1(h_RTC))
        y_NC = torch.empty_like(h_NC)
        for part_NC, h_PC in zip(y_NC.split(MLP_TOKENS), h_NC.split(MLP_TOKENS), strict=True):
            part_NC.copy_(self.fc2(self.fc1(h_PC)))
        return y_NC.view_as(h_RTC)


class EngineWeights:
    """All weights that the step loop reads; embeddings stay float32, as the residual stream.

    Args:
        var, vae: the models.
        dtype: of the matrix products.
        packed: keep packed copies; :func:`variant_kernels.packed_linear.can_pack` must be true.
    """

    def __init__(self, var: VAR, vae: VQVAE, dtype: torch.dtype, packed: bool) -> None:
        self.packed, self.dtype = packed, dtype
        cast_buffer = CastBuffer(dtype)
        self.layers = [
            LayerWeights(block, dtype, self.packed, cast_buffer) for block in var.layers()
        ]
        self.head = _linear(var.head, dtype, self.packed, cast_buffer)
        self.position_1LC = var.position_embedding().detach().float()
        self.pos_start = var.pos_start.detach().float()
        self.word_embed = _linear(var.word_embed, torch.float32, False, None)
        self.modulations = Modulations(var, dtype, self.packed, cast_buffer)
        self._vae = vae
        self._decoder: PackedDecoder | CastDecoder | None = None

    @torch.no_grad()
    def decode(self, f_hat_BCHW: Tensor) -> Tensor:
        """Images (B, I, Y, X) float32 in [0, 1]."""
        own = self._vae.post_quant_conv.weight
        cast = on_gpu(own) and self.dtype not in (own.dtype, torch.float32)
        if not self.packed and not cast:
            return self._vae.decode_features(f_hat_BCHW).float()
        if self._decoder is None:  # built at the first use: not every caller decodes
            kind = PackedDecoder if self.packed else CastDecoder
            self._decoder = kind(self._vae, self.dtype)
        return self._decoder(f_hat_BCHW)


class WeightsVersion:
    """Addresses and version counters of two models' weights; differs after any in-place change.

    Walking over the modules of VAR-d30 takes 0.7 ms, during which a GPU would be idle. While every
    module has the same children as at the last walk, its result is used again.
    """

    def __init__(self) -> None:
        self._modules: list[nn.Module] = []
        self._children: list[nn.Module | None] = []
        self._holders: Sequence[Mapping[str, Tensor | None]] = []

    def __call__(self, var: VAR, vae: VQVAE) -> tuple[tuple[int, int], ...]:
        """(address, version) of both models' parameters and the transformer's buffers."""
        if self._children != [var, vae, *_children(self._modules)]:
            self._modules = [*var.modules(), *vae.modules()]
            self._children = [var, vae, *_children(self._modules)]
            parameters = [module._parameters for module in self._modules]
            self._holders = [*parameters, *(module._buffers for module in var.modules())]
        tensors = (t for holder in self._holders for t in holder.values() if t is not None)
        return tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)


def _children(modules: list[nn.Module]) -> list[nn.Module | None]:
    return [child for module in modules for child in module._modules.values()]


def on_gpu(weight: Tensor) -> bool:
    """Whether a weight is on a GPU."""
    return weight.device.type != "cpu"


def casts_modulations(var: VAR, dtype: torch.dtype, packed: bool) -> bool:
    """Whether the engine casts the adaLN projections to its dtype.

    On a GPU always: their cost is reading them, and they are a third of the model.
    """
    own = var.head.weight
    return (packed or on_gpu(own)) and dtype != own.dtype and not var.config.shared_aln


def _linear(
    linear: nn.Linear,
    dtype: torch.dtype,
    packed: bool,
    cast_buffer: CastBuffer | None,
    *,
    gelu: bool = False,
) -> Linear:
    return Linear(
        linear.weight, linear.bias, dtype, packed=packed, gelu=gelu, cast_buffer=cast_buffer
    )


class Modulations:
    """Every layer's six modulation vectors per sequence, and the head's two.

    They depend on the class alone, so they are computed once per image and not once per scale.
    In a 16-bit engine the projections are cast, and on a CPU packed, like all other weights. In the
    weights' own dtype the model's modules are used: their weights, a third of the model, are read
    once per image only and are not worth a second copy.
    """

    def __init__(self, var: VAR, dtype: torch.dtype, packed: bool, cast_buffer: CastBuffer) -> None:
        self._var, self._dtype = var, dtype
        self._linears: list[Linear] = []
        if casts_modulations(var, dtype, packed):
            modules = [*(block.ada_lin for block in var.layers()), var.head_nm.ada_lin]
            self._linears = [_linear(projection(m), dtype, packed, cast_buffer) for m in modules]

    def __call__(self, cond_RC: Tensor) -> tuple[list[tuple[Tensor, ...]], tuple[Tensor, ...]]:
        """Each layer's six vectors and the head's two, each (R, C) in the engine's dtype."""
        if self._linears:
            active_RC = F.silu(cond_RC).to(self._dtype)
            modulations = [
                linear(active_RC).view(*active_RC.shape[:1], -1, active_RC.shape[1]).unbind(1)
                for linear in self._linears
            ]
            return modulations[:-1], modulations[-1]
        shared = self._var.shared_condition(cond_RC)
        modulations = [
            block.modulation(shared).to(self._dtype).unbind(1) for block in self._var.layers()
        ]
        return modulations, self._var.head_nm.modulation(cond_RC).to(self._dtype).unbind(1)
