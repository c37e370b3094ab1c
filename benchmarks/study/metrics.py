"""The numbers of a run: losses by image and scale, and those of generated images.

The Fréchet distance, precision and recall are of features that are joined with the class, a one-hot
vector as long as the features are on average (Fréchet Joint Distance, DeVries et al. 2019, "On the
evaluation of conditional generative adversarial networks"): images of the wrong classes are far
away even if they are perfect images.

Axes: N images, K scales, D features, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from variant.evaluation.frechet import FeatureStatistics, frechet_distance
from variant.evaluation.scores import precision_recall


def loss_row(losses_NK: np.ndarray, tokens_K: Sequence[int]) -> dict[str, Any]:
    """Means over images of the loss over all tokens and of that of each scale, with errors."""
    losses_N = image_losses(losses_NK, tokens_K)
    return {
        "mean": float(losses_N.mean()),
        "se": standard_error(losses_N),
        "by_scale": losses_NK.astype(np.float64).mean(0).tolist(),
        "by_scale_se": [standard_error(column) for column in losses_NK.T.astype(np.float64)],
    }


def image_losses(losses_NK: np.ndarray, tokens_K: Sequence[int]) -> np.ndarray:
    """The mean over the tokens of each image, (N,) float64."""
    share_K = np.asarray(tokens_K, np.float64) / sum(tokens_K)
    return losses_NK.astype(np.float64) @ share_K


def standard_error(values_N: np.ndarray) -> float:
    """Of the mean; 0 of one value."""
    return float(values_N.std(ddof=1) / math.sqrt(len(values_N))) if len(values_N) > 1 else 0.0


def joint(features_ND: Tensor, labels_N: Tensor, classes: int, norm: float) -> Tensor:
    """Features beside the class, (N, D + C) float64.

    Args:
        norm: length of the part of the class; the mean length of real features.
    """
    one_hot_NC = F.one_hot(labels_N, classes).double() * norm
    return torch.cat((features_ND.double(), one_hot_NC), dim=1)


def mean_norm(features_ND: Tensor) -> float:
    """The mean length of features."""
    return float(features_ND.double().norm(dim=1).mean())


def distances(
    features_ND: Tensor, labels_N: Tensor, real_MD: Tensor, real_labels_M: Tensor, classes: int
) -> dict[str, float]:
    """Fréchet distance, precision and recall of images against real ones of the same number."""
    norm = mean_norm(real_MD)
    own = joint(features_ND, labels_N, classes, norm)
    real = joint(real_MD, real_labels_M, classes, norm)
    scores = precision_recall(generated_ND=own, real_MD=real)
    return {
        "n": len(own),
        "fashion_fd": frechet(own, real),
        "fashion_fd_without_classes": frechet(features_ND.double(), real_MD.double()),
        "precision": scores.precision,
        "recall": scores.recall,
    }


def frechet(first_ND: Tensor, second_MD: Tensor) -> float:
    """The Fréchet distance of the Gaussians fitted to two sets of features."""
    first, second = FeatureStatistics.of(first_ND), FeatureStatistics.of(second_MD)
    return frechet_distance(first.gaussian(), second.gaussian())


def halves(labels_N: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The indices of two disjoint sets of ``count`` images or fewer, alike in their classes."""
    order = np.argsort(labels_N, kind="stable")  # images of one class in their own order
    first, second = order[0::2], order[1::2]
    size = min(count, len(second))
    places = np.linspace(0, len(second) - 1, size).round().astype(np.int64)
    return first[places], second[places]


def flagged(broken: Mapping[str, Any], right: Mapping[str, Any]) -> dict[str, bool]:
    """Whether each metric shows that a run is broken.

    A loss and an accuracy must be worse by more than five standard errors, a distance by more than
    the floor, precision and recall by more than 0.05.

    Args:
        broken, right: rows of ``collect``.
    """
    result = {}
    for name, loss in broken["losses"].items():
        other = right["losses"][name]
        result[f"loss {name}"] = loss["mean"] - other["mean"] > 5 * math.hypot(
            loss["se"], other["se"]
        )
    for name, own in (broken["generated"] or {}).items():
        other = right["generated"][name]
        result[f"fashion_fd {name}"] = own["fashion_fd"] - other["fashion_fd"] > own["floor"]
        for key in ("precision", "recall"):
            result[f"{key} {name}"] = other[key] - own[key] > 0.05
        error = math.sqrt(0.25 / own["n"])
        result[f"accuracy {name}"] = other["accuracy"] - own["accuracy"] > 5 * error
    return result
