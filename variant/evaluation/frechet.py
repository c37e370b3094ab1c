"""The Fréchet distance between Gaussians that are fitted to features of images.

FID is this distance for one network, the Inception of 2015 (Heusel et al. 2017, "GANs trained by a
two time-scale update rule", equation 6); with other features it has another name and other values.

Everything is float64. Statistics of parts add up to those of the whole, so that neither the size of
a batch nor the number of processes matters.

Axes: N images, D features.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from variant.evaluation.intervals import student_quantile
from variant_kernels.arguments import integer
from variant_kernels.wording import counted


@dataclass(frozen=True)
class Gaussian:
    """A mean (D,) and a covariance (D, D) in float64."""

    mean_D: Tensor
    covariance_DD: Tensor

    def __post_init__(self) -> None:
        width = self.mean_D.shape
        if len(width) != 1 or self.covariance_DD.shape != (*width, *width):
            raise ValueError(
                "Gaussian: the mean must be (D,) and the covariance (D, D); got "
                f"{tuple(width)} and {tuple(self.covariance_DD.shape)}"
            )
        if not (self.mean_D.isfinite().all() and self.covariance_DD.isfinite().all()):
            raise ValueError("Gaussian: the mean and the covariance must be finite")


@dataclass(frozen=True)
class FeatureStatistics:
    """Mean and scatter of the features of ``count`` images, in float64.

    scatter_DD: sum over the images of the outer product of a feature's deviation from the mean.
    """

    count: int
    mean_D: Tensor
    scatter_DD: Tensor

    @classmethod
    def of(cls, features_ND: Tensor) -> FeatureStatistics:
        """Statistics of features (N, D) of any floating dtype.

        Raises:
            ValueError: they are no matrix, there are none, or some are not finite.
        """
        if features_ND.dim() != 2 or not len(features_ND):
            raise ValueError(
                "FeatureStatistics: features must be (N, D) with at least one row; got "
                f"{tuple(features_ND.shape)}"
            )
        features = features_ND.double()
        bad = int((~features.isfinite()).any(1).sum())
        if bad:
            raise ValueError(
                f"FeatureStatistics: features must be finite; those of {bad} of "
                f"{counted(len(features), 'image')} are not"
            )
        mean = features.mean(0)
        centred = features - mean
        return cls(len(features), mean, centred.T @ centred)

    def __add__(self, other: FeatureStatistics) -> FeatureStatistics:
        """Statistics of both sets of images (Chan et al. 1979, equation 2.1)."""
        count = self.count + other.count
        delta_D = other.mean_D - self.mean_D
        weight = self.count * other.count / count
        return FeatureStatistics(
            count,
            self.mean_D + delta_D * (other.count / count),
            self.scatter_DD + other.scatter_DD + weight * torch.outer(delta_D, delta_D),
        )

    def gaussian(self) -> Gaussian:
        """The fitted Gaussian; its covariance divides by N - 1, as that of the ADM evaluator.

        Raises:
            ValueError: one image has no covariance.
        """
        integer("FeatureStatistics", "the number of images", self.count, 2)
        return Gaussian(self.mean_D, self.scatter_DD / (self.count - 1))


def total(parts: Iterable[FeatureStatistics]) -> FeatureStatistics:
    """The sum of at least one part."""
    first, *rest = parts
    for part in rest:
        first = first + part
    return first


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """Squared Fréchet (2-Wasserstein) distance between two Gaussians (Dowson, Landau 1982).

    |m1 - m2|^2 + tr C1 + tr C2 - 2 tr (C1 C2)^(1/2); the last trace is the sum of the square roots
    of the eigenvalues of the symmetric R^T C2 R with C1 = R R^T.

    Raises:
        ValueError: they have different numbers of features.
    """
    return _distances(first, [second])[0]


def _distances(reference: Gaussian, others: Sequence[Gaussian]) -> list[float]:
    """The distance of each from the reference, whose root is taken once."""
    root_DR = _square_root(reference.covariance_DD)
    distances = []
    for other in others:
        if reference.mean_D.shape != other.mean_D.shape:
            raise ValueError(
                "frechet_distance: both sides must have the same number of features; got "
                f"{len(reference.mean_D)} and {len(other.mean_D)}"
            )
        eigenvalues = _positive(torch.linalg.eigvalsh(root_DR.T @ other.covariance_DD @ root_DR))
        distance = (
            (reference.mean_D - other.mean_D).square().sum()
            + reference.covariance_DD.trace()
            + other.covariance_DD.trace()
            - 2 * eigenvalues.sqrt().sum()
        )
        # The distance of equal Gaussians is zero up to rounding, of either sign.
        distances.append(max(0.0, float(distance)))
    return distances


def _square_root(covariance_DD: Tensor) -> Tensor:
    """R (D, rank) with R R^T = C."""
    eigenvalues, vectors = torch.linalg.eigh(covariance_DD)
    kept = _positive(eigenvalues)
    return vectors[:, kept > 0] * kept[kept > 0].sqrt()


def _positive(eigenvalues: Tensor) -> Tensor:
    """Eigenvalues of a positive semi-definite matrix without those that are rounding errors.

    Their square roots would not be small: that of 1e-16 is 1e-8, once for each missing dimension.
    """
    if not len(eigenvalues):
        return eigenvalues
    bound = eigenvalues.abs().max() * len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps
    return torch.where(eigenvalues > bound, eigenvalues, 0.0)


@dataclass(frozen=True)
class FrechetResult:
    """A Fréchet distance with what is needed to judge it.

    distance: of ``count`` images from the reference.
    low, high: a 95 % interval for other draws of as many images (delete-one-block jackknife, whose
        error of so many blocks has Student's t).
    infinite: the distance extrapolated to infinitely many images, by a line in 1/N (Chong, Forsyth
        2020, "Effectively unbiased FID"); the bias of a finite sample falls as 1/N.
    """

    distance: float
    low: float
    high: float
    infinite: float
    count: int


def frechet_from_blocks(
    blocks: Sequence[FeatureStatistics],
    reference: Gaussian | Sequence[FeatureStatistics],
    name: str = "the Fréchet distance",
) -> FrechetResult:
    """The distance of all blocks together from a reference, with an interval.

    Args:
        blocks: disjoint parts of the images, in order and of about the same size; at least 4.
        reference: the same for all parts; or its blocks, where each holds what the images of a
            block were made of, as reconstructions are of originals. A part of the images is then
            compared with the same part of the reference.
        name: of the distance, for the warning.
    Warns:
        RuntimeWarning: there are no more images than features: the covariance is singular.
    Raises:
        ValueError: too few blocks, another number of them in the reference, or their features are
            others than the reference's.
    """
    integer("frechet_from_blocks", "the number of blocks", len(blocks), 4)
    if not isinstance(reference, Gaussian):
        integer(
            "frechet_from_blocks",
            "the number of reference blocks",
            len(reference),
            len(blocks),
            len(blocks),
        )
    whole = total(blocks)
    width = len(blocks[0].mean_D)
    if whole.count <= width:
        warnings.warn(
            f"{name}: {counted(whole.count, 'image')} for {counted(width, 'feature')}: the "
            "covariance is singular and the distance too large; give more images",
            RuntimeWarning,
            stacklevel=2,
        )
    every = range(len(blocks))
    without = [[*every[:i], *every[i + 1 :]] for i in every]
    # The first half of the blocks, one more, ...: their distances fall as 1/N.
    parts = [[*every[:end]] for end in range(len(blocks) // 2, len(blocks))]
    chosen = [[*every], *without, *parts]
    gaussians = [total(blocks[i] for i in part).gaussian() for part in chosen]
    if isinstance(reference, Gaussian):
        distance, *others = _distances(reference, gaussians)
    else:
        others_side = [total(reference[i] for i in part).gaussian() for part in chosen]
        distance, *others = map(frechet_distance, others_side, gaussians)
    left_out, values = others[: len(without)], [*others[len(without) :], distance]
    counts = [sum(blocks[i].count for i in part) for part in parts] + [whole.count]
    inverse = torch.tensor(counts, dtype=torch.float64, device="cpu").reciprocal()
    line = torch.stack((torch.ones_like(inverse), inverse), dim=1)
    intercept = torch.linalg.lstsq(
        line, torch.tensor(values, dtype=torch.float64, device="cpu")[:, None]
    )
    half = student_quantile(len(blocks) - 1) * jackknife_error(left_out)
    return FrechetResult(
        distance=distance,
        low=max(0.0, distance - half),
        high=distance + half,
        infinite=float(intercept.solution[0, 0]),
        count=whole.count,
    )


def jackknife_error(left_out: Sequence[float]) -> float:
    """Standard error of a statistic from its values without one block each (Tukey 1958)."""
    values = torch.tensor(left_out, dtype=torch.float64, device="cpu")
    deviation = values - values.mean()
    return float(((len(values) - 1) / len(values) * deviation.square().sum()).sqrt())
