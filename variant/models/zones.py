"""Zone weights: a subnet's layers with weights of their own for the tokens of the flexible zone.

A scale whose active layers are those of a subnet uses that subnet's zone weights; all other scales,
the bridge zone among them, use the weights of the full network. So the full network can stay
frozen, bit by bit, while a subnet is trained. Tokens of the bridge zone do not see later ones:
their keys and values are those of the full network.

Low-rank additions: LoRA (arXiv 2106.09685), y = W x + B A x, with B = 0 at the start.

Axes: B images, T tokens of one span of scales, L tokens of all spans, C width, H heads, D width of
one head, I inputs, O outputs, R rank of an addition, 6 the parts of a modulation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from variant.models.config import VARConfig
from variant.models.execution import PLAIN, Execution, recompute
from variant_kernels import (
    DepthSchedule,
    ScaleLayout,
    adaln_modulate,
    block_causal_attention,
    gated_residual_adaln,
    qk_norm,
)
from variant_kernels.gelu import gelu

Block = VAR = Any  # of variant.models.var, which imports this module

LINEARS = ("mat_qkv", "proj", "fc1", "fc2")  # of a layer, in the order in which they run
ATTENTION_LINEARS = LINEARS[:2]


class LowRank(nn.Module):
    """The addition of one linear layer: ``B A x``; zero until it is trained.

    Args:
        like_OI: the weight that it is added to; the addition has its dtype and device.
        rank: R.
    """

    def __init__(self, like_OI: Tensor, rank: int) -> None:
        super().__init__()
        outputs, inputs = like_OI.shape
        self.lora_A = nn.Parameter(like_OI.new_empty(rank, inputs))
        self.lora_B = nn.Parameter(like_OI.new_zeros(outputs, rank))
        if not like_OI.is_meta:
            with torch.no_grad():
                self.lora_A.normal_(std=1 / math.sqrt(inputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.lora_A), self.lora_B)

    def added_to(self, weight_OI: Tensor) -> Tensor:
        """``W + B A``, a new tensor, float32 or wider."""
        wide = torch.promote_types(weight_OI.dtype, torch.float32)
        return torch.addmm(weight_OI.to(wide), self.lora_B.to(wide), self.lora_A.to(wide))


class ZoneLayer(nn.Module):
    """The weights of one layer for the flexible zone of one subnet.

    They start as those of the full network. What a kind of zone weights does not have is the full
    network's.

    Attributes:
        attn, ffn: copies, or None.  lora: additions by the name of the linear layer; may be empty.
        ada_lin, ada_gss: the layer's own adaLN projection, or its own summand with ``shared_aln``.
    """

    def __init__(self, block: Block, config: VARConfig) -> None:
        super().__init__()
        kind, copied = config.zone_weights, config.zone_weights == "copies"
        self.attn: Any = deepcopy(block.attn) if copied else None
        self.ffn: Any = deepcopy(block.ffn) if copied else None
        view = LayerView(block, None)
        self.lora = nn.ModuleDict(
            {
                name: LowRank(view.parameter(name), config.lora_rank)
                for name in LINEARS
                if kind == "lora"
            }
        )
        has_adaln = config.zone_adaln
        own_gss = nn.Parameter(block.ada_gss.detach().clone()) if config.shared_aln else None
        self.ada_gss: nn.Parameter | None = own_gss if has_adaln else None
        own_lin = None if config.shared_aln else deepcopy(block.ada_lin)
        self.ada_lin: nn.Sequential | None = own_lin if has_adaln else None
        self.requires_grad_(True)  # also where the full network is frozen


class LayerView:
    """The weights that one layer uses for the tokens of one span of scales.

    Args:
        block: of the full network.
        zone: the depth of the subnet whose zone weights are used; None uses the block's own.
    """

    def __init__(self, block: Block, zone: int | None) -> None:
        own = None if zone is None else cast("ZoneLayer", block.zones[str(zone)])
        self.block, self.own = block, own
        self.attn = block.attn if own is None or own.attn is None else own.attn
        self.ffn = block.ffn if own is None or own.ffn is None else own.ffn

    def low_rank(self, name: str) -> LowRank | None:
        """The addition to one of :data:`LINEARS`."""
        has = self.own is not None and name in self.own.lora
        return cast("LowRank", self.own.lora[name]) if has and self.own is not None else None

    def parameter(self, name: str) -> Tensor:
        """The weight (O, I) of one of :data:`LINEARS`, without its addition."""
        return getattr(self.attn if name in ATTENTION_LINEARS else self.ffn, name).weight

    def linear(self, name: str) -> tuple[Tensor, Tensor]:
        """Weight (O, I) and bias (O,) of one of :data:`LINEARS`, its addition merged."""
        added, weight_OI = self.low_rank(name), self.parameter(name)
        if added is not None:
            weight_OI = added.added_to(weight_OI)
        if name == "mat_qkv":
            return weight_OI, self.attn.qkv_bias()
        return weight_OI, getattr(self.attn if name in ATTENTION_LINEARS else self.ffn, name).bias

    @property
    def has_linears(self) -> bool:
        """Whether the linear layers are other than those of the full network."""
        return self.own is not None and (self.own.attn is not None or len(self.own.lora) > 0)

    @property
    def has_adaln(self) -> bool:
        """Whether the modulation is another than that of the full network's layer."""
        return self.own is not None and (
            self.own.ada_lin is not None or self.own.ada_gss is not None
        )

    @property
    def ada_lin(self) -> nn.Sequential:
        """The projection that makes the modulation, in a model without ``shared_aln``."""
        own = None if self.own is None else self.own.ada_lin
        return self.block.ada_lin if own is None else own

    def modulation(self, cond: Tensor) -> Tensor:
        """(B, 6, C); see :meth:`variant.models.var.Block.modulation`."""
        if self.own is None:
            return self.block.modulation(cond)
        return self.block.modulation(cond, ada_lin=self.own.ada_lin, ada_gss=self.own.ada_gss)

    def project(self, name: str, x: Tensor) -> Tensor:
        """One of :data:`LINEARS`, its addition applied; (..., I) to (..., O)."""
        if name == "mat_qkv":
            y = self.attn.qkv(x)
        else:
            y = getattr(self.attn if name in ATTENTION_LINEARS else self.ffn, name)(x)
        added = self.low_rank(name)
        return y if added is None else y + added(x)

    def qkv(self, h_BTC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, (B, T, H, D) each; q and k normalised where the model does that."""
        packed = self.project("mat_qkv", h_BTC).unflatten(2, (3, self.attn.num_heads, -1))
        q_BTHD, k_BTHD, v_BTHD = packed.unbind(2)
        if self.attn.attn_l2_norm:
            q_BTHD, k_BTHD = qk_norm(q_BTHD, k_BTHD, self.attn.scale_mul_1H11)
        return q_BTHD, k_BTHD, v_BTHD

    def mlp(self, h_BTC: Tensor) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        return self.project("fc2", gelu(self.project("fc1", h_BTC)))


def run_spans(
    block: Block,
    spans: Sequence[Tensor],
    cond: Tensor,
    layout: ScaleLayout,
    zones: Sequence[int | None],
    branch_scales_2B: Tensor | None = None,
    execution: Execution = PLAIN,
) -> tuple[Tensor, ...]:
    """One layer on several spans of scales, each with its own weights.

    Spans are separate tensors, so that those of a frozen network need no gradient. Stochastic depth
    drops branches of spans with zone weights only: the others run as in generation.

    Args:
        spans: (B, T, C) each; together the tokens of ``layout``.
        cond: see :meth:`variant.models.var.Block.modulation`.
        zones: of each span: the depth of a subnet, or None.
        branch_scales_2B: of :func:`variant.models.var.branch_scales`, this layer's part.
        execution: its ``checkpointing``; spans are never compiled.
    """
    args = block, tuple(spans), cond, layout, tuple(zones), branch_scales_2B
    recomputes = torch.is_grad_enabled()
    if execution.checkpointing == "full" and recomputes:
        return recompute(_run_spans, *args, False)
    return _run_spans(*args, execution.checkpointing == "attention" and recomputes)


def _run_spans(
    block: Block,
    spans: Sequence[Tensor],
    cond: Tensor,
    layout: ScaleLayout,
    zones: Sequence[int | None],
    branch_scales_2B: Tensor | None,
    recompute_attention: bool,
) -> tuple[Tensor, ...]:
    views = [LayerView(block, zone) for zone in zones]
    modulations = []
    for view in views:
        gate1, gate2, *rest = view.modulation(cond).unbind(1)
        if view.own is not None and branch_scales_2B is not None:
            scales_2B1 = branch_scales_2B.to(gate1.dtype).unsqueeze(2)
            gate1, gate2 = gate1 * scales_2B1[0], gate2 * scales_2B1[1]
        modulations.append((gate1, gate2, *rest))
    normed = [
        adaln_modulate(x_BTC, modulation[2], modulation[4], eps=block.norm_eps)
        for x_BTC, modulation in zip(spans, modulations, strict=True)
    ]
    if recompute_attention:
        attended = recompute(_attend, views, layout, *normed)
    else:
        attended = _attend(views, layout, *normed)
    results = []
    for x_BTC, y_BTC, view, modulation in zip(spans, attended, views, modulations, strict=True):
        gate1, gate2, _, scale2, _, shift2 = modulation
        x_BTC, h_BTC = gated_residual_adaln(x_BTC, y_BTC, gate1, scale2, shift2, eps=block.norm_eps)
        results.append(x_BTC + gate2.unsqueeze(1) * view.mlp(h_BTC))
    return tuple(results)


def _attend(views: Sequence[LayerView], layout: ScaleLayout, *spans: Tensor) -> tuple[Tensor, ...]:
    """Self-attention over all spans; (B, T, C) each, before and after."""
    qkv = [view.qkv(h_BTC) for view, h_BTC in zip(views, spans, strict=True)]
    softmax_scale, *others = (view.attn.softmax_scale for view in views)
    if any(scale != softmax_scale for scale in others):  # copies of weights may have their own
        qkv = [
            (q * view.attn.softmax_scale, k, v) for view, (q, k, v) in zip(views, qkv, strict=True)
        ]
        softmax_scale = 1.0
    q_BLHD, k_BLHD, v_BLHD = (torch.cat(parts, dim=1) for parts in zip(*qkv, strict=True))
    y_BLHD = block_causal_attention(q_BLHD, k_BLHD, v_BLHD, layout, softmax_scale=softmax_scale)
    parts = y_BLHD.flatten(2).split([h_BTC.shape[1] for h_BTC in spans], dim=1)
    return tuple(view.project("proj", part) for view, part in zip(views, parts, strict=True))


@dataclass(frozen=True)
class Span:
    """Scales ``first..last`` of one image run the same layers with the same weights.

    zone: the depth of the subnet whose zone weights they use, or None.
    """

    first: int
    last: int
    zone: int | None


def zone_of(config: VARConfig, layers: tuple[int, ...]) -> int | None:
    """The subnet whose zone weights a scale with these active layers uses.

    Returns:
        The depth of the subnet; None where the scale uses the weights of the full network.
    """
    if config.zone_weights == "shared":
        return None
    return next((depth for depth, own in config.subnets.items() if own == layers), None)


def spans_of(config: VARConfig, schedule: DepthSchedule) -> list[Span]:
    """The spans of a schedule, in order."""
    spans: list[Span] = []
    for scale, layers in enumerate(schedule.layers):
        if scale and layers == schedule.layers[scale - 1]:
            spans[-1] = Span(spans[-1].first, scale, spans[-1].zone)
        else:
            spans.append(Span(scale, scale, zone_of(config, layers)))
    return spans


def uses_zone_weights(config: VARConfig, schedule: DepthSchedule) -> bool:
    """Whether any scale of a schedule uses zone weights."""
    return any(zone_of(config, layers) is not None for layers in schedule.layers)


def run_layers(
    var: VAR,
    x_BLC: Tensor,
    cond: Tensor,
    schedule: DepthSchedule,
    branch_scales_N2B: Tensor | None = None,
    execution: Execution = PLAIN,
) -> Tensor:
    """All layers of a schedule that uses zone weights; (B, L, C) to (B, L, C).

    Args:
        cond: the blocks' condition, :meth:`variant.models.var.VAR.shared_condition`.
        branch_scales_N2B: of :func:`variant.models.var.branch_scales`; None drops no branch.
    """
    spans, layout = spans_of(var.config, schedule), var.layout
    sizes = [sum(layout.tokens[span.first : span.last + 1]) for span in spans]
    parts = list(x_BLC.split(sizes, dim=1))
    for layer, block in enumerate(var.layers()):
        scales = schedule.last_scale(layer) + 1
        running = sum(span.last < scales for span in spans)
        if running:
            parts[:running] = block(
                parts[:running],
                cond,
                layout.prefix(scales),
                None if branch_scales_N2B is None else branch_scales_N2B[layer],
                execution,
                zones=[span.zone for span in spans[:running]],
            )
    return torch.cat(parts, dim=1)


def reset_zone_weights(var: VAR) -> None:
    """Starts the zone weights of every subnet anew, from those of the full network.

    For a model whose full network was loaded after it was built. The modules are new ones.
    """
    config = var.config
    own = {} if config.zone_weights == "shared" else config.subnets
    for layer, block in enumerate(var.layers()):
        depths = [depth for depth, layers in own.items() if layer in layers]
        block.zones = nn.ModuleDict({str(depth): ZoneLayer(block, config) for depth in depths})


def zone_parameters(var: VAR) -> list[nn.Parameter]:
    """The zone weights of all subnets."""
    return [weight for block in var.layers() for weight in block.zones.parameters()]


def freeze_full_network(var: VAR) -> None:
    """From now on only the zone weights need a gradient.

    Raises:
        ValueError: the model has no zone weights.
    """
    own = zone_parameters(var)
    if not own:
        raise ValueError(
            'freeze_full_network: var must have zone weights; its config has zone_weights "shared"'
        )
    var.requires_grad_(False)
    for weight in own:
        weight.requires_grad_(True)


def is_zone_key(key: str) -> bool:
    """Whether a key of a transformer's state dict is a zone weight: ``blocks.0.zones.2.``..."""
    parts = key.split(".")
    return len(parts) > 2 and parts[0] == "blocks" and parts[2] == "zones"
