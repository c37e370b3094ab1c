"""The codebook while the VQ-VAE trains: scales that are left out, and codes that nothing uses.

Everything that is drawn follows from the seed, the step and the batch over all processes, so that
several processes train the codebook that one process trains.

Axes: B images, I channels, Y X pixels, V codebook entries, C codebook width, R vectors of a
process's part of the batch, M moved codes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from variant.data.images import stream
from variant.models.vqvae import VQVAE
from variant.training.code_entropy import EntropyLoss
from variant.training.code_use import CodeUse, HeldOutUse
from variant.training.distributed import Ranks
from variant.training.recipe import Recipe

CODES = "quantize.embedding.weight"  # the codebook's name among the parameters of a VQ-VAE
STREAM_REVIVE, STREAM_SCALES = 5, 6
# A code is unused if a batch uses it less than this share of the average code.
UNUSED = 0.03
# Vectors whose distances from all codes are in memory at once: 256 MiB at 4,096 codes.
KMEANS_ROWS = 2**14


class CodebookTraining:
    """What a run of the VQ-VAE does for its codebook besides the gradient.

    Args:
        steps: optimiser steps of the complete run.
        measure: gets what is reported of each step: key, value and, of a mean, its weight.
        ranks: the processes of the run; None is this one alone.
    """

    def __init__(
        self,
        vae: VQVAE,
        recipe: Recipe,
        steps: int,
        measure: Callable[..., None],
        ranks: Ranks | None = None,
    ) -> None:
        self.vae, self.seed, self.steps = vae, recipe.seed, steps
        self.training = recipe.vae_training
        self.ranks = ranks or Ranks()
        self.last_revival = int(self.training.revive_until * steps)
        self.measure = measure
        self.use = CodeUse(vae.quantize, self.ranks, measure)
        training = self.training
        self.entropy = EntropyLoss(
            vae.quantize, training.entropy, training.entropy_temperature, self.ranks
        )
        vae.quantize.on_scale = self._on_scale

    def _on_scale(self, rest_BCHW: Tensor, tokens_BN: Tensor, k: int) -> None:
        self.use.add(tokens_BN, k)
        self.entropy.add(rest_BCHW, k)

    def loss(self, num_images: int) -> Tensor | float:
        """What the codebook adds to the loss of the forward pass before it: the entropy term.

        Args:
            num_images: of that pass.
        """
        term = self.entropy.take()
        if term is None:
            return 0.0
        self.measure("loss/entropy", term, num_images)
        return self.training.entropy * term

    def end_step(self) -> None:
        """Call after the last part of a step's batch."""
        self.use.end_step()

    def held_out_use(self, own: slice) -> HeldOutUse:
        """A count of the codes of held-out images.  Args: own: those of this process."""
        shape = (self.vae.layout.num_scales, self.vae.config.vocab_size)
        return HeldOutUse(own, shape, self.vae.quantize.embedding.weight.device)

    def num_scales(self, step: int) -> int:
        """Number of first scales that the step's images are reconstructed from.

        All of them, except in a share of the steps that draws their number uniformly. The share
        falls linearly to 0 at the end of training.
        """
        scales = self.vae.layout.num_scales
        rng = stream(self.seed, step, STREAM_SCALES)
        is_cut = rng.random() < self.training.scale_dropout * (1 - step / self.steps)
        return int(rng.integers(1, scales)) if is_cut and scales > 1 else scales

    def revives_at(self, step: int) -> bool:
        """Whether codes are moved before this step."""
        every = self.training.revive_every
        if step == 0 and self.training.kmeans > 0:
            return True
        return every > 0 and step <= self.last_revival and step % every == 0

    def revive(self, images_BIYX: Tensor, step: int) -> Tensor:
        """Move unused codes; the first step moves every code of a new codebook, so that all
        start as features.

        Args:
            images_BIYX: this process's part of the step's batch (:meth:`Ranks.share`).
        Returns:
            as :func:`revive_codes`.
        """
        rng = stream(self.seed, step, STREAM_REVIVE)
        is_new = step == 0 and self.training.start_weights is None
        kmeans = self.training.kmeans if is_new else 0
        return revive_codes(
            self.vae,
            images_BIYX,
            rng,
            ranks=self.ranks,
            every_code=is_new,
            kmeans=kmeans,
            parts=1 if self.training.optim is None else self.training.optim.accumulate,
        )


@torch.no_grad()
def revive_codes(
    module: VQVAE,
    images_BIYX: Tensor,
    rng: np.random.Generator,
    *,
    ranks: Ranks | None = None,
    every_code: bool = False,
    kmeans: int = 0,
    parts: int = 1,
) -> Tensor:
    """Move codes that this batch does not use onto features of the batch.

    The features are the residuals that each scale quantises. A moved code equals one of them, so it
    is the nearest code of at least one position.

    Args:
        images_BIYX: in [-1, 1]; with several processes, this one's part of the batch.
        rng: chooses the features; in the same state on every process.
        ranks: the processes of the run; None is this one alone.
        every_code: move the used codes too.
        kmeans: iterations of :func:`kmeans_means` over all features, from the moved codes.
        parts: number of parts of the images, one of which at a time is in the encoder's memory.
    Returns:
        bool (V,): the moved codes, the same on every process.
    """
    quantizer, ranks = module.quantize, ranks or Ranks()
    features_RC, tokens_R, rows_R, count = _features(module, images_BIYX, ranks, parts)
    vocab_size = quantizer.config.vocab_size
    uses_V = ranks.added(tokens_R.bincount(minlength=vocab_size))
    unused_V = (uses_V < UNUSED * count / vocab_size) | every_code
    num_unused = int(unused_V.sum())
    chosen_M = rng.choice(count, num_unused, replace=count < vocab_size)
    # Each feature is on one process; the others add zeros.
    place_M = np.searchsorted(rows_R, chosen_M).clip(max=len(rows_R) - 1)
    is_own_M1 = torch.from_numpy(rows_R[place_M] == chosen_M).to(features_RC.device)[:, None]
    moved_MC = features_RC[torch.from_numpy(place_M).to(features_RC.device)]
    moved_MC = ranks.added(moved_MC.where(is_own_M1, 0.0))
    if kmeans:
        is_normalised = quantizer.config.using_znorm
        moved_MC = kmeans_means(features_RC, moved_MC, kmeans, ranks, is_normalised=is_normalised)
    quantizer.embedding.weight[unused_V] = moved_MC
    return unused_V


def kmeans_means(
    vectors_RC: Tensor,
    means_MC: Tensor,
    iterations: int,
    ranks: Ranks | None = None,
    *,
    is_normalised: bool = False,
) -> Tensor:
    """The means of clusters by Lloyd's algorithm, (M, C); one without vectors stays where it is.

    Args:
        vectors_RC: of this process; clusters are those of the vectors of all.
        means_MC: to start from, the same on every process.
        is_normalised: cluster the directions of the vectors.
    """
    ranks = ranks or Ranks()
    if is_normalised:
        vectors_RC, means_MC = F.normalize(vectors_RC, dim=1), F.normalize(means_MC, dim=1)
    for _ in range(iterations):
        # In float64, so that the order of the sum does not show. The last column counts.
        sums_MC = means_MC.new_zeros(len(means_MC), means_MC.shape[1] + 1, dtype=torch.float64)
        for part_RC in vectors_RC.split(KMEANS_ROWS):
            distance_RM = means_MC.square().sum(dim=1) - 2 * part_RC @ means_MC.T
            ones_R1 = part_RC.new_ones(len(part_RC), 1)
            counted = torch.cat((part_RC, ones_R1), dim=1).double()
            sums_MC.index_add_(0, distance_RM.argmin(dim=1), counted)
        sums_MC = ranks.added(sums_MC)
        counts_M1 = sums_MC[:, -1:]
        new_MC = (sums_MC[:, :-1] / counts_M1.clamp(min=1)).to(means_MC.dtype)
        if is_normalised:
            new_MC = F.normalize(new_MC, dim=1)
        means_MC = new_MC.where(counts_M1 > 0, means_MC)
    return means_MC


def _features(
    module: VQVAE, images_BIYX: Tensor, ranks: Ranks, parts: int
) -> tuple[Tensor, Tensor, np.ndarray, int]:
    """The residuals that the scales quantise, scale by scale.

    Returns:
        of this process: the residuals (R, C), their tokens (R,) and their ascending numbers (R,)
        among those of all processes; the count of the latter.
    """
    quantizer, layout, own = module.quantize, module.layout, len(images_BIYX)
    batches = ranks.sums([float(own) if rank == ranks.rank else 0.0 for rank in range(ranks.size)])
    first, batch = int(sum(batches[: ranks.rank])), int(sum(batches))
    # As few images at once as a step encodes; none of the parts is empty.
    of_parts = images_BIYX.tensor_split(min(parts, own))
    residual_BCHW = torch.cat([module.features(part).float() for part in of_parts])
    features, tokens, rows = [], [], []
    for k in range(layout.num_scales):
        of_scale_RC = quantizer.residual_vectors(residual_BCHW, k)
        tokens_R = quantizer.nearest(of_scale_RC)
        residual_BCHW = residual_BCHW - quantizer.contribution(tokens_R.view(own, -1), k)
        features.append(of_scale_RC)
        tokens.append(tokens_R)
        where = layout.slice(k)
        size = where.stop - where.start
        rows.append(batch * where.start + first * size + np.arange(own * size))
    return torch.cat(features), torch.cat(tokens), np.concatenate(rows), batch * layout.total
