"""The step loop: one batch painted scale by scale through a paged cache.

The modules of ``models/var.py`` are written for training; here the same weights run one scale at
a time, and only the layers that the schedule names.

Axes: B images, R sequences (B, or 2B with guidance: conditional rows first), T tokens of this
scale, L tokens of all scales, C width, H heads, D width of one head, V codebook entries, E codebook
vector width, 6 the rows of an adaptive layer norm (gates, scales, shifts; each of attention, then
of the MLP).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from variant.engine.kernels import Kernels
from variant.engine.weights import EngineWeights, LayerWeights
from variant.models.var import VAR
from variant.models.vqvae import VQVAE
from variant_kernels import DepthSchedule, KVStep, PagedKVCache
from variant_kernels.ops.sample_tokens import draw_exponential

# Logits of one call of the head: images are taken in parts beyond it. At batch 64 the last scale's
# would otherwise be the largest tensors of all.
LOGITS_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Draws:
    """How one batch's tokens are drawn.

    cfg and seed are numbers, or 0-d tensors (float64, int64) where a captured graph reads them anew
    at each replay. guided: whether unconditional sequences run beside the conditional ones.
    """

    image_ids_B: Tensor
    cfg: float | Tensor
    seed: int | Tensor
    guided: bool
    top_k: int
    top_p: float
    generator: torch.Generator | None = None


class Run:
    """One batch in flight.

    Kernels and weights are chosen when it starts: whatever another thread or a callback does with
    the engine, this run goes on as it began.
    """

    def __init__(
        self,
        var: VAR,
        vae: VQVAE,
        *,
        kernels: Kernels,
        weights: EngineWeights,
        cache: PagedKVCache,
        labels_R: Tensor,
    ) -> None:
        self.var, self.vae = var, vae
        self.kernels, self.weights, self.cache = kernels, weights, cache
        self.cond_RC = var.class_emb(labels_R)
        self.rows_6RC, self.head_2RC = weights.modulations(self.cond_RC)

    @property
    def schedule(self) -> DepthSchedule:
        """Layers per scale; :meth:`switch` changes it for the scales to come."""
        return self.cache.schedule

    def switch(self, scale: int, layers: Sequence[int]) -> None:
        """From ``scale`` on only ``layers`` run."""
        if scale < self.var.layout.num_scales:
            self.cache.switch(self.schedule.switched(scale, layers))

    def tokens_in(self, words_BTE: Tensor | None, scale: int) -> Tensor:
        """Residual stream at the start of a scale, (R, T, C) float32."""
        weights = self.weights
        place_1TC = weights.position_1LC[:, self.var.layout.slice(scale)]
        if words_BTE is None:
            return self.cond_RC.float().unsqueeze(1) + weights.pos_start + place_1TC
        words_BTC = weights.word_embed(words_BTE) + place_1TC
        return words_BTC.repeat(self.cond_RC.shape[0] // words_BTC.shape[0], 1, 1)

    def hidden(self, x_RTC: Tensor, scale: int) -> Tensor:
        """Tokens of one scale through its active layers and the head's norm, (R, T, C)."""
        kernels, eps = self.kernels, self.var.config.norm_eps
        active = self.schedule.active_layers(scale)
        _, _, scale1, _, shift1, _ = self.rows_6RC[active[0]]
        h_RTC, _, _ = kernels.adaln(x_BTC=x_RTC, scale_BC=scale1, shift_BC=shift1, eps=eps)
        for index, following in zip(active, (*active[1:], None), strict=True):
            layer = self.weights.layers[index]
            gate1, gate2, _, scale2, _, shift2 = self.rows_6RC[index]
            step = self.cache.open(index, scale)
            y_RTC = self._attention(layer, h_RTC, step)
            self.cache.close(index, scale)
            x_RTC, h_RTC, _, _ = kernels.gated_adaln(
                x_BTC=x_RTC, y_BTC=y_RTC, gate_BC=gate1, scale_BC=scale2, shift_BC=shift2, eps=eps
            )
            y_RTC = layer.mlp(h_RTC)
            if following is None:
                next_scale, next_shift = self.head_2RC
            else:
                _, _, next_scale, _, next_shift, _ = self.rows_6RC[following]
            x_RTC, h_RTC, _, _ = kernels.gated_adaln(
                x_BTC=x_RTC,
                y_BTC=y_RTC,
                gate_BC=gate2,
                scale_BC=next_scale,
                shift_BC=next_shift,
                eps=eps,
            )
        return h_RTC

    def _attention(self, layer: LayerWeights, h_RTC: Tensor, step: KVStep) -> Tensor:
        kernels, cache = self.kernels, self.cache
        rows, tokens, width = h_RTC.shape
        q_RTHD = kernels.norm_append(
            qkv_BT3HD=layer.qkv(h_RTC).view(rows, tokens, 3, self.var.config.num_heads, -1),
            scale_mul_1H11=layer.scale_mul_1H11,
            k_pages_PNHD=cache.k_pages,
            v_pages_PNHD=cache.v_pages,
            slots_BT=step.slots_BT,
            **cache.scales,
        )
        out_RTHD = kernels.attention(
            q_BTHD=q_RTHD,
            k_pages_PNHD=cache.k_pages,
            v_pages_PNHD=cache.v_pages,
            page_table_BM=step.page_table_BM,
            kv_lens_B=step.kv_lens_B,
            softmax_scale=layer.softmax_scale,
            **cache.scales,
        )
        return layer.proj(out_RTHD.view(rows, tokens, width))

    def sample(self, h_RTC: Tensor, scale: int, draws: Draws) -> Tensor:
        """Tokens of one scale, (B, T) int64."""
        images, tokens = len(draws.image_ids_B), h_RTC.shape[1]
        one = 2 * tokens * self.var.config.vocab_size * h_RTC.element_size()
        # A generator draws for all rows at once, in their order.
        part = images if draws.generator is not None else max(1, LOGITS_BYTES // one)
        if part >= images:
            return self._sample_part(h_RTC, scale, draws, draws.image_ids_B)
        parts = []
        for first in range(0, images, part):
            rows = slice(first, first + part)
            h_PTC = h_RTC[:images][rows]
            if draws.guided:
                h_PTC = torch.cat((h_PTC, h_RTC[images:][rows]))
            parts.append(self._sample_part(h_PTC, scale, draws, draws.image_ids_B[rows]))
        return torch.cat(parts)

    def _sample_part(self, h_RTC: Tensor, scale: int, draws: Draws, image_ids_B: Tensor) -> Tensor:
        layout = self.var.layout
        guided = draws.guided and scale > 0
        if guided:
            logits_2BTV = self.weights.head(h_RTC)
        else:
            # Unconditional rows would count nothing: their head is not computed.
            logits_2BTV = self.weights.head(h_RTC[: len(image_ids_B)]).repeat(2, 1, 1)
        exponential_RV = None
        if draws.generator is not None:
            exponential_RV = draw_exponential(logits_2BTV, draws.generator)
        return self.kernels.sample(
            logits_2BTV=logits_2BTV,
            # From 0 at the first scale to cfg at the last.
            guidance=draws.cfg * scale / (layout.num_scales - 1) if guided else 0.0,
            top_k=draws.top_k,
            top_p=draws.top_p,
            seed=draws.seed,
            image_ids_B=image_ids_B,
            position=layout.offsets[scale],
            exponential_RV=exponential_RV,
        )


AfterScale = Callable[[int, Tensor, Tensor], None]


def paint(run: Run, draws: Draws, after_scale: AfterScale | None = None) -> tuple[Tensor, Tensor]:
    """Every scale in turn.

    Args:
        after_scale: called as ``after_scale(k, tokens_BL, f_hat_BEHW)`` after each scale; of the
            tokens only those of scales 0..k are filled.
    Returns:
        tokens_BL int64, f_hat_BEHW float32.
    """
    layout, vae, batch = run.var.layout, run.vae, len(draws.image_ids_B)
    f_hat_BEHW = vae.new_features(batch)
    tokens_BL = torch.empty(batch, layout.total, dtype=torch.int64, device=f_hat_BEHW.device)
    words_BTE = None
    for k in range(layout.num_scales):
        tokens_BT = run.sample(run.hidden(run.tokens_in(words_BTE, k), k), k, draws)
        tokens_BL[:, layout.slice(k)] = tokens_BT
        vae.accumulate(f_hat_BEHW, tokens_BT, k)
        if k + 1 < layout.num_scales:
            words_BTE = vae.next_scale_input(f_hat_BEHW, k)
        if after_scale is not None:
            after_scale(k, tokens_BL, f_hat_BEHW)
    return tokens_BL, f_hat_BEHW


def force(run: Run, tokens_BL: Tensor) -> Tensor:
    """Logits (B, L, V) float32 when the tokens of each scale are given."""
    layout, vae = run.var.layout, run.vae
    f_hat_BEHW = vae.new_features(len(tokens_BL))
    logits, words_BTE = [], None
    for k in range(layout.num_scales):
        logits.append(run.weights.head(run.hidden(run.tokens_in(words_BTE, k), k)).float())
        vae.accumulate(f_hat_BEHW, tokens_BL[:, layout.slice(k)], k)
        if k + 1 < layout.num_scales:
            words_BTE = vae.next_scale_input(f_hat_BEHW, k)
    return torch.cat(logits, dim=1)
