"""The Fréchet distance: closed forms, other means of computing it, statistics of parts."""

import numpy as np
import pytest
import scipy.linalg
import torch
from seeded import noise

from variant.evaluation.frechet import (
    FeatureStatistics,
    Gaussian,
    frechet_distance,
    frechet_from_blocks,
    jackknife_error,
    total,
)

T_9 = 2.262157  # the 95 % quantile of Student's t with 9 degrees of freedom


def random_gaussian(seed, width, rank=None):
    root = noise(seed, width, rank or width) - 0.5
    return Gaussian(torch.from_numpy(noise(seed + 1, width)), torch.from_numpy(root @ root.T))


def by_square_root(one, two):
    """The definition, by the matrix square root of a product that is not symmetric."""
    root = scipy.linalg.sqrtm((one.covariance_DD @ two.covariance_DD).numpy())
    difference = (one.mean_D - two.mean_D).square().sum()
    traces = one.covariance_DD.trace() + two.covariance_DD.trace()
    return float(difference + traces - 2 * np.trace(root).real)


@pytest.mark.parametrize("width", [1, 2, 7, 40])
def test_diagonal_gaussians_have_their_closed_form(width):
    means, deviations = noise(1, 2, width), 0.1 + noise(2, 2, width)
    gaussians = [
        Gaussian(torch.from_numpy(m), torch.from_numpy(np.diag(d**2)))
        for m, d in zip(means, deviations, strict=True)
    ]
    expected = ((means[0] - means[1]) ** 2).sum() + ((deviations[0] - deviations[1]) ** 2).sum()
    assert frechet_distance(*gaussians) == pytest.approx(expected, abs=1e-9)


def test_rotated_gaussians_with_common_axes_have_their_closed_form():
    rotation = np.linalg.qr(noise(3, 12, 12))[0]
    deviations = 0.1 + noise(4, 2, 12)
    gaussians = [
        Gaussian(torch.zeros(12).double(), torch.from_numpy((rotation * d**2) @ rotation.T))
        for d in deviations
    ]
    expected = ((deviations[0] - deviations[1]) ** 2).sum()
    assert frechet_distance(*gaussians) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("width", "ranks"), [(5, (5, 5)), (30, (30, 30)), (16, (16, 6))])
def test_the_matrix_square_root_gives_the_same(width, ranks):
    one, two = random_gaussian(10, width, ranks[0]), random_gaussian(20, width, ranks[1])
    assert frechet_distance(one, two) == pytest.approx(by_square_root(one, two), abs=1e-6)
    assert frechet_distance(two, one) == pytest.approx(frechet_distance(one, two), abs=1e-9)


def test_singular_covariances_have_no_rounding_as_distance():
    """Rounding of 1e-16 in each of 200 missing dimensions would add 1e-8 each under the root."""
    one = random_gaussian(30, 256, 6)
    assert frechet_distance(one, one) < 1e-10


def test_parts_add_up_to_the_whole():
    features = torch.from_numpy(1e3 + noise(40, 101, 9))
    whole = FeatureStatistics.of(features)
    covariance = torch.from_numpy(np.cov(features.numpy(), rowvar=False))
    torch.testing.assert_close(whole.gaussian().covariance_DD, covariance, rtol=1e-9, atol=1e-12)
    for sizes in ([1, 100], [50, 51], [1] * 101, [7] * 14 + [3]):
        parts = total(FeatureStatistics.of(part) for part in features.split(sizes))
        assert parts.count == 101
        torch.testing.assert_close(parts.mean_D, whole.mean_D, rtol=1e-12, atol=0)
        torch.testing.assert_close(parts.scatter_DD, whole.scatter_DD, rtol=1e-9, atol=1e-9)


def test_the_interval_covers_and_the_bias_goes_to_its_limit():
    """200 sets of 400 draws from the reference: the true distance is 0, the bias about D / N."""
    generator = torch.Generator().manual_seed(0)
    reference = Gaussian(torch.zeros(8).double(), torch.eye(8).double())
    values, errors, limits = [], [], []
    for _ in range(200):
        features = torch.randn(400, 8, generator=generator)
        blocks = [FeatureStatistics.of(features[start::10]) for start in range(10)]
        result = frechet_from_blocks(blocks, reference)
        values.append(result.distance)
        errors.append((result.high - result.distance) / T_9)
        limits.append(result.infinite)
    spread = float(np.std(values))
    assert 0.6 * spread < np.mean(errors) < 1.7 * spread
    assert abs(np.mean(limits)) < 0.25 * np.mean(values)


def test_the_interval_of_pairs_is_that_of_other_draws_of_pairs():
    """Reconstructions of widely spread images: which images are drawn matters little."""
    generator = torch.Generator().manual_seed(0)
    values, errors, limits, loose = [], [], [], []
    for _ in range(100):
        real = 5 * torch.randn(200, 4, generator=generator)
        made = real + 0.3 * torch.randn(200, 4, generator=generator) + 0.2
        blocks, originals = (
            [FeatureStatistics.of(part[start::10]) for start in range(10)] for part in (made, real)
        )
        result = frechet_from_blocks(blocks, originals)
        values.append(result.distance)
        errors.append((result.high - result.distance) / T_9)
        limits.append(result.infinite)
        against_all = frechet_from_blocks(blocks, total(originals).gaussian())
        assert against_all.distance == pytest.approx(result.distance, abs=1e-9)
        loose.append((against_all.high - result.distance) / T_9)
    spread = float(np.std(values))
    assert 0.6 * spread < np.mean(errors) < 1.7 * spread
    assert np.mean(loose) > 2 * spread
    # Means are 0.2 apart, and deviations (25 + 0.09)^0.5 - 5.
    assert np.mean(limits) == pytest.approx(4 * (0.2**2 + (25.09**0.5 - 5) ** 2), rel=0.1)
    with pytest.raises(ValueError, match="reference blocks"):
        frechet_from_blocks(blocks, originals[:9])


def test_the_interval_is_that_of_an_error_of_so_many_blocks():
    features = torch.from_numpy(noise(50, 50, 4))
    reference = Gaussian(torch.zeros(4).double(), torch.eye(4).double())
    for count, quantile in ((10, T_9), (5, 2.776445)):
        blocks = [FeatureStatistics.of(features[start::count]) for start in range(count)]
        left_out = [
            frechet_distance(total(blocks[:i] + blocks[i + 1 :]).gaussian(), reference)
            for i in range(count)
        ]
        result = frechet_from_blocks(blocks, reference)
        half = quantile * jackknife_error(left_out)
        assert result.high - result.distance == pytest.approx(half, rel=1e-6)


def test_the_jackknife_of_a_mean_is_its_standard_error():
    values = torch.from_numpy(noise(50, 20))
    left_out = [(values.sum() - value).item() / 19 for value in values]
    assert jackknife_error(left_out) == pytest.approx(float(values.std() / 20**0.5), rel=1e-9)


def test_fewer_images_than_features_are_warned_about():
    blocks = [FeatureStatistics.of(torch.from_numpy(noise(60 + i, 2, 30))) for i in range(10)]
    with pytest.warns(RuntimeWarning, match="FID: 20 images for 30 features"):
        frechet_from_blocks(blocks, random_gaussian(70, 30), "FID")


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.zeros(0, 3), "at least one row"),
        (torch.zeros(4), "at least one row"),
        (torch.tensor([[1.0, torch.nan], [1.0, 2.0]]), "those of 1 of 2 images are not"),
    ],
)
def test_features_that_are_none_are_refused(features, message):
    with pytest.raises(ValueError, match=message):
        FeatureStatistics.of(features)


def test_other_numbers_of_features_are_refused():
    with pytest.raises(ValueError, match="same number of features; got 3 and 4"):
        frechet_distance(random_gaussian(1, 3), random_gaussian(2, 4))
    with pytest.raises(ValueError, match=r"mean must be \(D,\)"):
        Gaussian(torch.zeros(3), torch.zeros(4, 4))
    with pytest.raises(ValueError, match="number of images"):
        FeatureStatistics.of(torch.zeros(1, 3)).gaussian()
