"""Draws the tokens of one scale: logits, guidance, temperature, filters, given tokens.

Axes: B images, R sequences (B, or 2B with guidance: conditional sequences first), T tokens of this
scale, C width, V codebook entries, E codebook vector width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from variant.engine.arguments import GivenTokens
from variant.engine.generation import Sampling
from variant.engine.kernels import Launchers
from variant_kernels import ScaleLayout
from variant_kernels.ops.sample_tokens import (
    draw_exponential,
    filter_logits,
    guide,
    philox_4x32,
)

# Limit for the logits of one call of the head; larger batches are split. At batch 64 the logits of
# the last scale would otherwise be the largest tensors of a generation.
LOGITS_BYTES = 64 * 2**20

# Bytes of temporary tensors per conditional logit: float32 copies, sorted copies with their
# indices, and the 64-bit words of the random numbers.
SMOOTH_BYTES = 96
LOG_PROBS_BYTES = 12
TEMPERATURE_BYTES = 16


def extra_logit_bytes(sampling: Sampling, log_probs: bool) -> int:
    """Bytes per conditional logit of what a plain draw does not need.

    With log-probabilities always those of a temperature: a teacher-forced pass, which has none,
    then runs the head on the same rows. A product of other rows may differ in its last bits.
    """
    return (
        SMOOTH_BYTES * sampling.more_smooth
        + LOG_PROBS_BYTES * log_probs
        + TEMPERATURE_BYTES * (log_probs or sampling.temperature != 1)
    )


@dataclass(frozen=True)
class Drawn:
    """tokens_BT: int64.  codes_BTE: mixtures of codes, or None: the codes of the tokens.

    log_probs_BT: float32, of the tokens; None unless asked for.
    """

    tokens_BT: Tensor
    codes_BTE: Tensor | None
    log_probs_BT: Tensor | None


@dataclass(frozen=True)
class Drawer:
    """Draws tokens from hidden states.

    Args:
        layout: of the model.
        launchers: of the engine.
        head: hidden states (R, T, C) to logits (R, T, V).
        codes_VE: the codebook.
        sampling: of the request.
        image_ids_B: (B,) int64.
        given: tokens that stay; None draws all.
        log_probs: whether to return the log-probability of each token.
    """

    layout: ScaleLayout
    launchers: Launchers
    head: Callable[[Tensor], Tensor]
    codes_VE: Tensor
    sampling: Sampling
    image_ids_B: Tensor
    given: GivenTokens | None = None
    log_probs: bool = False

    def draw(self, h_RTC: Tensor, scale: int) -> Drawn:
        """The tokens of one scale."""
        images = len(self.image_ids_B)
        part = self._images_per_part(h_RTC)
        # A generator draws for all sequences in one call, in their order.
        if part >= images or self.sampling.generator is not None:
            return self._draw_part(h_RTC, scale, slice(None))
        parts = [
            self._draw_part(h_PTC, scale, slice(first, first + part))
            for first, h_PTC in zip(
                range(0, images, part), self._parts(h_RTC, images, part), strict=True
            )
        ]
        return Drawn(
            torch.cat([drawn.tokens_BT for drawn in parts]),
            _joined([drawn.codes_BTE for drawn in parts]),
            _joined([drawn.log_probs_BT for drawn in parts]),
        )

    def _images_per_part(self, h_RTC: Tensor) -> int:
        extra = extra_logit_bytes(self.sampling, self.log_probs)
        one = h_RTC.shape[1] * len(self.codes_VE) * (2 * h_RTC.element_size() + extra)
        return max(1, LOGITS_BYTES // one)

    def _parts(self, h_RTC: Tensor, images: int, part: int) -> Iterator[Tensor]:
        """The sequences of ``part`` images after another, conditional ones first."""
        for first in range(0, images, part):
            yield torch.cat([half[first : first + part] for half in h_RTC.split(images)])

    def _all_logits(self, h_RTC: Tensor, images: int) -> Tensor:
        """The head on sequences that a generator draws for at once.

        With log-probabilities in the parts that a pass without a generator has, to have its bits.
        """
        part = self._images_per_part(h_RTC)
        if self.sampling.generator is None or not self.log_probs or part >= images:
            return self.head(h_RTC)
        logits = [self.head(h_PTC) for h_PTC in self._parts(h_RTC, images, part)]
        halves = [x.chunk(len(h_RTC) // images) for x in logits]
        return torch.cat([x for half in zip(*halves, strict=True) for x in half])

    def _draw_part(self, h_RTC: Tensor, scale: int, images: slice) -> Drawn:
        """The tokens of some images; h_RTC holds their sequences."""
        ids_B, sampling, layout = self.image_ids_B[images], self.sampling, self.layout
        given = self.given
        kept = given is not None and scale in given.kept_scales and sampling.generator is None
        guidance = sampling.guidance(scale, layout.num_scales)
        logits_2BTV, tokens_BT, codes_BTE, log_probs_BT = None, None, None, None
        if not kept or self.log_probs:
            if isinstance(guidance, Tensor) or guidance > 0:
                logits_2BTV = self._all_logits(h_RTC, len(ids_B))
            else:
                # The unconditional logits would have weight 0: they are not computed.
                h_BTC = h_RTC[: len(ids_B)]
                logits_2BTV = self._all_logits(h_BTC, len(ids_B)).repeat(2, 1, 1)
        if logits_2BTV is not None and not kept:
            tokens_BT, codes_BTE = self._sample(logits_2BTV, guidance, scale, ids_B)
        if given is not None:
            given_BT, keep_BT = given.of_scale(layout.slice(scale), images)
            tokens_BT = given_BT if tokens_BT is None else given_BT.where(keep_BT, tokens_BT)
            if codes_BTE is not None:
                codes_BTE = self.codes_VE[given_BT].where(keep_BT.unsqueeze(-1), codes_BTE)
        assert tokens_BT is not None
        if self.log_probs and logits_2BTV is not None:
            log_probs_BT = token_log_probs(logits_2BTV[: len(ids_B)], tokens_BT)
        return Drawn(tokens_BT, codes_BTE, log_probs_BT)

    def _sample(
        self, logits_2BTV: Tensor, guidance: float | Tensor, scale: int, ids_B: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, T) and, with ``more_smooth``, mixtures of codes (B, T, E)."""
        sampling, temperature = self.sampling, self.sampling.temperature_at(scale)
        sample = self.launchers.sample
        if temperature != 1:
            # In float32: a 16-bit quotient would be rounded once more.
            logits_2BTV, sample = logits_2BTV.float() / temperature, self.launchers.sample_float32
        exponential_RV = None
        if sampling.generator is not None:
            exponential_RV = draw_exponential(logits_2BTV, sampling.generator)
        seed = 0 if sampling.seed is None else sampling.seed
        tokens_BT = sample(
            logits_2BTV=logits_2BTV,
            guidance=guidance,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            seed=seed,
            image_ids_B=ids_B,
            position=self.layout.offsets[scale],
            exponential_RV=exponential_RV,
        )
        if not sampling.more_smooth:
            return tokens_BT, None
        kept_BTV = filter_logits(
            guide(logits_2BTV, float(guidance)), sampling.top_k, sampling.top_p
        )
        if sampling.generator is not None:
            noise_BTV = torch.empty_like(kept_BTV, memory_format=torch.contiguous_format)
            noise_BTV = -noise_BTV.exponential_(generator=sampling.generator).log()
        else:
            noise_BTV = gumbel_noise(
                int(seed), ids_B, self.layout.offsets[scale], *kept_BTV.shape[1:]
            )
        return tokens_BT, self._mixture(kept_BTV, noise_BTV, scale)

    def _mixture(self, kept_BTV: Tensor, noise_BTV: Tensor, scale: int) -> Tensor:
        """Mixtures of codes (B, T, E) by the Gumbel softmax (arXiv 1611.01144).

        Sharper from scale to scale: the temperature falls from 0.27, and the logits grow.
        """
        progress = scale / (self.layout.num_scales - 1) if scale else 0.0
        temperature = max(0.27 * (1 - 0.95 * progress), 0.005)
        weights_BTV = ((kept_BTV * (1 + progress) + noise_BTV) / temperature).softmax(-1)
        return weights_BTV @ self.codes_VE.float().unsqueeze(0)


def token_log_probs(logits_BTV: Tensor, tokens_BT: Tensor) -> Tensor:
    """(B, T) float32: the log-softmax of the float32 logits at the tokens."""
    log_probs_BTV = logits_BTV.float().log_softmax(-1)
    return log_probs_BTV.gather(-1, tokens_BT.unsqueeze(-1)).squeeze(-1)


def gumbel_noise(
    seed: int, image_ids_B: Tensor, position: int, tokens: int, entries: int
) -> Tensor:
    """(B, T, V) float32 from the standard Gumbel distribution, keyed by (seed, image, position).

    Philox blocks from 1 on; the draw of a token uses block 0 of its position.
    """
    mask, device = 0xFFFFFFFF, image_ids_B.device
    image_B11 = image_ids_B.view(-1, 1, 1)
    position_T1 = (position + torch.arange(tokens, device=device)).unsqueeze(1)
    # Four 32-bit words per block.
    block_N = 1 + torch.arange(-(-entries // 4), device=device)
    counter = torch.broadcast_tensors(
        position_T1, block_N, image_B11 & mask, (image_B11 >> 32) & mask
    )
    words = philox_4x32(counter, (seed & mask, (seed >> 32) & mask))
    words_BTV = torch.stack(words, -1).flatten(2)[..., :entries]
    # Halfway between two multiples of 2^-32: never 0 or 1. float64: 1 - 2^-33 is no float32.
    uniform_BTV = (words_BTV.double() + 0.5) * 2.0**-32
    return -(-uniform_BTV.log()).log().float()


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    tensors = [part for part in parts if part is not None]
    return torch.cat(tensors) if tensors else None
