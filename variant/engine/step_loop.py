"""The step loop: generates one batch scale by scale through a paged cache.

The modules of ``models/var.py`` process all scales at once, for training. Here the same weights
process one scale at a time, in the layers that the schedule lists for it.

Axes: B images, R sequences (B, or 2B with guidance: conditional sequences first), T tokens of this
scale, L tokens of all scales, C width, H heads, D width of one head, V codebook entries, E codebook
vector width, H W (after E) the feature map, 6 the parts of a layer's modulation (gates, scales,
shifts; each of attention, then of the MLP).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from variant.engine.arguments import GivenTokens
from variant.engine.drawing import Drawer
from variant.engine.generation import Sampling
from variant.engine.kernels import Launchers
from variant.engine.weights import EngineWeights, LayerWeights
from variant.models.var import VAR
from variant.models.vqvae import VQVAE
from variant.models.zones import zone_of
from variant_kernels import DepthSchedule, KVStep, PagedKVCache


@dataclass(frozen=True)
class TokenBatch:
    """One generated batch before it is decoded.

    tokens_BL: (B, L) int64.  f_hat_BEHW: (B, E, H, W) float32, the decoder's input.  schedule: the
    layers that ran.  allocated_bytes, peak_bytes: of the K/V cache, allocated and in use at most.
    log_probs_BL: (B, L) float32 if asked for.
    """

    tokens_BL: Tensor
    f_hat_BEHW: Tensor
    schedule: DepthSchedule
    allocated_bytes: int
    peak_bytes: int
    log_probs_BL: Tensor | None = None


class BatchState:
    """One batch while it is generated: cache, condition and modulations.

    Launchers and weights are fixed when it starts: another thread or a callback that changes the
    engine does not change this batch.

    Args:
        var, vae: the models.
        launchers, weights: of the engine.
        cache: of ``len(labels_R)`` sequences, empty.
        labels_R: (R,) int64 on the device; ``num_classes`` stands for no class.
        zones: the subnets whose zone weights this batch may use.
    """

    def __init__(
        self,
        var: VAR,
        vae: VQVAE,
        *,
        launchers: Launchers,
        weights: EngineWeights,
        cache: PagedKVCache,
        labels_R: Tensor,
        zones: Collection[int] = (),
    ) -> None:
        self.var, self.vae = var, vae
        self.launchers, self.weights, self.cache = launchers, weights, cache
        self.cond_RC = var.class_emb(labels_R)
        shape = len(labels_R), var.config.embed_dim
        if self.cond_RC.shape != shape:  # another module in its place; kernels rely on the width
            raise ValueError(
                f"Engine: var.class_emb must return {shape}; got {tuple(self.cond_RC.shape)}"
            )
        self.head_modulation_2RC = weights.head_modulation(self.cond_RC)
        shared = dict(enumerate(weights.modulations(self.cond_RC)))
        self._layers: dict[int | None, Mapping[int, LayerWeights]] = {
            None: dict(enumerate(weights.layers))
        }
        self._modulations: dict[int | None, Mapping[int, tuple[Tensor, ...]]] = {None: shared}
        for depth in zones:
            zone = weights.zone(depth)
            self._layers[depth] = zone.layers
            self._modulations[depth] = shared
            if zone.modulations is not None:
                own = zone.modulations(self.cond_RC)
                self._modulations[depth] = dict(zip(zone.active, own, strict=True))

    @property
    def schedule(self) -> DepthSchedule:
        """Layers per scale; :meth:`switch` changes the scales that have not started."""
        return self.cache.schedule

    def switch(self, scale: int, layers: Sequence[int]) -> None:
        """From ``scale`` on, run only ``layers``."""
        if scale < self.var.layout.num_scales:
            self.cache.switch(self.schedule.switched(scale, layers))

    def tokens_in(self, words_BTE: Tensor | None, scale: int) -> Tensor:
        """Residual stream at the start of a scale, (R, T, C) float32."""
        weights = self.weights
        position_1TC = weights.position_1LC[:, self.var.layout.slice(scale)]
        if words_BTE is None:
            return self.cond_RC.float().unsqueeze(1) + weights.pos_start + position_1TC
        words_BTC = weights.word_embed(words_BTE) + position_1TC
        return words_BTC.repeat(self.cond_RC.shape[0] // words_BTC.shape[0], 1, 1)

    def hidden(self, x_RTC: Tensor, scale: int) -> Tensor:
        """Hidden states (R, T, C) after the active layers of a scale and the norm of the head."""
        launchers, eps = self.launchers, self.var.config.norm_eps
        active = self.schedule.active_layers(scale)
        zone = zone_of(self.var.config, active)
        layers, modulation_6RC = self._layers[zone], self._modulations[zone]
        _, _, scale1, _, shift1, _ = modulation_6RC[active[0]]
        h_RTC, _, _ = launchers.adaln(x_BTC=x_RTC, scale_BC=scale1, shift_BC=shift1, eps=eps)
        for index, following in zip(active, (*active[1:], None), strict=True):
            layer = layers[index]
            gate1, gate2, _, scale2, _, shift2 = modulation_6RC[index]
            step = self.cache.open(index, scale)
            y_RTC = self._attention(layer, h_RTC, step)
            self.cache.close(index, scale)
            of_first, of_second = launchers.left_sum(y_RTC, gate1)
            x_RTC, h_RTC, _, _ = launchers.gated_adaln(
                x_BTC=x_RTC,
                y_BTC=y_RTC,
                gate_BC=gate1,
                scale_BC=scale2,
                shift_BC=shift2,
                eps=eps,
                **of_first,
            )
            y_RTC = layer.mlp(h_RTC)
            if following is None:
                next_scale, next_shift = self.head_modulation_2RC
            else:
                _, _, next_scale, _, next_shift, _ = modulation_6RC[following]
            x_RTC, h_RTC, _, _ = launchers.gated_adaln(
                x_BTC=x_RTC,
                y_BTC=y_RTC,
                gate_BC=gate2,
                scale_BC=next_scale,
                shift_BC=next_shift,
                eps=eps,
                **of_second,
            )
        return h_RTC

    def _attention(self, layer: LayerWeights, h_RTC: Tensor, step: KVStep) -> Tensor:
        launchers, cache = self.launchers, self.cache
        num_sequences, tokens, width = h_RTC.shape
        qkv_RT3C = layer.qkv(h_RTC).to(launchers.attention_dtype)
        of_append, of_attention = launchers.query_norm(layer.scale_mul_1H11)
        q_RTHD = launchers.norm_append(
            qkv_BT3HD=qkv_RT3C.view(num_sequences, tokens, 3, self.var.config.num_heads, -1),
            scale_mul_1H11=layer.scale_mul_1H11,
            k_pages_PNHD=cache.k_pages,
            v_pages_PNHD=cache.v_pages,
            slots_BT=step.slots_BT,
            **cache.scales,
            **of_append,
        )
        out_RTHD = launchers.attention(
            q_BTHD=q_RTHD,
            k_pages_PNHD=cache.k_pages,
            v_pages_PNHD=cache.v_pages,
            page_table_BM=step.page_table_BM,
            kv_lens_B=step.kv_lens_B,
            softmax_scale=layer.softmax_scale,
            consecutive=step.consecutive,
            **cache.scales,
            **of_attention,
        )
        return layer.proj(out_RTHD.view(num_sequences, tokens, width).to(h_RTC.dtype))


AfterScale = Callable[[int, Tensor, Tensor], None]


def generate_tokens(
    state: BatchState,
    sampling: Sampling,
    image_ids_B: Tensor,
    after_scale: AfterScale | None = None,
    *,
    given: GivenTokens | None = None,
    log_probs: bool = False,
) -> TokenBatch:
    """Generates the tokens of one batch, scale by scale.

    Args:
        state: of the batch; its cache is empty.
        image_ids_B: (B,) int64; with the seed they determine the random numbers of each image.
        after_scale: called as ``after_scale(k, tokens_BL, f_hat_BEHW)`` after each scale; only the
            tokens of scales 0..k are set.
        given: tokens of the batch that stay, on the device.
        log_probs: whether to return the log-probability of each token.
    """
    layout, vae, batch = state.var.layout, state.vae, len(image_ids_B)
    f_hat_BEHW = vae.new_features(batch)
    tokens_BL = torch.empty(batch, layout.total, dtype=torch.int64, device=f_hat_BEHW.device)
    log_probs_BL = torch.empty_like(tokens_BL, dtype=torch.float32) if log_probs else None
    drawer = Drawer(
        layout,
        state.launchers,
        head=state.weights.head,
        codes_VE=vae.quantize.embedding.weight.detach(),
        sampling=sampling,
        image_ids_B=image_ids_B,
        given=given,
        log_probs=log_probs,
    )
    words_BTE = None
    for k in range(layout.num_scales):
        drawn = drawer.draw(state.hidden(state.tokens_in(words_BTE, k), k), k)
        tokens_BL[:, layout.slice(k)] = drawn.tokens_BT
        if log_probs_BL is not None and drawn.log_probs_BT is not None:
            log_probs_BL[:, layout.slice(k)] = drawn.log_probs_BT
        if drawn.codes_BTE is None:
            vae.accumulate(f_hat_BEHW, drawn.tokens_BT, k)
        else:
            vae.accumulate_codes(f_hat_BEHW, drawn.codes_BTE, k)
        if k + 1 < layout.num_scales:
            words_BTE = vae.next_scale_input(f_hat_BEHW, k)
        if after_scale is not None:
            after_scale(k, tokens_BL, f_hat_BEHW)
    cache = state.cache
    return TokenBatch(
        tokens_BL, f_hat_BEHW, state.schedule, cache.allocated_bytes, cache.peak_bytes, log_probs_BL
    )


def teacher_forced_logits(state: BatchState, tokens_BL: Tensor) -> Tensor:
    """Logits (B, L, V) float32 for given tokens of every scale, (B, L) int64."""
    layout, vae = state.var.layout, state.vae
    f_hat_BEHW = vae.new_features(len(tokens_BL))
    logits, words_BTE = [], None
    for k in range(layout.num_scales):
        logits.append(state.weights.head(state.hidden(state.tokens_in(words_BTE, k), k)).float())
        vae.accumulate(f_hat_BEHW, tokens_BL[:, layout.slice(k)], k)
        if k + 1 < layout.num_scales:
            words_BTE = vae.next_scale_input(f_hat_BEHW, k)
    return torch.cat(logits, dim=1)
