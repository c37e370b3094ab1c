"""The entropy term of the VQ-VAE's loss: sure choices, and all codes alike.

Every vector chooses among the codes by a softmax over squared distances. The term is the mean
entropy of these choices, which falls when each is sure, minus the entropy of the mean choice, which
grows when all codes are chosen alike (MAGVIT-v2, arXiv 2310.05737, equation 5).

Axes: R vectors, C codebook width, V codebook entries, B images, H W the feature map.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from variant.models.quantizer import MultiScaleQuantizer
from variant.training.distributed import Ranks

LEAST_SPREAD = 1e-12  # of codes that are all one


def entropy_term(
    vectors_RC: Tensor, codes_VC: Tensor, temperature: float, ranks: Ranks | None = None
) -> Tensor:
    """Mean entropy of the vectors' choices minus that of the mean choice, in nats; a scalar.

    The gradient flows to the vectors and to the codes. With several processes the mean choice is
    that of the vectors of all; the mean over the processes, weighted by their number of vectors, of
    what each returns is the term of all vectors.

    Args:
        temperature: of the softmax, in units of the mean squared distance of two codes.
    """
    ranks = ranks or Ranks()
    with torch.no_grad():  # the spread: twice the variance, as of two codes drawn independently
        spread = (2 * codes_VC.var(dim=0, correction=0).sum()).clamp(min=LEAST_SPREAD)
        center_C = codes_VC.mean(dim=0)
    # Distances do not depend on the origin; far from it their terms would cancel.
    vectors_RC, codes_VC = vectors_RC - center_C, codes_VC - center_C
    squares_R1 = vectors_RC.square().sum(dim=1, keepdim=True)
    distance_RV = squares_R1 - 2 * vectors_RC @ codes_VC.T + codes_VC.square().sum(dim=1)
    log_RV = F.log_softmax(-distance_RV / (temperature * spread), dim=1)
    choice_RV = log_RV.exp()
    of_choices = -(choice_RV * log_RV).sum(dim=1).mean()
    total_V = choice_RV.sum(dim=0)
    count = ranks.sums([float(len(vectors_RC))])[0]
    mean_V = ranks.added(total_V.detach()) / count
    log_mean_V = mean_V.clamp(min=torch.finfo(mean_V.dtype).tiny).log()
    # d(sum p log p) = sum (log p) dp, because the changes of a mean choice p add up to 0; this
    # process's part of dp is that of its own vectors.
    own_V = total_V / len(vectors_RC)
    change = (own_V * log_mean_V).sum()
    return of_choices + (mean_V * log_mean_V).sum() + change - change.detach()


class EntropyLoss:
    """Collects the entropy terms of the scales that one forward pass quantises.

    Args:
        weight: of the mean over these scales.  temperature: of :func:`entropy_term`.
    """

    def __init__(
        self, quantizer: MultiScaleQuantizer, weight: float, temperature: float, ranks: Ranks
    ) -> None:
        self.quantizer, self.weight, self.ranks = quantizer, weight, ranks
        self.temperature = temperature
        self._terms: list[Tensor] = []

    def add(self, rest_BCHW: Tensor, k: int) -> None:
        """Call with the residual that scale k quantises, which has a gradient to the features."""
        if self.weight == 0:
            return
        codes_VC = self.quantizer.embedding.weight
        vectors_RC = self.quantizer.residual_vectors(rest_BCHW, k)
        if self.quantizer.config.using_znorm:
            vectors_RC, codes_VC = F.normalize(vectors_RC, dim=1), F.normalize(codes_VC, dim=1)
        self._terms.append(entropy_term(vectors_RC, codes_VC, self.temperature, self.ranks))

    def take(self) -> Tensor | None:
        """The mean of the collected terms, before its weight; None without a weight."""
        terms, self._terms = self._terms, []
        return torch.stack(terms).mean() if terms else None
