"""Inception Score, precision and recall of features, with the conventions of the ADM evaluator.

Axes: N, M images, D features, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from variant_kernels.arguments import integer
from variant_kernels.wording import counted

# Images of one split of the Inception Score, and neighbours of precision and recall, of ADM.
SPLIT, NEIGHBOURS = 5000, 3
# Rows of a block of distances.
BLOCK = 1024
# Distances are compared up to rounding, in units of the squared norms of both images: equal
# features are equal whatever the sizes of the blocks.
TOLERANCE = 1e-12


@dataclass(frozen=True)
class InceptionScore:
    """mean and standard deviation over the splits; ``splits`` is their number."""

    mean: float
    std: float
    splits: int


def inception_score(logits_NC: Tensor, split: int = SPLIT) -> InceptionScore:
    """exp of the mean KL divergence of an image's classes from those of all images.

    Salimans et al. 2016, "Improved techniques for training GANs", section 4. The splits are
    sequential, as in the ADM evaluator: the order of the images counts. The last one may be
    smaller.

    Args:
        logits_NC: of any floating dtype.
        split: images of a split.
    Raises:
        ValueError: no images, or values that are not finite.
    """
    integer("inception_score", "split", split, 1)
    _check("inception_score", "logits", logits_NC, 1)
    log_p_NC = logits_NC.double().log_softmax(1)
    p_NC = log_p_NC.exp()
    scores = []
    for p, log_p in zip(p_NC.split(split), log_p_NC.split(split), strict=True):
        # logsumexp, not the log of the mean: a class that no image has gives 0 and no NaN.
        log_mean = (
            log_p.logsumexp(0) - torch.tensor(float(len(p)), dtype=p.dtype, device="cpu").log()
        )
        divergence = torch.where(p > 0, p * (log_p - log_mean), 0.0).sum(1).mean()
        scores.append(float(divergence.exp()))
    values = torch.tensor(scores, dtype=torch.float64, device="cpu")
    return InceptionScore(float(values.mean()), float(values.std(correction=0)), len(scores))


@dataclass(frozen=True)
class PrecisionRecall:
    """Shares of images.

    precision: generated images inside the balls of real ones.
    recall: real images inside the balls of generated ones.
    """

    precision: float
    recall: float


def precision_recall(
    *, generated_ND: Tensor, real_MD: Tensor, neighbours: int = NEIGHBOURS
) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al. 2019, equations 1 and 2).

    An image's ball reaches to its k-th nearest neighbour in its own set. Both sets are given by
    name: in their order nothing can be swapped.

    Args:
        generated_ND, real_MD: features of any floating dtype.
        neighbours: k.
    Raises:
        ValueError: the numbers of features differ, a set has no k-th neighbour, or values are not
            finite.
    """
    integer("precision_recall", "neighbours", neighbours, 1)
    _check("precision_recall", "generated features", generated_ND, neighbours + 1)
    _check("precision_recall", "real features", real_MD, neighbours + 1)
    if generated_ND.shape[1] != real_MD.shape[1]:
        raise ValueError(
            "precision_recall: both sets must have the same number of features; got "
            f"{generated_ND.shape[1]} and {real_MD.shape[1]}"
        )
    # Products of large norms lose digits of small distances: the common mean is taken away.
    centre = real_MD.double().mean(0)
    generated, real = generated_ND.double() - centre, real_MD.double() - centre
    precision = _share_inside(generated, real, neighbours)
    recall = _share_inside(real, generated, neighbours)
    return PrecisionRecall(precision, recall)


def _share_inside(points_ND: Tensor, centres_MD: Tensor, neighbours: int) -> float:
    """Share of points that lie in the ball of any centre."""
    squares_M = centres_MD.square().sum(1)
    radii_M = torch.cat(
        [
            _squared_distances(rows, centres_MD, squares_M)[0]
            .kthvalue(neighbours + 1, dim=1)
            .values
            for rows in centres_MD.split(BLOCK)
        ]
    )
    inside = []
    for rows in points_ND.split(BLOCK):
        distances_BM, squares_BM = _squared_distances(rows, centres_MD, squares_M)
        # Of each pair its own rounding: one far image must not widen the balls of the others.
        inside.append((distances_BM.sub_(squares_BM, alpha=TOLERANCE) <= radii_M).any(1))
    return float(torch.cat(inside).double().mean())


def _squared_distances(
    rows_BD: Tensor, others_MD: Tensor, squares_M: Tensor
) -> tuple[Tensor, Tensor]:
    """Squared distances (B, M), and the sums of both squared norms, whose rounding they have."""
    squares_BM = rows_BD.square().sum(1)[:, None] + squares_M
    return torch.addmm(squares_BM, rows_BD, others_MD.T, alpha=-2), squares_BM


def _check(op: str, name: str, values: Tensor, at_least: int) -> None:
    if values.dim() != 2 or len(values) < at_least or not values.shape[1]:
        raise ValueError(
            f"{op}: {name} must be a matrix with at least {counted(at_least, 'row')} and one "
            f"column; got {tuple(values.shape)}"
        )
    if not values.isfinite().all():
        raise ValueError(f"{op}: {name} must be finite")
