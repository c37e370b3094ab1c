"""Judging generated digits.

The judge asks a support vector classifier, trained on all real scans at 8x8, what it reads in a
generated image, and measures whether images vary, repeat or copy.

    python -m variant.evaluation.digits MODEL_FOLDER --count 1000

Axes: B images, I channels, Y X pixels, L tokens of all scales, N scans.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
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
from variant.supernet import VARiant

if TYPE_CHECKING:
    from sklearn.svm import SVC


@cache
def reader() -> SVC:
    """The judge: a support vector classifier of scikit-learn's defaults, trained on all scans."""
    from sklearn.svm import SVC

    scans = load_scans()
    return SVC().fit(_rows(scans.images), scans.labels.numpy())


def reader_held_out_accuracy() -> float:
    """How often the same classifier, trained without the held-out tenth, reads that correctly."""
    from sklearn.svm import SVC

    scans = load_scans()
    blind = SVC().fit(_rows(scans.train_images), scans.train_labels.numpy())
    return float(blind.score(_rows(scans.held_out_images), scans.held_out_labels.numpy()))


def _rows(scans_NYX: Tensor) -> np.ndarray:
    return (scans_NYX.flatten(1) * LEVELS).numpy()


def within_class_std(scans_NYX: Tensor, labels_N: Tensor) -> float:
    """Standard deviation of each pixel within each class, averaged over pixels and classes."""
    spreads = [scans_NYX[labels_N == label].std(dim=0).mean() for label in labels_N.unique()]
    return float(torch.stack(spreads).mean())


@dataclass(frozen=True)
class DigitsReport:
    """What the judge found; all but count are shares in [0, 1] unless said otherwise.

    recognised: read as their label.  std_ratio: spread within classes over that of real scans.
    repeats: images whose tokens another image before them already had.  copies: images whose
    tokens are those of a training scan.
    """

    count: int
    recognised: float
    std_ratio: float
    repeats: float
    copies: float


def judge(
    images_BIYX: Tensor, labels_B: Tensor, tokens_BL: Tensor, training_tokens_NL: Tensor
) -> DigitsReport:
    """Judge generated digits.

    Args:
        images_BIYX: in [0, 1], of any size of at least 8x8.
        labels_B: what they should show; every class needs at least two images.
        tokens_BL: their tokens.
        training_tokens_NL: the training scans' tokens, without augmentation.
    Raises:
        ValueError: the three disagree about the number of images.
    """
    count = len(labels_B)
    if len(images_BIYX) != count or len(tokens_BL) != count:
        raise ValueError(
            f"judge: images, labels and tokens must be of the same number; got "
            f"{len(images_BIYX)}, {count}, {len(tokens_BL)}"
        )
    scans = shrink(images_BIYX)
    read = torch.from_numpy(reader().predict(_rows(scans)))
    real = load_scans()
    known = {tuple(row) for row in training_tokens_NL.tolist()}
    rows = [tuple(row) for row in tokens_BL.tolist()]
    return DigitsReport(
        count=count,
        recognised=float((read == labels_B).float().mean()),
        std_ratio=within_class_std(scans, labels_B) / within_class_std(real.images, real.labels),
        repeats=1 - len(set(rows)) / count,
        copies=sum(row in known for row in rows) / count,
    )


def judge_model(
    model: VARiant,
    depth: int | None,
    *,
    count: int = 1000,
    seed: int = 0,
    cfg: float = 1.5,
    top_p: float = 0.96,
) -> DigitsReport:
    """Generate ``count`` digits, equally many of each class, and judge them."""
    labels = torch.arange(count) % NUM_CLASSES
    made = model.generate(labels, depth=depth, cfg=cfg, top_k=0, top_p=top_p, seed=seed)
    config = model.vae.config
    if model.var.config.num_classes != NUM_CLASSES or config.image_size % SIDE:
        raise UserError(
            f"judge_model: the model must paint {NUM_CLASSES} classes at a multiple of {SIDE} "
            f"pixels; got {model.var.config.num_classes} classes, {config.image_size} pixels"
        )
    data = DigitsData(DataSection("digits"), config.image_size, config.in_channels, seed=0)
    known = model.vae.encode(data.scans())
    return judge(made.images.float().cpu(), labels, made.tokens.cpu(), known)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table of the judge's findings at every depth of a model."""
    parser = argparse.ArgumentParser(
        prog="python -m variant.evaluation.digits",
        description="Judge a digits model at full depth and at every subnet depth.",
    )
    parser.add_argument("model", nargs="?", default="digits", help="model folder, or digits")
    parser.add_argument("--count", type=int, default=1000, help="images per depth")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cfg", type=float, default=1.5)
    parser.add_argument("--top-p", type=float, default=0.96)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    chosen = parser.parse_args(arguments)
    if chosen.count < 2 * NUM_CLASSES:
        parser.error(f"--count must be at least {2 * NUM_CLASSES}; got {chosen.count}")
    try:
        model = VARiant.from_pretrained(chosen.model)
        depths = [model.var.config.depth, *sorted(model.var.config.subnets, reverse=True)]
        reports = {
            depth: judge_model(
                model,
                depth,
                count=chosen.count,
                seed=chosen.seed,
                cfg=chosen.cfg,
                top_p=chosen.top_p,
            )
            for depth in depths
        }
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if chosen.json:
        print(json.dumps({depth: dataclasses.asdict(r) for depth, r in reports.items()}))
        return 0
    print(f"the reader's own accuracy on held-out scans: {reader_held_out_accuracy():.1%}")
    print(f"{'depth':>5}  {'images':>6}  recognised  spread/real  repeats  copies")
    for depth, found in reports.items():
        print(
            f"{depth:>5}  {found.count:>6}  {found.recognised:>10.1%}  {found.std_ratio:>11.1%}"
            f"  {found.repeats:>7.1%}  {found.copies:>6.1%}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
