"""The digits model's data and its judge.

Data: scikit-learn's handwritten digits, 1,797 scans of 8x8 pixels with values 0..16 (UCI
"Optical Recognition of Handwritten Digits"). A tenth is held out. Training images are the scans
enlarged so that their area mean is the scan again.

The judge asks a support vector classifier, trained on all real scans at 8x8, what it reads in a
generated image, and measures whether images vary, repeat or copy.

    python -m variant.digits MODEL_FOLDER --count 1000

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
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from variant.augment import distort
from variant.data import STREAM_AUGMENT, Indices, stream
from variant.errors import UserError
from variant.recipe import DataSection

if TYPE_CHECKING:
    from sklearn.svm import SVC

    from variant.supernet import VARiant

SIDE = 8
LEVELS = 16
NUM_CLASSES = 10
SPLIT_SEED = 0
# Distortion runs on images this many times as large as the scans: its interpolation would
# otherwise blur strokes that are one pixel wide.
FINE = 4


@dataclass(frozen=True)
class Scans:
    """images_NYX float32 in [0, 1] (8x8) and labels_N int64, of both parts."""

    train_images: Tensor
    train_labels: Tensor
    held_out_images: Tensor
    held_out_labels: Tensor

    @property
    def images(self) -> Tensor:
        """All scans, training part first."""
        return torch.cat((self.train_images, self.held_out_images))

    @property
    def labels(self) -> Tensor:
        """Labels of all scans, training part first."""
        return torch.cat((self.train_labels, self.held_out_labels))


@cache
def load_scans() -> Scans:
    """scikit-learn's digits; the same tenth is held out in every run.

    Raises:
        UserError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError(
            "the digits need scikit-learn: pip install 'variant-kernels[train]'"
        ) from error
    digits: Any = load_digits()
    images = torch.from_numpy(digits.images).float() / LEVELS
    labels = torch.from_numpy(digits.target).long()
    order = torch.from_numpy(np.random.default_rng(SPLIT_SEED).permutation(len(images)))
    held_out, train = order[: len(order) // 10], order[len(order) // 10 :]
    return Scans(images[train], labels[train], images[held_out], labels[held_out])


def enlarge(scans_NYX: Tensor, size: int) -> Tensor:
    """Scans as smooth images (N, 1, size, size) in [0, 1] whose area mean is the scan again.

    Bicubic, then a few rounds of adding back what the area mean lacks; clamping leaves an error
    of about 1 %. size must be a multiple of 8.
    """
    scans = scans_NYX.unsqueeze(1)
    images = F.interpolate(scans, size=(size, size), mode="bicubic")
    for _ in range(8):
        missing = scans - shrink(images.clamp(0, 1)).unsqueeze(1)
        images = images.clamp(0, 1) + F.interpolate(missing, size=(size, size), mode="nearest")
    return images.clamp(0, 1)


def shrink(images_BIYX: Tensor) -> Tensor:
    """Images of any size as scans (B, 8, 8): mean over channels, then over areas."""
    return F.adaptive_avg_pool2d(images_BIYX.float().mean(dim=1, keepdim=True), SIDE).squeeze(1)


class DigitsData:
    """The scans as training images; an :class:`variant.data.ImageData`."""

    def __init__(self, section: DataSection, image_size: int, channels: int, seed: int) -> None:
        if image_size % SIDE:
            raise UserError(
                f"data: digits need images whose side is a multiple of {SIDE}; the VQ-VAE's are "
                f"{image_size}"
            )
        self.section, self.channels, self.seed = section, channels, seed
        scans = load_scans()
        self.num_train, self.num_held_out = len(scans.train_labels), len(scans.held_out_labels)
        self.num_classes = NUM_CLASSES
        self.train_labels, self.held_out_labels = scans.train_labels, scans.held_out_labels
        self.image_size = image_size
        self._fine = enlarge(scans.train_images, SIDE * FINE)
        self._train = enlarge(scans.train_images, image_size)
        self._held_out = enlarge(scans.held_out_images, image_size)

    def train(self, indices: Indices, epoch: int) -> tuple[Tensor, Tensor]:
        index = torch.as_tensor(np.asarray(indices), dtype=torch.int64)
        # Drawn for every scan, so that an image does not depend on its batch.
        draws = stream(self.seed, epoch, STREAM_AUGMENT).uniform(-1, 1, (self.num_train, 5))
        images = distort(
            self._fine[index],
            torch.from_numpy(draws)[index],
            rotate=self.section.rotate,
            zoom=self.section.zoom,
            shift=self.section.shift,
            shear=self.section.shear,
        )
        images = F.adaptive_avg_pool2d(images, self.image_size)
        return self._to_range(images), self.train_labels[index]

    def held_out(self, indices: Indices) -> tuple[Tensor, Tensor]:
        index = torch.as_tensor(np.asarray(indices), dtype=torch.int64)
        return self._to_range(self._held_out[index]), self.held_out_labels[index]

    def scans(self) -> Tensor:
        """The training scans without augmentation, (N, I, Y, X) in [-1, 1]."""
        return self._to_range(self._train)

    def _to_range(self, images: Tensor) -> Tensor:
        return (images.clamp(0, 1) * 2 - 1).expand(-1, self.channels, -1, -1)


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
    from variant.supernet import VARiant

    parser = argparse.ArgumentParser(
        prog="python -m variant.digits",
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
