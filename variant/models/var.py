"""The VAR transformer as a depth supernet, written for training: all scales in one pass.

Source: VAR (arXiv 2404.02905); skipping layers in the flexible zone: VARiant. Parameter names equal
those of the original VAR repository, so its state dicts load with ``strict=True``.

Axes: B images, L tokens of all scales, C width, H heads, D width of one head, V codebook entries,
E codebook vector width, N layers, 2 the branches of a block (attention, MLP), 1 broadcast, 6 the
parts of a block's modulation in the order of the checkpoints: the gates, the scales, the shifts,
each of attention and then of the MLP.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from variant.models.autocast import autocast_of
from variant.models.config import VARConfig
from variant.models.depths import layers_of
from variant.models.execution import PLAIN, Checkpointing, Execution, computed_again, recompute
from variant.models.forward_checks import check_forward
from variant.models.linear import Linear, LinearWithoutBias
from variant.models.parts import explains, is_plain, raise_changes
from variant.models.residual import OpenSum, PrefixStream, closed, modulated
from variant.models.token_loss import TokenLoss, linear_cross_entropy, losses_of
from variant.models.zones import reset_zone_weights, run_layers, run_spans, uses_zone_weights
from variant_kernels import (
    DepthSchedule,
    ScaleLayout,
    block_causal_attention,
    gated_residual_adaln,
)
from variant_kernels.arguments import instance, integer, real
from variant_kernels.gelu import gelu
from variant_kernels.integrations.alterations import global_hooks
from variant_kernels.plans.depth_schedule import check_schedule


class SelfAttention(nn.Module):
    """Multi-head attention over all scales; a token attends to its own and to earlier scales."""

    def __init__(self, config: VARConfig) -> None:
        super().__init__()
        width = config.embed_dim
        self.num_heads = config.num_heads
        self.head_dim = width // config.num_heads
        self.attn_l2_norm = config.attn_l2_norm
        if config.attn_l2_norm:
            self.softmax_scale = 1.0
            self.scale_mul_1H11 = nn.Parameter(
                torch.full((1, config.num_heads, 1, 1), math.log(4.0))
            )
        else:
            self.softmax_scale = 0.25 / math.sqrt(self.head_dim)
        self.mat_qkv = LinearWithoutBias(width, 3 * width)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.zero_k_bias: Tensor
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.proj = Linear(width, width)

    def qkv_bias(self) -> Tensor:
        """(3C,): keys have no bias."""
        return torch.cat((self.q_bias, self.zero_k_bias, self.v_bias))

    def qkv(self, x_BLC: Tensor) -> Tensor:
        """(B, L, 3C)."""
        if isinstance(self.mat_qkv, LinearWithoutBias):
            return self.mat_qkv(x_BLC, self.qkv_bias())  # one rounding for product and bias
        # A layer in its place, of 8-bit products for instance, takes no bias.
        qkv_BL3C = self.mat_qkv(x_BLC)
        return qkv_BL3C + self.qkv_bias().to(qkv_BL3C.dtype)

    def forward(self, x_BLC: Tensor, layout: ScaleLayout) -> Tensor:
        batch, length, width = x_BLC.shape
        qkv_BL3C = self.qkv(x_BLC)
        packed = qkv_BL3C.view(batch, length, 3, self.num_heads, self.head_dim)
        q_BLHD, k_BLHD, v_BLHD = packed.unbind(2)
        out_BLHD = block_causal_attention(
            q_BLHD,
            k_BLHD,
            v_BLHD,
            layout,
            scale_mul_1H11=self.scale_mul_1H11 if self.attn_l2_norm else None,
            softmax_scale=self.softmax_scale,
        )
        return self.proj(out_BLHD.view(batch, length, width))


class MLP(nn.Module):
    """Two linear layers with a tanh-approximated GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)

    def forward(self, x_BLC: Tensor, *, keep_all: bool = False) -> Tensor:
        """Args: keep_all: keep the GELU's result for the backward pass.

        In 16 bits the backward pass computes it again: memory limits the batches of large models.
        In float32 that would take 2 % of a step on a CPU.
        """
        hidden = self.fc1(x_BLC)
        active = gelu(hidden)
        keep_all = keep_all or active.itemsize > 2 or not active.requires_grad
        if keep_all or torch.compiler.is_compiling():
            return self.fc2(active)
        kept = hidden.detach()
        with computed_again(active, lambda: gelu(kept)):
            return self.fc2(active)


class Block(nn.Module):
    """Attention and MLP; the condition modulates the input of each and gates its output."""

    def __init__(self, config: VARConfig) -> None:
        super().__init__()
        width = config.embed_dim
        self.norm_eps = config.norm_eps
        self.attn = SelfAttention(config)
        self.ffn = MLP(width, round(width * config.mlp_ratio))
        self.shared_aln = config.shared_aln
        if config.shared_aln:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, width) / math.sqrt(width))
        else:
            self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        # By the depth of the subnet, as text; empty in a layer without zone weights.
        self.zones = nn.ModuleDict()

    def modulation(
        self,
        cond: Tensor,
        *,
        ada_lin: nn.Module | None = None,
        ada_gss: Tensor | None = None,
    ) -> Tensor:
        """(B, 6, C) from the class embedding (B, C), or from the shared modulation (B, 6, C).

        Args:
            ada_lin, ada_gss: zone weights; None uses the block's own.
        """
        if self.shared_aln:
            modulation_B6C = (self.ada_gss if ada_gss is None else ada_gss)[0] + cond
        else:
            projected = (self.ada_lin if ada_lin is None else ada_lin)(cond)
            modulation_B6C = projected.view(cond.shape[0], 6, cond.shape[1])
        return modulation_B6C.to(_compute_dtype(modulation_B6C))

    def forward(
        self,
        stream: Any,
        cond: Tensor,
        layout: ScaleLayout,
        branch_scales_2B: Tensor | None = None,
        execution: Execution = PLAIN,
        *,
        leave_open: bool = False,
        zones: Sequence[int | None] | None = None,
    ) -> Any:
        """The stream (B, L, C) after this block, an :class:`OpenSum` with ``leave_open``.

        Args:
            stream: before this block, a tensor or an OpenSum.
            branch_scales_2B: of :func:`branch_scales`, this layer's part.
            zones: with zone weights: ``stream`` is a list of spans, and so is the result; see
                :func:`variant.models.zones.run_spans`.
        """
        if zones is not None:
            return run_spans(self, stream, cond, layout, zones, branch_scales_2B, execution)
        compute = execution.compiled if self.training and execution.compiled else Block.compute
        args = self, stream, cond, layout, branch_scales_2B, execution.checkpointing, leave_open
        if execution.checkpointing == "full" and torch.is_grad_enabled():
            return recompute(compute, *args)
        return compute(*args)

    def compute(
        self,
        stream: Tensor | OpenSum,
        cond: Tensor,
        layout: ScaleLayout,
        branch_scales_2B: Tensor | None,
        checkpointing: Checkpointing,
        leave_open: bool,
    ) -> Tensor | OpenSum:
        """What :meth:`forward` runs; ``torch.compile`` takes this function."""
        gate1, gate2, scale1, scale2, shift1, shift2 = self.modulation(cond).unbind(1)
        if branch_scales_2B is not None:
            scales_2B1 = branch_scales_2B.to(gate1.dtype).unsqueeze(2)
            gate1, gate2 = gate1 * scales_2B1[0], gate2 * scales_2B1[1]
        x_BLC, h_BLC = modulated(stream, scale1, shift1, self.norm_eps)
        if checkpointing == "attention" and torch.is_grad_enabled():
            y_BLC = recompute(self.attn, h_BLC, layout)
        else:
            y_BLC = self.attn(h_BLC, layout)
        x_BLC, h_BLC = gated_residual_adaln(x_BLC, y_BLC, gate1, scale2, shift2, eps=self.norm_eps)
        after = OpenSum(x_BLC, self.ffn(h_BLC, keep_all=checkpointing == "full"), gate2)
        return after if leave_open else closed(after)


class HeadNorm(nn.Module):
    """Adaptive layer norm before the head."""

    def __init__(self, config: VARConfig) -> None:
        super().__init__()
        self.norm_eps = config.norm_eps
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(config.embed_dim, 2 * config.embed_dim))

    def modulation(self, cond_BC: Tensor) -> Tensor:
        """(B, 2, C): scale and shift."""
        modulation_B2C = self.ada_lin(cond_BC).view(cond_BC.shape[0], 2, cond_BC.shape[1])
        return modulation_B2C.to(_compute_dtype(modulation_B2C))

    def forward(self, stream: Tensor | OpenSum, cond_BC: Tensor) -> Tensor:
        scale_BC, shift_BC = self.modulation(cond_BC).unbind(1)
        if isinstance(stream, Tensor):
            stream = stream.float()
        return modulated(stream, scale_BC, shift_BC, self.norm_eps)[1]


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which matrix products run: autocast's inside autocast, else the tensor's."""
    return autocast_of(tensor) or tensor.dtype


def branch_scales(uniform_N2B: Tensor, drop_path_rate: float) -> Tensor:
    """Stochastic depth (arXiv 1603.09382): a factor for each branch of each layer and image.

    A branch of layer n is dropped with probability ``drop_path_rate * n / (N - 1)``.

    Args:
        uniform_N2B: random numbers in [0, 1).  drop_path_rate: of the last layer, below 1.
    Returns:
        (N, 2, B) of the same dtype: 0 where the branch is dropped, else 1 / (1 - its probability).
    """
    depth = len(uniform_N2B)
    layer_N11 = torch.arange(depth, device=uniform_N2B.device).view(-1, 1, 1)
    keep_N11 = 1 - layer_N11.to(uniform_N2B.dtype) * drop_path_rate / max(depth - 1, 1)
    return (uniform_N2B < keep_N11) / keep_N11


class VAR(nn.Module):
    """Class-conditional next-scale predictor whose layers can be skipped by schedule.

    Args:
        config: sizes; see :class:`variant.VARConfig`.
    """

    def __init__(self, config: VARConfig) -> None:
        super().__init__()
        self.config = instance("VAR", "config", config, VARConfig)
        self.layout = ScaleLayout.from_patch_nums(config.patch_nums)
        width, length = config.embed_dim, self.layout.total
        self.pos_start = nn.Parameter(torch.empty(1, self.layout.tokens[0], width))
        self.pos_1LC = nn.Parameter(torch.empty(1, length, width))
        self.word_embed = nn.Linear(config.vae_channels, width)
        # The last entry stands for "no class": the unconditional half of guidance.
        self.class_emb = nn.Embedding(config.num_classes + 1, width)
        self.lvl_embed = nn.Embedding(self.layout.num_scales, width)
        self.shared_ada_lin = (
            nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
            if config.shared_aln
            else nn.Identity()
        )
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head_nm = HeadNorm(config)
        self.head = nn.Linear(width, config.vocab_size)
        self.scale_index_L: Tensor
        self.register_buffer("scale_index_L", _scale_index(self.layout), persistent=False)
        self.register_load_state_dict_pre_hook(_drop_derived_buffers)
        self.init_weights()

    @explains("VAR.forward")
    def forward(
        self,
        labels_B: Tensor,
        x_teacher: Tensor,
        schedule: DepthSchedule | None = None,
        *,
        mixed_labels_B: Tensor | None = None,
        mix_B: Tensor | None = None,
        dropped_B: Tensor | None = None,
        branch_scales_N2B: Tensor | None = None,
        targets_BL: Tensor | None = None,
        execution: Execution = PLAIN,
    ) -> Tensor | TokenLoss:
        """Logits of every token, given the true tokens of all earlier scales (teacher forcing).

        A layer reads and updates the tokens of the scales at which it runs; the tokens of other
        scales keep their values. A scale that runs the layers of a subnet with zone weights uses
        these (``config.zone_weights``).

        Args:
            labels_B: (B,) int64 classes; ``num_classes`` stands for no class.
            x_teacher: (B, L - L_0, E), the VQ-VAE's ``teacher_input`` of the true tokens.
            schedule: layers per scale; None runs every layer at every scale.
            mixed_labels_B, mix_B: mixup (arXiv 1710.09412): the condition is
                ``mix * class(labels) + (1 - mix) * class(mixed_labels)``; mix_B is (B,) float.
            dropped_B: (B,) bool, images whose label is dropped. None drops each with probability
                ``cond_drop_rate`` in training mode, none in eval mode.
            branch_scales_N2B: of :func:`branch_scales`, the factors of both branches of every
                layer. None draws them in training mode; in eval mode no branch is dropped. What is
                drawn here comes from torch's global generator.
            targets_BL: (B, L) int64, the true tokens, none of which is left out as -100 is by
                ``F.cross_entropy``. With them the result is their cross-entropy, computed in
                chunks: the logits of all tokens are never in memory at once.
            execution: what is recomputed in the backward pass, and what is compiled.
        Returns:
            (B, L, V) float32; with targets_BL a :class:`TokenLoss`.
        Raises:
            ValueError: shapes, labels, targets (both checked on the CPU only) or the schedule do
                not fit the model; or layers were removed or added.
            TypeError, ValueError: another part is not what the config asks for, and the call fails.
        """
        if len(self.blocks) != self.config.depth:  # the others would run
            raise_changes("VAR.forward", self)
        check_forward(
            self.config,
            self.pos_start.device,
            labels_B=labels_B,
            x_teacher=x_teacher,
            schedule=schedule,
            targets_BL=targets_BL,
            execution=execution,
            mixed_labels_B=mixed_labels_B,
            mix_B=mix_B,
            dropped_B=dropped_B,
            branch_scales_N2B=branch_scales_N2B,
        )
        dropped_B, branch_scales_N2B = self._drops(labels_B, dropped_B, branch_scales_N2B)
        if dropped_B is not None:
            labels_B = labels_B.masked_fill(dropped_B, self.config.num_classes)
        cond_BC = self.class_emb(labels_B)
        if mixed_labels_B is not None and mix_B is not None:
            if dropped_B is not None:
                mixed_labels_B = mixed_labels_B.masked_fill(dropped_B, self.config.num_classes)
            mix_B1 = mix_B.to(cond_BC.dtype).unsqueeze(1)
            cond_BC = mix_B1 * cond_BC + (1 - mix_B1) * self.class_emb(mixed_labels_B)

        start = cond_BC.unsqueeze(1) + self.pos_start
        words = self.word_embed(x_teacher.to(self.word_embed.weight.dtype)).to(start.dtype)
        x_BLC = torch.cat((start, words), dim=1) + self.position_embedding()
        cond = self.shared_condition(cond_BC)
        stream = _run_layers(self, x_BLC, cond, schedule, branch_scales_N2B, execution)
        h_BLC = self.head_nm(stream, cond_BC)
        if targets_BL is None:
            return self.head(h_BLC).float()
        return token_loss(self.head, h_BLC, targets_BL)

    def _drops(
        self, labels_B: Tensor, dropped_B: Tensor | None, branch_scales_N2B: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Draw what the caller leaves out; None drops nothing."""
        config, batch, device = self.config, labels_B.shape[0], labels_B.device
        if dropped_B is None and self.training and config.cond_drop_rate > 0:
            dropped_B = torch.rand(batch, device=device) < config.cond_drop_rate
        if branch_scales_N2B is None and self.training and config.drop_path_rate > 0:
            uniform_N2B = torch.rand(config.depth, 2, batch, device=device)
            branch_scales_N2B = branch_scales(uniform_N2B, config.drop_path_rate)
        return dropped_B, branch_scales_N2B

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> VAR:
        super()._apply(fn, recurse=recurse)
        # After `to_empty` it holds whatever was in the memory, and no state dict has its values.
        self.scale_index_L = _scale_index(self.layout).to(self.scale_index_L.device)
        return self

    def layers(self) -> list[Block]:
        """The blocks, typed."""
        return cast("list[Block]", list(self.blocks))

    def position_embedding(self) -> Tensor:
        """(1, L, C): embedding of the position in the sequence plus that of the scale."""
        return self.pos_1LC + self.lvl_embed(self.scale_index_L).unsqueeze(0)

    def shared_condition(self, cond_BC: Tensor) -> Tensor:
        """The blocks' condition: class embedding (B, C), or shared modulation (B, 6, C)."""
        if not self.config.shared_aln:
            return cond_BC
        return self.shared_ada_lin(cond_BC).view(cond_BC.shape[0], 6, cond_BC.shape[1])

    def schedule(
        self,
        depth: int | Sequence[int] | DepthSchedule | None = None,
        bridge: int | None = None,
        *,
        op: str = "VAR.schedule",
    ) -> DepthSchedule:
        """Schedule of a depth, with the layers that the config records for it, if any.

        Args:
            depth: number of layers in the flexible zone, or a list of layers; None is every layer.
                A schedule of this model is returned as it is.
            bridge: number of first scales that run every layer; None is the config's bridge.
            op: the function that the messages name.
        Raises:
            TypeError: a number that is no integer, or an op that is no text.
            ValueError: depth or bridge out of range.
        """
        instance("VAR.schedule", "op", op, str)
        full, scales = self.config.depth, self.layout.num_scales
        if isinstance(depth, DepthSchedule):
            return check_schedule(op, depth, bridge, full, scales)
        if bridge is None:
            bridge = self.config.bridge
        else:
            bridge = integer(op, "bridge", bridge, 0, scales)
        layers = tuple(range(full)) if depth is None else self.layers_of(depth, op=op)
        if len(layers) == full:
            return DepthSchedule.full(full, scales)
        if bridge is None:
            raise ValueError(
                f"{op}: bridge must be given, an integer in [0, {scales}], because this model's "
                "config has none"
            )
        return DepthSchedule(full, scales, layers, bridge)

    def layers_of(
        self, depth: int | Sequence[int], *, op: str = "VAR.layers_of"
    ) -> tuple[int, ...]:
        """The layers of a depth: those that the config records, or evenly chosen ones.

        Args:
            depth: number of layers, or a list of layers, which need not be recorded.
            op: the function that the messages name.
        Raises:
            TypeError: depth is neither an integer nor a list of integers, or op is no text.
            ValueError: an invalid list; a number that is out of range, or that a config with
                subnets does not record.
        """
        instance("VAR.layers_of", "op", op, str)
        return layers_of(self.config, depth, op)

    @torch.no_grad()
    def init_weights(
        self, gate_scale: float = 1e-5, modulation_scale: float = 0.5, head_scale: float = 0.02
    ) -> None:
        """Initialises the weights as the original does: truncated normal, std sqrt(1 / 3C).

        Gates start near zero (each block near the identity), scales and shifts at half size, and
        the output of each branch is divided by sqrt(2 * depth). Meta tensors stay as they are. Zone
        weights start as those of the full network.

        Raises:
            ValueError or TypeError: a scale that is no finite number.
        """
        op = "VAR.init_weights"
        gate_scale = real(op, "gate_scale", gate_scale)
        modulation_scale = real(op, "modulation_scale", modulation_scale)
        head_scale = real(op, "head_scale", head_scale)
        if not self.pos_start.is_meta:
            _init_full_network(self, gate_scale, modulation_scale, head_scale)
        reset_zone_weights(self)


def _init_full_network(
    var: VAR, gate_scale: float, modulation_scale: float, head_scale: float
) -> None:
    std = math.sqrt(1 / var.config.embed_dim / 3)
    for module in var.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.trunc_normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    nn.init.trunc_normal_(var.pos_start, std=std)
    nn.init.trunc_normal_(var.pos_1LC, std=std)
    var.head.weight.mul_(head_scale)
    projection(var.head_nm.ada_lin).weight.mul_(modulation_scale)
    for block in var.layers():
        block.attn.proj.weight.div_(math.sqrt(2 * var.config.depth))
        block.ffn.fc2.weight.div_(math.sqrt(2 * var.config.depth))
        if block.shared_aln:
            modulation = block.ada_gss[0, 0]
        else:
            modulation = projection(block.ada_lin).weight
        third = modulation.shape[0] // 3
        modulation[:third].mul_(gate_scale)
        modulation[third:].mul_(modulation_scale)


def _run_layers(
    var: VAR,
    x_BLC: Tensor,
    cond: Tensor,
    schedule: DepthSchedule | None,
    branch_scales_N2B: Tensor | None,
    execution: Execution,
) -> Tensor | OpenSum:
    """The residual stream (B, L, C) of all tokens after the layers of a schedule."""
    if schedule is not None and uses_zone_weights(var.config, schedule):
        return run_layers(var, x_BLC, cond, schedule, branch_scales_N2B, execution)
    stream = PrefixStream(x_BLC)
    for layer, block in enumerate(var.layers()):
        scales = var.layout.num_scales
        if schedule is not None:
            scales = schedule.last_scale(layer) + 1
            if scales == 0:
                continue
        layout = var.layout.prefix(scales)
        stream.head = block(
            stream.prefix(layout.total),
            cond,
            layout,
            None if branch_scales_N2B is None else branch_scales_N2B[layer],
            execution,
            leave_open=execution.leaves_sums_open,
        )
    return stream.prefix(var.layout.total)


def token_loss(head: nn.Module, h_BLC: Tensor, targets_BL: Tensor) -> TokenLoss:
    """Cross-entropy of the true tokens; h_BLC: after the norm of the head."""
    without_hooks = is_plain(head, nn.Linear) and not global_hooks()
    if type(head) is nn.Linear and without_hooks and head.bias is not None:
        return linear_cross_entropy(h_BLC, head.weight, head.bias, targets_BL)
    # A layer in its place, or one with hooks, computes the logits in its own way.
    losses_BL = losses_of(head(h_BLC).float().log_softmax(2), targets_BL)
    return TokenLoss(losses_BL.mean(), losses_BL.detach())


def projection(ada_lin: nn.Sequential) -> nn.Linear:
    """The linear layer behind the SiLU."""
    return cast("nn.Linear", ada_lin[1])


def _scale_index(layout: ScaleLayout) -> Tensor:
    """(L,) int64: the scale of each token."""
    scales = [k for k, count in enumerate(layout.tokens) for _ in range(count)]
    # device="cpu": a model built on the meta device needs the values, as no state dict has them.
    return torch.tensor(scales, device="cpu")


def _drop_derived_buffers(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object
) -> None:
    """Drops the dense mask and the scale of each token, which original checkpoints store."""
    for name in ("attn_bias_for_masking", "lvl_1L"):
        state_dict.pop(prefix + name, None)


def derived_buffers(layout: ScaleLayout) -> dict[str, Tensor]:
    """The two buffers that are in the original's state dict and not in ours.

    Returns:
        ``lvl_1L`` (1, L) int64 and ``attn_bias_for_masking`` (1, 1, L, L) float32 of 0 and -inf.
    """
    scale_L = _scale_index(layout)
    hidden_LL = scale_L.unsqueeze(1) < scale_L.unsqueeze(0)
    bias_LL = torch.zeros(
        hidden_LL.shape, dtype=torch.float32, device=hidden_LL.device
    ).masked_fill(hidden_LL, -torch.inf)
    return {
        "lvl_1L": scale_L.unsqueeze(0),
        "attn_bias_for_masking": bias_LL.view(1, 1, *bias_LL.shape),
    }
