"""The engine's weights: cast to its dtype once, packed once, shared with the model where possible.

Axes: B images, R sequences, C width, H heads, L tokens of all scales, 6 the modulation rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from variant.engine.packed_layers import CastDecoder, Linear, PackedDecoder, Staging
from variant.models.var import VAR, Block, projection
from variant.models.vqvae import VQVAE

# Rows of the MLP at once on a CPU: its hidden tensor then stays in the cache (4096 rows of
# 1024 x 4096 x 1024 in bfloat16: 167 ms in parts of 512, 181 ms at once).
MLP_ROWS = 512


class LayerWeights:
    """One block's weights; its matrix products are callables."""

    def __init__(self, block: Block, dtype: torch.dtype, packed: bool, staging: Staging) -> None:
        attn, ffn = block.attn, block.ffn
        self.softmax_scale = attn.softmax_scale
        self.scale_mul_1H11 = attn.scale_mul_1H11.detach().float() if attn.attn_l2_norm else None
        self.qkv = Linear(
            attn.mat_qkv.weight, attn.qkv_bias(), dtype, packed=packed, staging=staging
        )
        self.proj = _linear(attn.proj, dtype, packed, staging)
        self.fc1 = _linear(ffn.fc1, dtype, packed, staging, gelu=True)
        self.fc2 = _linear(ffn.fc2, dtype, packed, staging)

    def mlp(self, h_RTC: Tensor) -> Tensor:
        """(R, T, C) to (R, T, C)."""
        h_NC = h_RTC.flatten(0, 1)
        if h_NC.device.type != "cpu" or len(h_NC) <= MLP_ROWS:
            return self.fc2(self.fc1(h_RTC))
        y_NC = torch.empty_like(h_NC)
        for part_NC, h_PC in zip(y_NC.split(MLP_ROWS), h_NC.split(MLP_ROWS), strict=True):
            part_NC.copy_(self.fc2(self.fc1(h_PC)))
        return y_NC.view_as(h_RTC)


class EngineWeights:
    """All that the step loop reads; embeddings stay float32, as the residual stream does.

    Args:
        var, vae: whose weights.
        dtype: of the matrix products.
        packed: keep packed copies, which :func:`variant_kernels.packed_linear.can_pack` must allow.
    """

    def __init__(self, var: VAR, vae: VQVAE, dtype: torch.dtype, packed: bool) -> None:
        self.packed = packed
        staging = Staging(dtype)
        self.layers = [LayerWeights(block, dtype, self.packed, staging) for block in var.layers()]
        self.head = _linear(var.head, dtype, self.packed, staging)
        self.position_1LC = var.position_embedding().detach().float()
        self.pos_start = var.pos_start.detach().float()
        self.word_embed = _linear(var.word_embed, torch.float32, False, None)
        self.modulations = Modulations(var, dtype, self.packed, staging)
        self._vae, self._dtype = vae, dtype
        self._decoder: PackedDecoder | CastDecoder | None = None

    @torch.no_grad()
    def decode(self, f_hat_BCHW: Tensor) -> Tensor:
        """Images (B, I, Y, X) float32 in [0, 1]."""
        own = self._vae.post_quant_conv.weight
        cast = on_gpu(own) and self._dtype not in (own.dtype, torch.float32)
        if not self.packed and not cast:
            return self._vae.decode_features(f_hat_BCHW).float()
        if self._decoder is None:  # made when first needed: not every caller decodes
            kind = PackedDecoder if self.packed else CastDecoder
            self._decoder = kind(self._vae, self._dtype)
        return self._decoder(f_hat_BCHW)


class Fingerprint:
    """Where two models' weights lie and how often each was written to: changes when one does.

    Walking over VAR-d30's modules takes 0.7 ms, in which a GPU has nothing to do: while every
    module has the children that it had, the last walk serves.
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
    """Whether a model lies on a GPU."""
    return weight.device.type != "cpu"


def casts_modulations(var: VAR, dtype: torch.dtype, packed: bool) -> bool:
    """Whether the engine has adaLN projections in its own dtype.

    On a GPU always: reading them, a third of the model, is what they cost.
    """
    own = var.head.weight
    return (packed or on_gpu(own)) and dtype != own.dtype and not var.config.shared_aln


def _linear(
    linear: nn.Linear,
    dtype: torch.dtype,
    packed: bool,
    staging: Staging | None,
    *,
    gelu: bool = False,
) -> Linear:
    return Linear(linear.weight, linear.bias, dtype, packed=packed, gelu=gelu, staging=staging)


class Modulations:
    """Every layer's six modulation rows and the head's two.

    They depend on the class alone, so they are computed once per image and not once per scale.
    In 16 bits the projections are cast, and on a CPU packed, as all other weights are; in the
    weights' own dtype the modules serve: read once per image, their weights (a third of the model)
    are not worth a copy.
    """

    def __init__(self, var: VAR, dtype: torch.dtype, packed: bool, staging: Staging) -> None:
        self._var, self._dtype = var, dtype
        self._linears: list[Linear] = []
        if casts_modulations(var, dtype, packed):
            modules = [*(block.ada_lin for block in var.layers()), var.head_nm.ada_lin]
            self._linears = [_linear(projection(m), dtype, packed, staging) for m in modules]

    def __call__(self, cond_RC: Tensor) -> tuple[list[tuple[Tensor, ...]], tuple[Tensor, ...]]:
        """Per layer its rows, and the head's, each (R, C) in the engine's dtype."""
        if self._linears:
            active_RC = F.silu(cond_RC).to(self._dtype)
            rows = [
                linear(active_RC).view(*active_RC.shape[:1], -1, active_RC.shape[1]).unbind(1)
                for linear in self._linears
            ]
            return rows[:-1], rows[-1]
        shared = self._var.shared_condition(cond_RC)
        rows = [block.modulation(shared).to(self._dtype).unbind(1) for block in self._var.layers()]
        return rows, self._var.head_nm.modulation(cond_RC).to(self._dtype).unbind(1)
