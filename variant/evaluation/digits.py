"""Evaluation of generated digits: are they recognised, do they vary, repeat or copy?

A support vector classifier, trained on all real scans at 8x8 pixels, classifies the generated
images.

    python -m variant.evaluation.digits MODEL_FOLDER --count 1000

Axes: B images, I channels, Y X pixels, L tokens of all scales, N scans.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from variant.data.config import DataSection
from variant.data.digits import LEVELS, NUM_CLASSES, SIDE, DigitsData, load_scans, shrink
from variant.errors import UserError
from variant.evaluation.kv_error import trained_depths
from variant.paths import json_text
from variant.supernet import VARiant
from variant_kernels.wording import counted

if TYPE_CHECKING:
    from sklearn.svm import SVC


@cache
def digit_classifier() -> SVC:
    """A support vector classifier with scikit-learn's defaults, trained on all real scans."""
    from sklearn.svm import SVC

    scans = load_scans()
    return SVC().fit(_pixel_rows(scans.images), scans.labels.numpy())


def held_out_accuracy() -> float:
    """The classifier's accuracy on the held-out tenth when it is trained without that tenth."""
    from sklearn.svm import SVC

    scans = load_scans()
    classifier = SVC().fit(_pixel_rows(scans.train_images), scans.train_labels.numpy())
    images, labels = _pixel_rows(scans.held_out_images), scans.held_out_labels.numpy()
    return float(classifier.score(images, labels))


def _pixel_rows(scans_NYX: Tensor) -> np.ndarray:
    """Scans as scikit-learn has them: (N, 64) with values 0..16."""
    return (scans_NYX.flatten(1) * LEVELS).numpy()


def within_class_std(scans_NYX: Tensor, labels_N: Tensor) -> float:
    """Standard deviation of each pixel within each class, averaged over pixels and classes."""
    spreads = [scans_NYX[labels_N == label].std(dim=0).mean() for label in labels_N.unique()]
    return float(torch.stack(spreads).mean())


@dataclass(frozen=True)
class DigitsReport:
    """Figures of ``count`` generated digits.

    recognised: share of images that are classified as their label.
    std_ratio: standard deviation within classes, divided by that of the real scans.
    repeats: share of images whose tokens equal those of an earlier image.
    copies: share of images whose tokens equal those of a training scan.
    """

    count: int
    recognised: float
    std_ratio: float
    repeats: float
    copies: float


def evaluate_digits(
    images_BIYX: Tensor, labels_B: Tensor, tokens_BL: Tensor, training_tokens_NL: Tensor
) -> DigitsReport:
    """Evaluate generated digits.

    Args:
        images_BIYX: in [0, 1], of any size of at least 8x8.
        labels_B: the classes that were generated; each class needs at least two images.
        tokens_BL: the images' tokens.
        training_tokens_NL: the training scans' tokens, without augmentation.
    Raises:
        ValueError: the numbers of images, labels and token rows differ.
    """
    count = len(labels_B)
    if len(images_BIYX) != count or len(tokens_BL) != count:
        raise ValueError(
            f"evaluate_digits: images, labels and tokens must be of the same number; got "
            f"{len(images_BIYX)}, {count}, {len(tokens_BL)}"
        )
    scans = shrink(images_BIYX)
    classes_B = torch.from_numpy(digit_classifier().predict(_pixel_rows(scans)))
    real = load_scans()
    training = {tuple(tokens) for tokens in training_tokens_NL.tolist()}
    generated = [tuple(tokens) for tokens in tokens_BL.tolist()]
    return DigitsReport(
        count=count,
        recognised=float((classes_B == labels_B).float().mean()),
        std_ratio=within_class_std(scans, labels_B) / within_class_std(real.images, real.labels),
        repeats=1 - len(set(generated)) / count,
        copies=sum(tokens in training for tokens in generated) / count,
    )


def evaluate_digits_model(
    model: VARiant,
    depth: int | None,
    *,
    count: int = 1000,
    seed: int = 0,
    cfg: float = 1.5,
    top_p: float = 0.96,
) -> DigitsReport:
    """Generate ``count`` digits, equally many of each class, and evaluate them.

    Args:
        depth, seed, cfg, top_p: as in ``VARiant.generate``.
    Raises:
        UserError: the model does not generate 10 classes at a multiple of 8 pixels.
    """
    config = model.vae.config
    if model.var.config.num_classes != NUM_CLASSES or config.image_size % SIDE:
        raise UserError(
            f"evaluate_digits_model: the model must generate {NUM_CLASSES} classes at a multiple "
            f"of {SIDE} pixels; got {counted(model.var.config.num_classes, 'class')}, "
            f"{config.image_size} pixels"
        )
    labels = torch.arange(count, device="cpu") % NUM_CLASSES
    result = model.generate(labels, depth=depth, cfg=cfg, top_k=0, top_p=top_p, seed=seed)
    data = DigitsData(DataSection("digits"), config.image_size, config.in_channels, seed=0)
    training_tokens = model.vae.encode(data.scans())
    return evaluate_digits(
        result.images.float().cpu(), labels, result.tokens.cpu(), training_tokens
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the figures of a digits model at every depth that it was trained at."""
    parser = argparse.ArgumentParser(
        prog="python -m variant.evaluation.digits",
        description="Evaluate a digits model at full depth and at every subnet depth.",
    )
    parser.add_argument("model", nargs="?", default="digits", help="model folder, or digits")
    parser.add_argument("--count", type=int, default=1000, help="images per depth")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cfg", type=float, default=1.5)
    parser.add_argument("--top-p", type=float, default=0.96)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(arguments)
    if options.count < 2 * NUM_CLASSES:
        parser.error(f"--count must be at least {2 * NUM_CLASSES}; got {options.count}")
    try:
        model = VARiant.from_pretrained(options.model)
        reports = {
            depth: evaluate_digits_model(
                model,
                depth,
                count=options.count,
                seed=options.seed,
                cfg=options.cfg,
                top_p=options.top_p,
            )
            for depth in trained_depths(model.var.config)
        }
    except (UserError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json_text({depth: dataclasses.asdict(r) for depth, r in reports.items()}))
        return 0
    print(f"accuracy of the classifier on held-out real scans: {held_out_accuracy():.1%}")
    print(f"{'depth':>5}  {'images':>6}  recognised  spread/real  repeats  copies")
    for depth, report in reports.items():
        print(
            f"{depth:>5}  {report.count:>6}  {report.recognised:>10.1%}  {report.std_ratio:>11.1%}"
            f"  {report.repeats:>7.1%}  {report.copies:>6.1%}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
