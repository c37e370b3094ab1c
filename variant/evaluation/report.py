"""Metrics of a set of images, each with its number of images, an interval and a floor.

Conventions of the ADM evaluator (Dhariwal, Nichol 2021, "Diffusion models beat GANs on image
synthesis"): the reference file's own mean and covariance, sequential splits of 5,000 images for the
Inception Score, precision and recall by 3 neighbours on the features of the Fréchet distance.

Axes: B images of a batch, N images, D features.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from variant.errors import UserError
from variant.evaluation.features import FeatureNetwork, Features
from variant.evaluation.frechet import (
    FeatureStatistics,
    Gaussian,
    frechet_distance,
    frechet_from_blocks,
    jackknife_error,
    total,
)
from variant.evaluation.image_sets import ImageSet, Reference
from variant.evaluation.intervals import student_quantile
from variant.evaluation.paired import check_pairs, warn_of_order
from variant.evaluation.scores import NEIGHBOURS, SPLIT, inception_score, precision_recall
from variant.torch_modes import modes_of_a_new_process
from variant_kernels.arguments import integer
from variant_kernels.wording import counted

BLOCKS = 10  # of the jackknife
LEAST = 2 * BLOCKS  # images
GIVEN = "FID"  # the distance whose network the statistics of a reference file are of
FLOOR_SEED = BLOCK_SEED = 0  # of the halves of the reference, and of blocks without labels
NAMED_CLASSES = 5  # of a warning
LEAST_OF_CLASS = 5  # images whose classes are compared with their label
# A split of the Inception Score holds nearly all classes if the images are mixed.
LEAST_CLASSES_IN_SPLIT = 0.5


@dataclass(frozen=True)
class Metric:
    """One number and what is needed to judge it.

    low, high: a 95 % interval over draws of the images; None where there is none.
    count: images that were evaluated.
    floor: the same of two disjoint halves of the reference, of ``floor_count`` images each: no
        distance below it and no precision or recall above it says anything; None where the
        reference has no images, or images are not compared with it. Both halves have the same
        share of each class, where the labels are known (:func:`floor_of`).
    infinite: the distance extrapolated to infinitely many images.
    """

    name: str
    value: float
    count: int
    low: float | None = None
    high: float | None = None
    floor: float | None = None
    floor_count: int | None = None
    infinite: float | None = None


def is_distance(metric: Metric) -> bool:
    """Whether it is a Fréchet distance, which alone is extrapolated."""
    return metric.infinite is not None


@dataclass(frozen=True)
class Evaluation:
    """The metrics of a set of images and what they were computed from.

    images_sha256, reference_sha256: of the pixels, whatever the order of the images; None where the
        reference holds statistics alone.
    statistics_sha256: of the mean and covariance of a reference file, where they were taken.
    """

    metrics: tuple[Metric, ...]
    network: str
    network_sha256: str
    num_images: int
    images_sha256: str
    repeats: int
    reference: str
    num_reference_images: int
    reference_sha256: str | None
    statistics_sha256: str | None = None


def extract(
    images: ImageSet,
    network: FeatureNetwork,
    batch: int,
    advance: Callable[[int, str], None] = lambda count, what: None,
) -> Features:
    """Features of all images of a set, on the CPU.

    Args:
        advance: called with the number of images and the name of the set after each batch.
    Raises:
        UserError: features that are not finite; the first image that has them is named.
    """
    rows: list[Tensor] = []
    spatial: list[Tensor] = []
    logits: list[Tensor] = []
    start = 0
    with torch.inference_mode():
        for pixels in images.batches(batch):
            output = network.run(pixels.to(network.device))
            for part in (output.features_BD, output.spatial_BD, output.logits_BC):
                if part is not None and not part.isfinite().all():
                    bad = int((~part.isfinite()).flatten(1).any(1).int().argmax())
                    raise UserError(
                        f"eval: {network.name}: the features of image {start + bad} of "
                        f"{images.name} are not finite in {str(part.dtype).removeprefix('torch.')}"
                    )
            start += len(pixels)
            rows.append(output.features_BD.cpu())
            spatial += [] if output.spatial_BD is None else [output.spatial_BD.cpu()]
            logits += [] if output.logits_BC is None else [output.logits_BC.cpu()]
            advance(len(pixels), images.name)
    return Features(
        torch.cat(rows),
        torch.cat(spatial) if spatial else None,
        torch.cat(logits) if logits else None,
    )


@modes_of_a_new_process()
def evaluate(
    images: ImageSet,
    reference: Reference,
    network: FeatureNetwork,
    *,
    batch: int = 64,
    real: Features | None = None,
    paired: bool = False,
    advance: Callable[[int, str], None] = lambda count, what: None,
) -> Evaluation:
    """Every metric that the network, the images and the reference allow.

    Args:
        paired: whether image i belongs to image i of the reference, as a reconstruction does: a
            distance from these images then has the interval of other draws of such pairs.
        batch: images of a batch; it changes no metric.
        real: features of the reference's images, if they were extracted before.
    Warns:
        RuntimeWarning: repeated images, images sorted by class, other classes than the reference's,
            fewer images than features.
    Raises:
        UserError: too few images, or a reference of another size or other features.
    """
    integer("evaluate", "batch", batch, 1)
    if paired and reference.images is not None:
        check_pairs(images, reference.images)
        warn_of_order(images, reference.images)
    height, width = images.read(range(1)).shape[2:]
    check_reference(reference, network, images.name, images.count, (height, width), images.labels)
    if reference.images is not None:
        _warn_of_other_classes(images, reference.images)
    own = extract(images, network, batch, advance)
    if real is None and reference.images is not None:
        real = extract(reference.images, network, batch, advance)
    for each, features in ((images, own), (reference.images, real)):
        if each is not None:
            _warn_of_pixels(each)
        if each is not None and features is not None:
            _warn_of_equal_features(each, network, features)
    given = network.distance == GIVEN
    real_labels = None if reference.images is None else reference.images.labels
    metrics = [
        _distance(
            network.distance,
            own.features_BD,
            images.labels,
            None if real is None else real.features_BD,
            real_labels,
            reference.gaussian if given else None,
            reference.name,
            paired,
        )
    ]
    if own.spatial_BD is not None and (
        reference.spatial is not None or (real is not None and real.spatial_BD is not None)
    ):
        metrics.append(
            _distance(
                f"s{network.distance}",
                own.spatial_BD,
                images.labels,
                None if real is None else real.spatial_BD,
                real_labels,
                reference.spatial if given else None,
                reference.name,
                paired,
            )
        )
    if own.logits_BC is not None:
        metrics += _class_metrics(images, network, own.logits_BC)
    if real is not None:
        shares = precision_recall(generated_ND=own.features_BD, real_MD=real.features_BD)
        one, other = _halves(real.features_BD, images.count, real_labels)
        most = precision_recall(generated_ND=one, real_MD=other)
        metrics += [
            replace(
                share("precision", shares.precision, images.count),
                floor=most.precision,
                floor_count=len(one),
            ),
            replace(
                share("recall", shares.recall, images.count, len(real.features_BD)),
                floor=most.recall,
                floor_count=len(one),
            ),
        ]
    return Evaluation(
        metrics=tuple(metrics),
        network=network.name,
        network_sha256=network.sha256,
        num_images=images.count,
        images_sha256=images.sha256(),
        repeats=images.repeats,
        reference=reference.name,
        num_reference_images=0 if reference.images is None else reference.images.count,
        reference_sha256=None if reference.images is None else reference.images.sha256(),
        statistics_sha256=reference.statistics_sha256() if given else None,
    )


def check_reference(
    reference: Reference,
    network: FeatureNetwork,
    name: str,
    count: int,
    size: tuple[int, int],
    labels: Sequence[int] | None,
) -> None:
    """What can be known before features are extracted, or images generated.

    Args:
        name, count, size: of the images; their height and width.
        labels: of the images, or those that occur among them; None where they are not known.
    Raises:
        UserError: too few images, a reference of another size or without what is needed, or labels
            that the network's classes do not have.
    """
    check_sets(reference, name, count, size)
    highest, known = -1 if labels is None else max(labels), network.num_classes
    if known is not None and highest >= known:
        raise UserError(
            f"eval: the {network.name} has {counted(known, 'class')}, and {name} has images of "
            f"class {highest}; give the classifier of a recipe with these classes"
        )
    if reference.images is None and (network.distance != GIVEN or reference.gaussian is None):
        raise UserError(
            f"eval: {network.distance} needs the images of the reference; {reference.name} "
            "holds statistics of the Inception network alone"
        )


def check_sets(reference: Reference, name: str, count: int, size: tuple[int, int]) -> None:
    """What :func:`check_reference` knows without a network, which may have to be trained first."""
    if count < LEAST:
        raise UserError(f"eval: at least {LEAST} images are needed; {name} has {count}")
    if reference.images is None:
        return
    if reference.images.count < LEAST:
        raise UserError(
            f"eval: at least {LEAST} reference images are needed; {reference.name} has "
            f"{reference.images.count}"
        )
    other = tuple(reference.images.read(range(1)).shape[2:])
    if size != other:
        raise UserError(
            f"eval: images and reference must have one size; {name} has {size[1]} x {size[0]} "
            f"pixels, {reference.name} {other[1]} x {other[0]}"
        )


def _warn_of_other_classes(images: ImageSet, reference: ImageSet) -> None:
    """Warns: RuntimeWarning, if one of the two has images of a class that the other has none of."""
    if images.labels is None or reference.labels is None:
        return
    for one, other in ((images, reference), (reference, images)):
        only = sorted({*(one.labels or ())} - {*(other.labels or ())})
        if only:
            more = ", ..." if len(only) > NAMED_CLASSES else ""
            warnings.warn(
                f"eval: {one.name} has images of {counted(len(only), 'class')} that {other.name} "
                "has none "
                f"of ({', '.join(map(str, only[:NAMED_CLASSES]))}{more}): distances compare other "
                "mixtures of classes",
                RuntimeWarning,
                stacklevel=3,
            )


def _warn_of_pixels(images: ImageSet) -> None:
    """Warns: RuntimeWarning, of repeated images, and of pixels that are 0 and 1 alone."""
    if images.repeats:
        warnings.warn(
            f"eval: {images.repeats:,} of {counted(images.count, 'image')} of {images.name} equal "
            "an earlier one",
            RuntimeWarning,
            stacklevel=3,
        )
    if images.largest <= 1:
        warnings.warn(
            f"eval: no pixel of {images.name} is above {images.largest} of 255; images in [0, 1] "
            "must be multiplied by 255 and rounded before they become uint8",
            RuntimeWarning,
            stacklevel=3,
        )


def _warn_of_equal_features(images: ImageSet, network: FeatureNetwork, features: Features) -> None:
    """Warns: RuntimeWarning, if images that differ all have the same features."""
    rows_ND = features.features_BD
    if images.repeats < images.count - 1 and bool((rows_ND == rows_ND[0]).all()):
        warnings.warn(
            f"eval: {network.name} gives all {counted(images.count, 'image')} of {images.name} "
            "the same features; no number of them says anything",
            RuntimeWarning,
            stacklevel=3,
        )


def _distance(
    name: str,
    own_ND: Tensor,
    labels: Sequence[int] | None,
    real_ND: Tensor | None,
    real_labels: Sequence[int] | None,
    gaussian: Gaussian | None,
    reference: str,
    paired: bool,
) -> Metric:
    side: Gaussian | list[FeatureStatistics] | None = gaussian
    if gaussian is None:
        assert real_ND is not None, "checked before"
        if len(real_ND) <= real_ND.shape[1]:
            warnings.warn(
                f"{name}: the reference {reference} has {counted(len(real_ND), 'image')} for "
                f"{counted(real_ND.shape[1], 'feature')}: its covariance is singular and the "
                "distance too large; give more images",
                RuntimeWarning,
                stacklevel=3,
            )
        own_blocks = blocks_of(real_ND, labels if paired else None)
        gaussian = total(own_blocks).gaussian()
        side = own_blocks if paired else gaussian
    if own_ND.shape[1] != len(gaussian.mean_D):
        raise UserError(
            f"eval: {name} compares {counted(own_ND.shape[1], 'feature')}; {reference} has "
            f"statistics of {len(gaussian.mean_D)}"
        )
    assert side is not None, "set above where it was None"
    result = frechet_from_blocks(blocks_of(own_ND, labels), side, name)
    floor = floor_count = None
    if real_ND is not None:
        floor_count = min(len(own_ND), len(real_ND) // 2)
        floor = floor_of(real_ND, floor_count, real_labels)
    return Metric(
        name,
        result.distance,
        result.count,
        result.low,
        result.high,
        floor,
        floor_count,
        result.infinite,
    )


def floor_of(real_ND: Tensor, count: int, labels: Sequence[int] | None = None) -> float:
    """The Fréchet distance of two disjoint random sets of ``count`` real images.

    No distance of as many images says anything below it.

    Args:
        labels: the class of each image: both sets then have the same share of each class, as
            generated images have them, whose classes take turns. Without, the shares of two random
            sets differ by chance, and their distance is that of the shares too.
    """
    halves = map(FeatureStatistics.of, _halves(real_ND, count, labels))
    return frechet_distance(*(half.gaussian() for half in halves))


def _halves(real_ND: Tensor, count: int, labels: Sequence[int] | None) -> list[Tensor]:
    """Two disjoint random sets of ``count`` real images, or of half of all if there are fewer."""
    total, count = len(real_ND), min(count, len(real_ND) // 2)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(FLOOR_SEED), device="cpu")
    if labels is None:
        return [real_ND[part] for part in order[: 2 * count].split(count)]
    order = order[torch.tensor(labels, device="cpu")[order].argsort(stable=True)]
    evenly = torch.arange(2 * count, device="cpu") * total // (2 * count)
    chosen = order[evenly]  # over the classes
    return [real_ND[chosen[0::2]], real_ND[chosen[1::2]]]


def blocks_of(features_ND: Tensor, labels: Sequence[int] | None = None) -> list[FeatureStatistics]:
    """Statistics of the blocks of :func:`indices_of_blocks`."""
    blocks = indices_of_blocks(len(features_ND), labels)
    return [FeatureStatistics.of(features_ND[block]) for block in blocks]


def indices_of_blocks(count: int, labels: Sequence[int] | None = None) -> list[Tensor]:
    """Ten disjoint blocks of images, each a sample like the whole.

    Args:
        labels: the class of each image: every block has the same share of each class, whatever the
            order. None: of every ten images in order each goes into another block, drawn at
            random, so that images sorted by class give equal blocks, and so do classes in turn,
            which every tenth image would tear apart.
    """
    if labels is None:
        generator = torch.Generator().manual_seed(BLOCK_SEED)
        draws = torch.rand(-(-count // BLOCKS), BLOCKS, generator=generator, device="cpu")
        order = (
            draws.argsort(1) + BLOCKS * torch.arange(len(draws), device="cpu")[:, None]
        ).flatten()
        order = order[order < count]
    else:
        order = torch.tensor(labels, device="cpu").argsort(stable=True)
    return [order[start::BLOCKS] for start in range(BLOCKS)]


def _class_metrics(images: ImageSet, network: FeatureNetwork, logits_NC: Tensor) -> list[Metric]:
    """The Inception Score, or for another network its own; with labels also the accuracy."""
    official = network.distance == "FID"
    score = inception_score(logits_NC, SPLIT)
    name = "Inception Score" if official else f"class score ({network.name})"
    if score.splits >= BLOCKS:
        numbers, error = score.splits, score.std / (score.splits - 1) ** 0.5
    else:  # of few splits the deviation is a guess
        blocks = indices_of_blocks(len(logits_NC), images.labels)
        numbers, error = BLOCKS, jackknife_error([_score_without(logits_NC, b) for b in blocks])
    half = student_quantile(numbers - 1) * error
    low, high = max(1.0, score.mean - half), score.mean + half
    metrics = [Metric(name, score.mean, len(logits_NC), low, high)]
    if images.labels is None:
        return metrics
    _warn_of_sorted_labels(name, images.labels)
    if not official:  # the Inception of 2015 has classes of its own
        labels_N, found_N = torch.tensor(images.labels, device="cpu"), logits_NC.argmax(1)
        _warn_of_other_labels(labels_N, found_N)
        right = found_N == labels_N
        value = float(right.double().mean())
        metrics.append(share("recognised", value, len(right)))
    return metrics


def _score_without(logits_NC: Tensor, block: Tensor) -> float:
    """The Inception Score of the same splits without some of the images."""
    kept_N = torch.ones(len(logits_NC), dtype=torch.bool, device="cpu")
    kept_N[block] = False
    splits = zip(logits_NC.split(SPLIT), kept_N.split(SPLIT), strict=True)
    parts = [logits[kept] for logits, kept in splits if kept.any()]
    return sum(inception_score(part, SPLIT).mean for part in parts) / len(parts)


def _warn_of_sorted_labels(name: str, labels: Sequence[int]) -> None:
    """Warns: RuntimeWarning, if a split of the score holds few of the classes."""
    classes = len(Counter(labels))
    starts = [*range(0, len(labels), SPLIT), len(labels)]
    for start, end in pairwise(starts):
        inside, size = len(set(labels[start:end])), end - start
        is_one_of_two = inside == 1 < classes and size >= LEAST  # half, and as few as can be
        if inside < LEAST_CLASSES_IN_SPLIT * min(classes, size) or is_one_of_two:
            warnings.warn(
                f"eval: {name}: the images are sorted by class: images {start:,} to {end - 1:,} "
                f"show {inside:,} of {counted(classes, 'class')}, which lowers the score; mix "
                "their order",
                RuntimeWarning,
                stacklevel=2,
            )
            return


def _warn_of_other_labels(labels_N: Tensor, found_N: Tensor) -> None:
    """Warns: RuntimeWarning, if two or more classes are mostly recognised as others, one each."""
    others: dict[int, int] = {}
    for label in labels_N.unique().tolist():
        own = found_N[labels_N == label]
        most = int(own.mode().values)
        is_most = int((own == most).sum()) > len(own) / 2
        if most != label and is_most and len(own) >= LEAST_OF_CLASS:
            others[label] = most
    # Images that all look alike are recognised as one class.
    if len(set(others.values())) == len(others) >= 2:
        pairs = [f"{label} as {most}" for label, most in others.items()]
        warnings.warn(
            "eval: recognised: most images of a class are recognised as another one, those of "
            f"{', '.join(pairs[:5])}{', ...' if len(pairs) > 5 else ''}: the labels of the images "
            "may have another order than the classifier's",
            RuntimeWarning,
            stacklevel=2,
        )


def share(name: str, value: float, count: int, trials: int | None = None) -> Metric:
    """A share of the images, with the interval of Wilson 1927 (its score interval).

    Its ends are within 0 and 1, and it has a length also where all images agree: 100 of 100 may be
    0.963 of others.

    Args:
        trials: images that the share is of; None is ``count``, those that were evaluated.
    """
    n = count if trials is None else trials
    spread = 1.96 * (value * (1 - value) / n + 1.96**2 / (4 * n**2)) ** 0.5
    centre, scale = value + 1.96**2 / (2 * n), 1 + 1.96**2 / n
    low, high = (centre - spread) / scale, (centre + spread) / scale
    # The value lies between them, up to rounding.
    return Metric(name, value, count, max(0.0, min(low, value)), min(1.0, max(high, value)))


__all__ = [
    "NEIGHBOURS",
    "Evaluation",
    "Metric",
    "evaluate",
    "extract",
    "floor_of",
    "is_distance",
    "share",
]
