"""Networks whose features are compared: the Inception of FID, a classifier, or any function.

The name of a number comes from its network: FID for the Inception of 2015 with the published
weights, FD with the network's name for all others.

Axes: B images, 3 colours, Y X pixels, D features, C classes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from variant.errors import UserError
from variant.evaluation.dinov2 import STANDARD, DINOv2, size_of
from variant.evaluation.inception import Inception2015
from variant.files import read_pickle
from variant.named_functions import called, module_sha256, named_function
from variant.paths import file_sha256, open_regular, shown
from variant.torch_modes import modes_of_a_new_process
from variant_kernels.arguments import choice

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION_SOURCE = "release v0.2.0 of github.com/toshas/torch-fidelity"
DINOV2_FILE = "dinov2_vitl14_pretrain.pth"
DINOV2_SOURCE = "the backbone without registers of github.com/facebookresearch/dinov2"


@dataclass(frozen=True)
class Features:
    """What a network gives for B images, float32.

    features_BD: of the Fréchet distance, precision and recall.
    spatial_BD: of sFID; None where the network has none.
    logits_BC: of the Inception Score; None where it has no classes.
    """

    features_BD: Tensor
    spatial_BD: Tensor | None = None
    logits_BC: Tensor | None = None


@dataclass(frozen=True)
class FeatureNetwork:
    """A network for :func:`variant.evaluation.report.evaluate`.

    name: of the network.  distance: of its Fréchet distance, "FID" for the Inception of 2015 alone.
    sha256: of the weights; for a function of the file of its module, "" where it has none.
    run: uint8 images (B, 3, Y, X) on the network's device -> features.
    num_classes: that it tells apart, if they are those of the labels; None where they are not.
    """

    name: str
    distance: str
    sha256: str
    run: Callable[[Tensor], Features]
    device: torch.device
    num_classes: int | None = None


@modes_of_a_new_process()
def load_network(
    name: str, weights: str | os.PathLike[str] | None = None, device: str = "cpu"
) -> FeatureNetwork:
    """The network of a name.

    Args:
        name: "inception", "dinov2", or "module:function" for a function of uint8 images
            (B, 3, Y, X) that returns features (B, D).
        weights: file of the weights, for "inception" and "dinov2".
    Raises:
        UserError: the file is missing or another one, or there is no such function.
    """
    if ":" in name:
        return _function(name, torch.device(device))
    choice("load_network", "name", name, ("inception", "dinov2", "MODULE:FUNCTION"))
    is_inception = name == "inception"
    if weights is None:
        file, source = (
            (INCEPTION_FILE, INCEPTION_SOURCE) if is_inception else (DINOV2_FILE, DINOV2_SOURCE)
        )
        raise UserError(
            f"eval: --weights must name the file {file} ({source}); nothing is downloaded"
        )
    return (inception_network if is_inception else dinov2_network)(weights, torch.device(device))


def inception_network(
    path: str | os.PathLike[str], device: torch.device, sha256: str = INCEPTION_SHA256
) -> FeatureNetwork:
    """The Inception of 2015 with the weights of a file.

    Args:
        sha256: that the file must have.
    Raises:
        UserError: the file cannot be read, or is another one.
    """
    with open_regular(path):
        found = file_sha256(Path(path))
    if found != sha256:
        raise UserError(
            f"{shown(path)}: its SHA-256 must be {sha256}, that of {INCEPTION_FILE} "
            f"({INCEPTION_SOURCE}); got {found}"
        )
    network = Inception2015()
    load_weights(network, read_pickle(path), path)
    network.to(device)

    def run(images_B3YX: Tensor) -> Features:
        output = network(images_B3YX)
        return Features(output.features_BD, output.spatial_BD, output.logits_BC)

    return FeatureNetwork("inception-2015", "FID", found, run, device)


def dinov2_network(path: str | os.PathLike[str], device: torch.device) -> FeatureNetwork:
    """The DINOv2 network with the weights of a published file.

    Its distance is "FD-DINOv2" for ViT-L/14; other sizes are named behind it. No hash of the files
    is published, so none is required: that of the given file is part of the result.

    Raises:
        UserError: the file cannot be read, or holds no DINOv2 network without registers.
    """
    state = read_pickle(path)
    try:
        size = size_of(state)
    except ValueError as error:
        raise UserError(
            f"{shown(path)}: {error}; --weights takes {DINOV2_FILE} ({DINOV2_SOURCE})"
        ) from None
    with torch.device("meta"):
        network = DINOv2(size)
    network.to_empty(device="cpu")
    load_weights(network, state, path)
    network.to(device)
    distance = "FD-DINOv2" if size.name == STANDARD else f"FD-DINOv2 ({size.name})"
    sha256 = file_sha256(Path(path))
    return FeatureNetwork(
        f"dinov2 {size.name}", distance, sha256, lambda images: Features(network(images)), device
    )


def load_weights(network: nn.Module, state: object, path: str | os.PathLike[str]) -> None:
    """Load a state dict, strictly.

    Raises:
        UserError: names or shapes are others than the network's.
    """
    own = network.state_dict()
    given = state if isinstance(state, dict) else {}
    # Counters of batches, which evaluation does not use, are missing in some files.
    missing = [name for name in own if name not in given and "num_batches" not in name]
    wrong = [
        name
        for name, tensor in given.items()
        if name in own and (not isinstance(tensor, Tensor) or tensor.shape != own[name].shape)
    ]
    if missing or wrong:
        raise UserError(
            f"{shown(path)}: does not hold the weights of {type(network).__name__}: "
            f"{', '.join((missing or wrong)[:3])} "
            f"{'missing' if missing else 'of another shape'}"
        )
    network.load_state_dict({name: given[name] for name in own if name in given}, strict=False)


def _function(name: str, device: torch.device) -> FeatureNetwork:
    where = f"eval: --features {name}"
    module, function = named_function(where, name)
    widths: set[int] = set()

    def run(images_B3YX: Tensor) -> Features:
        features = called(where, function, images_B3YX)
        if not _is_features(features, len(images_B3YX)):
            got: object = type(features).__name__
            if isinstance(features, Tensor):
                kind = f"{features.dtype}, {features.layout}, on {features.device.type}"
                got = f"{tuple(features.shape)} ({kind.replace('torch.', '')})"
            raise UserError(
                f"eval: {name} must return floating features ({len(images_B3YX)}, D) for as many "
                f"images, with D of 1 or more; got {got}"
            )
        widths.add(features.shape[1])
        if len(widths) > 1:
            raise UserError(
                f"eval: {name} must return as many features for every batch; got "
                f"{' and '.join(map(str, sorted(widths)))}"
            )
        return Features(features.float())

    return FeatureNetwork(name, f"FD ({name})", module_sha256(module), run, device)


def _is_features(value: object, count: int) -> bool:
    """Whether a function returned a matrix with a row of features for each image."""
    return (
        isinstance(value, Tensor)
        and value.dim() == 2
        and len(value) == count
        and value.shape[1] > 0
        and value.is_floating_point()
        and value.layout == torch.strided
        and not value.is_meta
    )
