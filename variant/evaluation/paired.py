"""PSNR and SSIM of images that belong together one by one.

Axes: B images, 3 colours, Y X pixels.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import torch
import torch.nn.functional as F
from torch import Tensor

from variant.errors import UserError
from variant.evaluation.image_sets import ImageSet
from variant.evaluation.intervals import student_quantile

PEAK = 255.0
# Window and constants of Wang et al. 2004, "Image quality assessment", section III.
WINDOW, SIGMA, K1, K2 = 11, 1.5, 0.01, 0.03


@dataclass(frozen=True)
class Paired:
    """psnr: dB, of the mean squared error over all pixels; infinite if all images are equal.

    ssim: mean over images.  equal: share of images that are equal in every pixel.
    psnr_interval, ssim_interval: of 95 %, over draws of the images; None where psnr is infinite.
    """

    psnr: float
    ssim: float
    equal: float
    psnr_interval: tuple[float, float] | None
    ssim_interval: tuple[float, float]


def compare_pairs(images: ImageSet, reference: ImageSet, batch: int = 64) -> Paired:
    """Image i of one set beside image i of the other.

    Raises:
        UserError: the sets have different numbers of images.
    """
    check_pairs(images, reference)
    errors: list[Tensor] = []
    ssims: list[Tensor] = []
    equal = 0
    for start in range(0, images.count, batch):
        rows = range(start, min(start + batch, images.count))
        one, other = images.read(rows), reference.read(rows)
        errors.append(squared_errors(one, other))
        ssims.append(structural_similarity(one, other))
        equal += int((one == other).flatten(1).all(1).sum())
    value, interval = psnr_with_interval(torch.cat(errors))
    ssim, lowest, highest = _mean(torch.cat(ssims))
    return Paired(value, ssim, equal / images.count, interval, (lowest, min(1.0, highest)))


def psnr_with_interval(errors_N: Tensor) -> tuple[float, tuple[float, float] | None]:
    """PSNR of images with these squared errors, and its 95 % interval over draws of the images.

    The interval is None where the PSNR is infinite.
    """
    error, least, most = _mean(errors_N)
    # A large error is a small PSNR.
    return psnr(error), None if error == 0 else (psnr(most), psnr(max(least, 0.0)))


def _mean(values_N: Tensor) -> tuple[float, float, float]:
    """The mean over images, and the ends of its 95 % interval."""
    mean = float(values_N.mean())
    if len(values_N) < 2:
        return mean, mean, mean
    error = float(values_N.std()) / len(values_N) ** 0.5
    half = student_quantile(len(values_N) - 1) * error
    return mean, mean - half, mean + half


def check_pairs(images: ImageSet, reference: ImageSet) -> None:
    """Raises: UserError, if the sets have different numbers of images."""
    if images.count != reference.count:
        raise UserError(
            f"eval: --paired needs as many images as the reference has; {images.name} has "
            f"{images.count:,}, {reference.name} {reference.count:,}"
        )


def warn_of_order(images: ImageSet, reference: ImageSet) -> None:
    """Warns: RuntimeWarning, if numbers in names do not sort as numbers: 0, 1, 10, 2.

    Then image i of the set is hardly image i of a reference whose files have other names.
    """
    names, others = (_stems(each.names) for each in (images, reference))
    if names == others:
        return
    for each, stems in ((images, names), (reference, others)):
        numbers = [int(stem) for stem in stems if stem.isascii() and stem.isdigit()]
        place = next((i for i in range(1, len(numbers)) if numbers[i] < numbers[i - 1]), None)
        if len(numbers) == len(stems) and place is not None:
            warnings.warn(
                f"eval: {each.name}: in the order of the names image {stems[place - 1]} is before "
                f"{stems[place]}; pairs are those of this order. Pad the numbers with zeros",
                RuntimeWarning,
                stacklevel=3,
            )


def _stems(names: Sequence[str] | None) -> list[str]:
    """The names of files without their endings; of the images of tar files, too."""
    return [] if names is None else [PurePosixPath(name).stem for name in names]


def psnr(mean_squared_error: float) -> float:
    """Peak signal-to-noise ratio in dB for uint8 images; infinite for no error."""
    if mean_squared_error == 0:
        return float("inf")
    return float(
        10 * torch.tensor(PEAK**2 / mean_squared_error, dtype=torch.float64, device="cpu").log10()
    )


def squared_errors(first_B3YX: Tensor, second_B3YX: Tensor) -> Tensor:
    """Mean squared error of each image, (B,) float64."""
    return (first_B3YX.double() - second_B3YX.double()).square().flatten(1).mean(1)


def structural_similarity(first_B3YX: Tensor, second_B3YX: Tensor) -> Tensor:
    """SSIM of each image, (B,) float64: mean over colours and places of the window (Wang 2004).

    The window is a Gaussian of 11 x 11 pixels, smaller for images that are smaller than it.
    """
    side = min(*first_B3YX.shape[2:], WINDOW)
    side -= 1 - side % 2
    place = torch.arange(side, dtype=torch.float64, device="cpu") - side // 2
    line = torch.exp(-(place**2) / (2 * SIGMA**2))
    line /= line.sum()
    colours = first_B3YX.shape[1]

    def mean(x: Tensor) -> Tensor:
        x = F.conv2d(x, line.view(1, 1, -1, 1).expand(colours, 1, -1, 1), groups=colours)
        return F.conv2d(x, line.view(1, 1, 1, -1).expand(colours, 1, 1, -1), groups=colours)

    x, y = first_B3YX.double(), second_B3YX.double()
    mean_x, mean_y = mean(x), mean(y)
    variance_x, variance_y = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2
    covariance = mean(x * y) - mean_x * mean_y
    c1, c2 = (K1 * PEAK) ** 2, (K2 * PEAK) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * structure).flatten(1).mean(1)
