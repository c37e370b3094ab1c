"""The baseline of the engine: VAR generation in plain torch, as it is usually written.

Every block at every scale, K/V caches grown with ``torch.cat``, adaLN projections recomputed at
every scale, torch's attention. It skips the layers that the schedule skips and keeps their K/V to
the end, as the paper's scheme does. Weights and random draws are those of the engine, so float32
gives the same tokens; under ``torch.autocast`` it computes in bfloat16 as the original code does.

Axes: R sequences, T tokens of this scale, C width, H heads, D width of one head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from variant.models.var import VAR, Block
from variant.models.vqvae import VQVAE
from variant_kernels import DepthSchedule, use_backend
from variant_kernels.ops.sample_tokens import filter_logits


@dataclass
class PlainResult:
    """tokens (B, L); kv_bytes: size of all caches at the end, their largest size."""

    tokens: Tensor
    kv_bytes: int


def _attend(block: Block, h_RTC: Tensor, cache: list[Tensor]) -> Tensor:
    attn = block.attn
    num_sequences, tokens, width = h_RTC.shape
    qkv = F.linear(h_RTC, attn.mat_qkv.weight, attn.qkv_bias())
    q, k, v = (
        qkv.view(num_sequences, tokens, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    )
    if attn.attn_l2_norm:
        q = F.normalize(q, dim=-1) * attn.scale_mul_1H11.clamp_max(4.605170185988092).exp()
        k = F.normalize(k, dim=-1)
    if cache:
        k, v = torch.cat((cache[0], k), dim=2), torch.cat((cache[1], v), dim=2)
    cache[:] = k, v
    out = F.scaled_dot_product_attention(q, k, v, scale=attn.softmax_scale)
    return attn.proj(out.transpose(1, 2).reshape(num_sequences, tokens, width))


def _modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def _block(block: Block, x_RTC: Tensor, cond: Tensor, cache: list[Tensor]) -> Tensor:
    gate1, gate2, scale1, scale2, shift1, shift2 = block.modulation(cond).unbind(1)
    eps = block.norm_eps
    x_RTC = x_RTC + gate1.unsqueeze(1) * _attend(
        block, _modulate(x_RTC, scale1, shift1, eps), cache
    )
    return x_RTC + gate2.unsqueeze(1) * block.ffn(_modulate(x_RTC, scale2, shift2, eps))


@torch.inference_mode()
def generate(
    var: VAR,
    vae: VQVAE,
    labels_B: Tensor,
    schedule: DepthSchedule,
    *,
    cfg: float = 1.5,
    top_k: int = 0,
    top_p: float = 0.0,
    generator: torch.Generator,
) -> PlainResult:
    """Tokens of one image per label, drawn with ``torch.multinomial``; no image is decoded."""
    layout, batch = var.layout, len(labels_B)
    labels_R = torch.cat((labels_B, torch.full_like(labels_B, var.config.num_classes)))
    cond_RC = var.class_emb(labels_R)
    position_1LC = var.position_embedding()
    x_RTC = cond_RC.unsqueeze(1) + var.pos_start + position_1LC[:, layout.slice(0)]
    caches: list[list[Tensor]] = [[] for _ in var.blocks]
    f_hat, tokens = vae.new_features(batch), []
    for k in range(layout.num_scales):
        shared = var.shared_condition(cond_RC)
        for index, block in enumerate(var.layers()):
            if schedule.is_active(index, k):
                x_RTC = _block(block, x_RTC, shared, caches[index])
        scale, shift = var.head_nm.modulation(cond_RC).unbind(1)
        logits = var.head(_modulate(x_RTC, scale, shift, var.config.norm_eps)).float()
        t = cfg * k / max(layout.num_scales - 1, 1)
        guided = (1 + t) * logits[:batch] - t * logits[batch:]
        probs = filter_logits(guided, top_k, top_p).softmax(-1)
        samples = torch.multinomial(probs.flatten(0, 1), 1, replacement=True, generator=generator)
        tokens.append(samples.view(batch, -1))
        f_hat = vae.accumulate(f_hat, tokens[-1], k)
        if k + 1 < layout.num_scales:
            words = var.word_embed(vae.next_scale_input(f_hat, k))
            x_RTC = (words + position_1LC[:, layout.slice(k + 1)]).repeat(2, 1, 1)
    kv_bytes = sum(tensor.nbytes for cache in caches for tensor in cache)
    return PlainResult(torch.cat(tokens, dim=1), kv_bytes)


def agree(var: VAR, vae: VQVAE, labels_B: Tensor, schedule: DepthSchedule) -> bool:
    """Whether the plain loop's teacher-forced twin, ``VAR.forward``, ranks its tokens first.

    This checks the baseline: a loop that computed something else would not be one.
    """
    generator = torch.Generator(labels_B.device)
    result = generate(var, vae, labels_B, schedule, cfg=0.0, top_k=1, generator=generator)
    with torch.inference_mode(), use_backend("reference"):
        logits = var(labels_B, vae.teacher_input(result.tokens), schedule)
    return torch.equal(logits.argmax(-1), result.tokens)
