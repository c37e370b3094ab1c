"""Inception Score, precision and recall: definitions, torch-fidelity's values, swapped sides."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from seeded import feature_sets, noise

from variant.evaluation.frechet import FeatureStatistics, frechet_distance
from variant.evaluation.scores import inception_score, precision_recall

VALUES = json.loads(Path(__file__).with_name("torch_fidelity_values.json").read_text())


def distance(one, two):
    return frechet_distance(*(FeatureStatistics.of(part).gaussian() for part in (one, two)))


def test_the_formulas_are_those_of_torch_fidelity():
    sets = [torch.from_numpy(part) for part in feature_sets(*VALUES["rows"])]
    generated, other, logits, real, other_real = sets
    expected = VALUES["formulas"]
    score = inception_score(logits, VALUES["rows"][0] // 3)
    shares = precision_recall(generated_ND=generated, real_MD=real)
    assert distance(generated, real) == pytest.approx(expected["fid"], abs=1e-6)
    assert distance(other, other_real) == pytest.approx(expected["sfid"], abs=1e-6)
    assert score.mean == pytest.approx(expected["inception_score_mean"], abs=1e-6)
    assert score.std == pytest.approx(expected["inception_score_std"], abs=1e-6)
    assert shares.precision == pytest.approx(expected["precision"], abs=1e-6)
    assert shares.recall == pytest.approx(expected["recall"], abs=1e-6)


def test_the_inception_score_has_its_limits():
    certain = torch.full((30, 10), -1e4)
    certain[torch.arange(30), torch.arange(30) % 10] = 1e4
    assert inception_score(certain).mean == pytest.approx(10, abs=1e-9)
    assert inception_score(torch.zeros(30, 10)).mean == pytest.approx(1, abs=1e-12)
    one_class = torch.zeros(30, 10)
    one_class[:, 3] = 1e5
    assert inception_score(one_class).mean == pytest.approx(1, abs=1e-12)


def test_the_splits_are_sequential():
    logits = torch.zeros(20, 2)
    logits[:10, 0] = logits[10:, 1] = 1e4
    assert inception_score(logits).mean == pytest.approx(2)
    sorted_by_class = inception_score(logits, 10)
    assert (sorted_by_class.mean, sorted_by_class.splits) == (pytest.approx(1), 2)
    assert inception_score(logits, 8).splits == 3  # the last one is smaller


def by_loops(points, centres, k):
    distances = np.linalg.norm(centres[:, None] - centres[None], axis=-1)
    radii = np.sort(distances, axis=1)[:, k]
    between = np.linalg.norm(points[:, None] - centres[None], axis=-1)
    return (between <= radii).any(1).mean()


@pytest.mark.parametrize(("n", "m", "width", "k"), [(40, 60, 3, 3), (7, 2000, 5, 1), (50, 9, 4, 8)])
def test_precision_and_recall_by_the_definition(n, m, width, k):
    generated, real = noise(1, n, width) * 1.2, noise(2, m, width)
    shares = precision_recall(
        generated_ND=torch.from_numpy(generated), real_MD=torch.from_numpy(real), neighbours=k
    )
    assert shares.precision == pytest.approx(by_loops(generated, real, k))
    assert shares.recall == pytest.approx(by_loops(real, generated, k))


def test_precision_and_recall_are_not_swapped():
    """One spot of the real images alone: precise, and not diverse."""
    real = torch.from_numpy(noise(3, 400, 2))
    narrow = torch.from_numpy(0.5 + 0.05 * noise(4, 400, 2))
    shares = precision_recall(generated_ND=narrow, real_MD=real)
    assert shares.precision == 1.0
    assert shares.recall < 0.1


def test_equal_images_are_inside_far_from_the_origin():
    """Distances of 0 whose squares are differences of 1e12."""
    features = torch.from_numpy(1e6 + noise(5, 3000, 4))
    repeated = features[:1].expand(50, 4)
    assert precision_recall(generated_ND=repeated, real_MD=features).precision == 1.0
    assert precision_recall(generated_ND=repeated, real_MD=repeated).recall == 1.0


def test_one_far_image_does_not_widen_the_balls_of_the_others():
    generated, real = 1e-4 * noise(1, 60, 3) * 1.2, 1e-4 * noise(2, 50, 3)
    generated[7] = 1e6
    shares = precision_recall(
        generated_ND=torch.from_numpy(generated), real_MD=torch.from_numpy(real)
    )
    assert shares.precision == pytest.approx(by_loops(generated, real, 3))
    assert shares.recall == pytest.approx(by_loops(real, generated, 3))
    assert shares.precision < 0.9


def test_bad_features_are_refused():
    good = torch.zeros(5, 3)
    with pytest.raises(ValueError, match="same number of features; got 3 and 2"):
        precision_recall(generated_ND=good, real_MD=torch.zeros(5, 2))
    with pytest.raises(ValueError, match="real features must be a matrix with at least 4 rows"):
        precision_recall(generated_ND=good, real_MD=torch.zeros(3, 3))
    with pytest.raises(ValueError, match="generated features must be finite"):
        precision_recall(generated_ND=good / 0, real_MD=good)
    with pytest.raises(ValueError, match="logits must be finite"):
        inception_score(torch.full((3, 3), torch.inf))
    with pytest.raises(ValueError, match="split"):
        inception_score(good, 0)
