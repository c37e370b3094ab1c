"""A small classifier of a recipe's images, whose features compare images of that data.

Trained on the training images alone, so that neither held-out nor generated images have been seen.
The same recipe, seed and number of threads give the same weights. `variant eval` measures distances
of its features, and `variant train-vae` may have them as its perceptual loss.

Axes: B images, I channels, 3 colours, Y X pixels, D features, C classes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import ConfigDict
from torch import Tensor, nn

from variant.checkpoints.model_folder import load_state
from variant.data.images import ImageData, epoch_order
from variant.errors import UserError
from variant.files import atomic_write, read_safetensors, write_safetensors
from variant.folder_lock import saving
from variant.models.class_names import check_class_names
from variant.models.config import STRICT, parse_dataclass, require_plain_numbers
from variant.models.initialised import conv2d, initialised
from variant.models.pixels import checked_images, to_uint8
from variant.models.ranges import Count, CountOrZero, Share
from variant.paths import json_text, open_regular, path_kind, read_json, shown
from variant.torch_modes import modes_of_a_new_process
from variant_kernels.arguments import integer
from variant_kernels.wording import counted

FORMAT = "variant-classifier-1"
RUN_NAME = "vae-classifier.safetensors"  # in the folder of a run whose perceptual loss it is
WIDTHS = (16, 32, 64)
FEATURES = 64
# Steps, images of a step and the peak learning rate of AdamW with a one-cycle schedule.
STEPS, BATCH, LEARNING_RATE = 1500, 128, 3e-3


class Classified(NamedTuple):
    """Features (B, D) and logits (B, C) of images."""

    features_BD: Tensor
    logits_BC: Tensor


class Classifier(nn.Module):
    """Stages of convolution, each halving the sides; 64 features; classes.

    Args:
        widths: channels of each stage.
    """

    def __init__(self, num_classes: int, widths: Sequence[int] = WIDTHS) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        inputs = 3
        for width in widths:
            stages += [
                conv2d(inputs, width, 3, padding=1, bias=False),
                initialised(nn.BatchNorm2d(width)),
                nn.ReLU(),
                conv2d(width, width, 3, stride=2, padding=1, bias=False),
                initialised(nn.BatchNorm2d(width)),
                nn.ReLU(),
            ]
            inputs = width
        self.stages = nn.Sequential(*stages)
        self.features = initialised(nn.Linear(inputs, FEATURES))
        self.head = initialised(nn.Linear(FEATURES, num_classes))

    def forward(self, images_B3YX: Tensor) -> Classified:
        """Features and logits of uint8 images."""
        x = checked_images("Classifier", images_B3YX).float() / 127.5 - 1
        features = F.relu(self.features(self.stages(x).mean((2, 3))))
        return Classified(features, self.head(features))


@dataclass(frozen=True)
class ClassifierRecord:
    """What a classifier was trained on, and how well it classifies held-out images.

    accuracy: share of the held-out images.
    image_size: pixels of a side of the images.  image_channels: 1 or 3.
    augmentation: of the training images, by the keys of the recipe's section data. These three are
        None in records of earlier versions.
    """

    format: str
    classes: tuple[str, ...]
    data_sha256: str
    seed: CountOrZero
    steps: Count
    accuracy: Share
    image_size: Count | None = None
    image_channels: Count | None = None
    augmentation: dict[str, float] | None = None

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    def __post_init__(self) -> None:
        require_plain_numbers(self)

    def is_of(self, **wanted: object) -> bool:
        """Whether these fields have these values; what an earlier version left out may be any."""
        return all(getattr(self, name) in (None, value) for name, value in wanted.items())


@modes_of_a_new_process()
def train_classifier(
    data: ImageData,
    *,
    seed: int = 0,
    steps: int = STEPS,
    widths: Sequence[int] = WIDTHS,
    device: torch.device | None = None,
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> tuple[Classifier, ClassifierRecord]:
    """Train a classifier on the training images, augmented as the recipe says.

    Args:
        widths: channels of its stages; :func:`read_classifier` reads classifiers of the default.
        device: of the training and of the classifier; None is the CPU.
        report: called after each step with its number and loss.
    Raises:
        UserError: there is one training image alone, of which nothing can be normalised.
    """
    integer("train_classifier", "steps", steps, 1)
    if data.num_train < 2:
        raise UserError("a classifier needs two training images or more; the data have 1")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = Classifier(data.num_classes, widths).to(device).train()
    optimizer = torch.optim.AdamW(classifier.parameters(), LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps + 1)
    batch = min(BATCH, data.num_train)
    a_pass = data.num_train // batch
    for step in range(steps):
        epoch, place = divmod(step, a_pass)
        order = epoch_order(seed, epoch, data.num_train)
        images, labels = data.train(order[place * batch : (place + 1) * batch], epoch)
        logits = classifier(to_uint8(images).to(device)).logits_BC
        loss = F.cross_entropy(logits, labels.to(device), label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        report(step + 1, float(loss.detach()))
    classifier.eval().requires_grad_(False)
    image_BIYX, _ = data.held_out(range(1))
    record = ClassifierRecord(
        FORMAT,
        tuple(data.classes),
        data.digest(),
        seed,
        steps,
        held_out_accuracy(classifier, data),
        image_size=image_BIYX.shape[-1],
        image_channels=image_BIYX.shape[1],
        augmentation=data.section.augmentation_of_images,
    )
    return classifier, record


def held_out_accuracy(classifier: Classifier, data: ImageData, batch: int = 500) -> float:
    """Share of the held-out images that are classified as their label."""
    right = 0
    for start in range(0, data.num_held_out, batch):
        images, labels = data.held_out(range(start, min(start + batch, data.num_held_out)))
        device = next(classifier.parameters()).device
        logits = classifier(to_uint8(images).to(device)).logits_BC.cpu()
        right += int((logits.argmax(1) == labels).sum())
    return right / data.num_held_out


def save_classifier(path: Path, classifier: Classifier, record: ClassifierRecord) -> None:
    """Write the weights, and the record beside them as ``.json``.  Raises: UserError."""
    record_path = path.with_suffix(".json")
    with saving(path.parent), atomic_write(record_path) as temporary:
        temporary.write_text(json_text(record.__dict__, 1) + "\n")
        with atomic_write(path) as weights:
            write_safetensors(weights, classifier.state_dict())
            # It appears again last: whatever ends the process, no weights have another's record.
            Path(os.path.realpath(record_path)).unlink(missing_ok=True)


def read_classifier(path: str | os.PathLike[str]) -> tuple[Classifier, ClassifierRecord]:
    """A classifier that :func:`save_classifier` wrote, in eval mode and without gradients.

    Raises:
        UserError: a file is missing or damaged.
    """
    path, record_path = Path(path), Path(path).with_suffix(".json")
    with open_regular(path):
        pass
    fields = read_json(record_path)
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise UserError(f'{shown(record_path)}: its "format" must be "{FORMAT}"')
    try:
        record = parse_dataclass(ClassifierRecord, fields, "classifier")
        check_class_names("classifier", record.classes, len(record.classes))
    except (RecursionError, TypeError, ValueError) as error:
        message = " ".join(str(error).split())[:500]
        raise UserError(f"{shown(record_path)}: is no record of a classifier: {message}") from None
    state = read_safetensors(path)
    # Before a model of as many classes is built.
    if "head.bias" not in state or state["head.bias"].shape != (len(record.classes),):
        raise UserError(
            f"{shown(path)}: is no classifier of the {counted(len(record.classes), 'class')} in "
            f"{record_path.name}"
        )
    classifier = Classifier(len(record.classes))
    load_state(classifier, state, str(path))
    return classifier.eval().requires_grad_(False), record


def is_there(path: Path) -> bool:
    """Whether a classifier was written there, weights and record."""
    return path_kind(path) == "file" and path_kind(path.with_suffix(".json")) == "file"
