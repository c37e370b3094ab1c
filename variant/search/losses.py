"""Held-out losses of schedules by teacher forcing, scale by scale, and the influence of each layer.

The K/V of a scale depend on the layers of its own and of earlier scales only, as its loss does. So
the K/V of prefixes are kept while they are needed. The images are taken in parts, so small that K
and V of all scales fit into the limit: prefixes in the order of a search by depth run once each.

Axes: N images, B images of a part, L tokens of all scales, T tokens of one scale, S tokens up to
there, C width, H heads, D width of one head, E codebook vector width, V codebook entries, 6 the
parts of a modulation.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from variant.models.var import VAR, token_loss
from variant.models.vqvae import VQVAE
from variant.models.zones import LayerView, zone_of
from variant.search.space import Layers, Prefix
from variant_kernels import adaln_modulate, gated_residual_adaln
from variant_kernels.arguments import instance, integer

# Images at once, at most: enough rows for the matrix products of the first scales.
PART = 64
# Of the K/V of prefixes; those that were not used for longest are computed again.
CACHE_BYTES = 2 * 2**30


@dataclass
class _Part:
    """Some of the images, and what all prefixes share of them."""

    labels_B: Tensor
    tokens_BL: Tensor
    words_BLE: Tensor
    cond_BC: Tensor
    cond: Tensor
    modulations: dict[tuple[int | None, int], tuple[Tensor, ...]] = field(default_factory=dict)


# layer -> K and V of one scale, (B, H, T, D) each
_Scale = dict[int, tuple[Tensor, Tensor]]


class ForcedLosses:
    """The loss of every scale of any schedule on given images; a function of a prefix.

    The losses equal those of ``VAR.forward`` up to rounding.

    Args:
        var, vae: the models.
        labels_N, tokens_NL: of the images, int64.
        part: images at once; fewer where K and V of all scales of so many exceed ``cache_bytes``.
        cache_bytes: of K and V; but those of one schedule and one image are always kept.
    Attributes:
        parts: the images of each part, and a function of a prefix that gives their losses.
        is_whole: whether K and V of one schedule and all images fit into ``cache_bytes``. If not,
            prefixes should be computed part by part.
    Raises:
        TypeError: an argument of another type.  ValueError: no images, or a number below 1.
    """

    def __init__(
        self,
        var: VAR,
        vae: VQVAE,
        labels_N: Tensor,
        tokens_NL: Tensor,
        *,
        part: int = PART,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        op = "ForcedLosses"
        self.var = instance(op, "var", var, VAR)
        part = integer(op, "part", part, 1)
        self.cache_bytes = integer(op, "cache_bytes", cache_bytes, 0)
        if not len(labels_N):
            raise ValueError(f"{op}: labels_N must have one or more images; got none")
        device = var.pos_start.device
        weight = var.word_embed.weight
        tokens = sum(var.layout.tokens[:-1])  # nothing reads K and V of the last scale
        per_image = 2 * var.config.depth * tokens * var.config.embed_dim * weight.element_size()
        fitting = len(labels_N) if not per_image else self.cache_bytes // per_image
        self.is_whole = fitting >= len(labels_N)
        part = max(1, min(part, fitting))
        self._parts = [
            self._part(instance(op, "vae", vae, VQVAE), labels_B, tokens_BL)
            for labels_B, tokens_BL in zip(
                labels_N.to(device).split(part), tokens_NL.to(device).split(part), strict=True
            )
        ]
        with torch.no_grad():
            self._position_1LC = var.position_embedding()
        starts = range(0, len(labels_N), part)
        self.parts = [
            (slice(start, min(start + part, len(labels_N))), partial(self._losses, number))
            for number, start in enumerate(starts)
        ]
        self._kept: OrderedDict[tuple[int, Prefix], _Scale] = OrderedDict()
        self._kept_bytes = 0

    @torch.no_grad()
    def _part(self, vae: VQVAE, labels_B: Tensor, tokens_BL: Tensor) -> _Part:
        cond_BC = self.var.class_emb(labels_B)
        words_BLE = vae.teacher_input(tokens_BL)
        return _Part(labels_B, tokens_BL, words_BLE, cond_BC, self.var.shared_condition(cond_BC))

    @torch.no_grad()
    def __call__(self, prefix: Prefix) -> np.ndarray:
        """(N,) float64: the loss of each image's tokens of the last scale, over L, in nats.

        The sum over the scales of a schedule is its mean loss per token.
        """
        return np.concatenate([losses(prefix) for _, losses in self.parts])

    def forget(self) -> None:
        """Free K and V of all prefixes."""
        self._kept.clear()
        self._kept_bytes = 0

    @torch.no_grad()
    def influence(self) -> list[float]:
        """Of each layer of the full network: 1 - the cosine between the stream before and after it.

        The mean over all tokens; block influence (ShortGPT, arXiv 2403.03853).
        """
        layout = self.var.layout
        every = tuple(range(self.var.config.depth))
        sums = np.zeros(len(every))
        for number in range(len(self._parts)):
            for scale in range(layout.num_scales):
                streams: list[Tensor] = []
                self._run(number, (every,) * (scale + 1), streams)
                for layer in every:
                    cosine = F.cosine_similarity(
                        streams[layer].double(), streams[layer + 1].double(), dim=2
                    )
                    sums[layer] += float((1 - cosine).sum())
        tokens = layout.total * sum(len(part.labels_B) for part in self._parts)
        return (sums / tokens).tolist()

    @torch.no_grad()
    def _losses(self, number: int, prefix: Prefix) -> np.ndarray:
        """(B,) of one part."""
        part, layout = self._parts[number], self.var.layout
        x_BTC = self._run(number, prefix)
        h_BTC = self.var.head_nm(x_BTC, part.cond_BC)
        tokens_BT = part.tokens_BL[:, layout.slice(len(prefix) - 1)]
        loss = token_loss(self.var.head, h_BTC, tokens_BT.contiguous())
        return (loss.losses_BL.double().sum(1) / layout.total).cpu().numpy()

    def _run(self, number: int, prefix: Prefix, streams: list[Tensor] | None = None) -> Tensor:
        """The stream (B, T, C) after the layers of a prefix's last scale.

        Args:
            streams: takes the stream before each layer and after the last.
        """
        keys = [(number, prefix[:end]) for end in range(1, len(prefix))]
        for key in reversed(
            keys
        ):  # what this needs is dropped last, the earliest scale last of all
            if key in self._kept:
                self._kept.move_to_end(key)
        earlier: list[_Scale] = []
        for key in keys:
            kept = self._kept.get(key)
            earlier.append(self._scale(*key, earlier)[1] if kept is None else kept)
        return self._scale(number, prefix, earlier, streams)[0]

    def _scale(
        self,
        number: int,
        prefix: Prefix,
        earlier: Sequence[_Scale],
        streams: list[Tensor] | None = None,
    ) -> tuple[Tensor, _Scale]:
        """The stream (B, T, C) after a prefix's last scale, and its K and V, which are kept.

        Args:
            earlier: K and V of each scale before.
        """
        scale, layers = len(prefix) - 1, prefix[-1]
        part = self._parts[number]
        x_BTC = self._stream(part, scale)
        own: _Scale = {}
        zone = zone_of(self.var.config, layers)
        for layer in layers:
            if streams is not None:
                streams.append(x_BTC)
            view = LayerView(self.var.layers()[layer], zone)
            gate1, gate2, scale1, scale2, shift1, shift2 = self._modulation(part, view, zone, layer)
            eps = view.block.norm_eps
            h_BTC = adaln_modulate(x_BTC, scale1, shift1, eps=eps)
            q_BHTD, k_BHTD, v_BHTD = (x_BTHD.transpose(1, 2) for x_BTHD in view.qkv(h_BTC))
            # Views would keep q alive as well.
            own[layer] = _alone(k_BHTD), _alone(v_BHTD)
            pairs = [*(keys[layer] for keys in earlier), own[layer]]
            k_BHSD, v_BHSD = (torch.cat(tensors, 2) for tensors in zip(*pairs, strict=True))
            out_BHTD = F.scaled_dot_product_attention(
                q_BHTD, k_BHSD, v_BHSD, scale=view.attn.softmax_scale
            )
            y_BTC = view.project("proj", out_BHTD.transpose(1, 2).flatten(2))
            x_BTC, h_BTC = gated_residual_adaln(x_BTC, y_BTC, gate1, scale2, shift2, eps=eps)
            x_BTC = x_BTC + gate2.unsqueeze(1) * view.mlp(h_BTC)
        if streams is not None:
            streams.append(x_BTC)
        if scale + 1 < self.var.layout.num_scales:
            self._keep((number, prefix), own)
        return x_BTC, own

    def _stream(self, part: _Part, scale: int) -> Tensor:
        """The stream (B, T, C) at the start of a scale."""
        var, layout = self.var, self.var.layout
        tokens = layout.slice(scale)
        if scale == 0:
            x_BTC = part.cond_BC.unsqueeze(1) + var.pos_start
        else:
            before = layout.tokens[0]
            words_BTE = part.words_BLE[:, tokens.start - before : tokens.stop - before]
            x_BTC = var.word_embed(words_BTE.to(var.word_embed.weight.dtype))
        return x_BTC + self._position_1LC[:, tokens]

    def _modulation(
        self, part: _Part, view: LayerView, zone: int | None, layer: int
    ) -> tuple[Tensor, ...]:
        key = (zone if view.has_adaln else None), layer
        if key not in part.modulations:
            part.modulations[key] = view.modulation(part.cond).unbind(1)
        return part.modulations[key]

    def _keep(self, key: tuple[int, Prefix], own: _Scale) -> None:
        self._kept[key] = own
        self._kept_bytes += _bytes(own)
        # K and V just made are needed in any case.
        while self._kept_bytes > self.cache_bytes and len(self._kept) > 1:
            oldest, dropped = next(iter(self._kept.items()))
            del self._kept[oldest]
            self._kept_bytes -= _bytes(dropped)


def _alone(x: Tensor) -> Tensor:
    """The tensor, contiguous, in memory that it fills."""
    x = x.contiguous()
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone()


def _bytes(scale: _Scale) -> int:
    """Of the memory that is alive with them."""
    storages = [tensor.untyped_storage() for pair in scale.values() for tensor in pair]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def loss_of(losses: ForcedLosses, schedule: Prefix) -> np.ndarray:
    """(N,) float64: the mean loss per token of each image under a whole schedule, in nats."""
    return sum((losses(schedule[:end]) for end in range(1, len(schedule) + 1)), np.zeros(1))


def subnet_schedule(layers: Layers, full_depth: int, num_scales: int, bridge: int) -> Prefix:
    """Every layer before the bridge, then these."""
    return (tuple(range(full_depth)),) * bridge + (layers,) * (num_scales - bridge)


def depths_text(schedule: Sequence[Layers]) -> str:
    """``8 8 8 8 4 2``."""
    return " ".join(str(len(layers)) for layers in schedule)
