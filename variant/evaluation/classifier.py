"""The classifier of :mod:`variant.training.classifier` as a feature network.

Its SHA-256 is part of every result.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from variant.evaluation.features import FeatureNetwork, Features
from variant.models.pixels import to_uint8
from variant.paths import file_sha256
from variant.training.classifier import (
    STEPS,
    Classifier,
    ClassifierRecord,
    is_there,
    read_classifier,
    save_classifier,
    train_classifier,
)

__all__ = [
    "STEPS",
    "Classifier",
    "ClassifierRecord",
    "is_there",
    "load_classifier",
    "save_classifier",
    "to_uint8",
    "train_classifier",
]


def load_classifier(
    path: str | os.PathLike[str], name: str, device: torch.device
) -> tuple[FeatureNetwork, ClassifierRecord]:
    """A classifier that :func:`save_classifier` wrote.

    Args:
        name: of the data, for the name of the distance: "NAME-FD".
    Raises:
        UserError: a file is missing or damaged.
    """
    classifier, record = read_classifier(path)
    classifier.to(device)

    def run(images_B3YX: Tensor) -> Features:
        features_BD, logits_BC = classifier(images_B3YX)
        return Features(features_BD, None, logits_BC)

    network = FeatureNetwork(
        f"classifier of {name}",
        f"{name}-FD",
        file_sha256(Path(path)),
        run,
        device,
        num_classes=len(record.classes),
    )
    return network, record
