"""The networks of the perceptual loss: LPIPS, a classifier of the training images, any function.

Nothing is downloaded: weights are read from the files that a recipe names.

Axes: B images, I channels, 3 colours, Y X pixels, C features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from variant.checkpoints.model_folder import load_state
from variant.errors import UserError
from variant.files import read_pickle, read_safetensors
from variant.models.pixels import three_channels
from variant.named_functions import called, module_sha256, named_function
from variant.paths import file_sha256, open_regular
from variant.training.classifier import Classifier
from variant.training.vae_losses import feature_distance
from variant.training.vae_sections import PerceptualSection

# VGG16's convolutions: channels by stage; a pooling is between stages.
VGG_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# Of images in [-1, 1]; equal to the mean and deviation that VGG16 was trained with, of [0, 1].
LPIPS_SHIFT, LPIPS_SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)

# Float images (B, 3, Y, X) in [-1, 1] to the features of each layer, (B, C, ...).
FeatureMaps = Callable[[Tensor], Sequence[Tensor]]


class PerceptualLoss:
    """The distance between features of images and of their reconstructions.

    Args:
        features: of the network.
        weights: of the channels of each layer; None weighs all alike.
        what: the network, for people.
        sha256: of its weights or of the file of its module; "" where there is none.
    """

    def __init__(
        self,
        features: FeatureMaps,
        what: str,
        sha256: str = "",
        weights: Sequence[Tensor] | None = None,
    ) -> None:
        self.features, self.what, self.sha256, self.weights = features, what, sha256, weights

    def __call__(self, reconstructed_BIYX: Tensor, images_BIYX: Tensor) -> Tensor:
        """The distance, a scalar with a gradient to the reconstructions."""
        with torch.no_grad():
            wanted = [layer.float() for layer in self.features(three_channels(images_BIYX))]
        found = [layer.float() for layer in self.features(three_channels(reconstructed_BIYX))]
        shapes, others = ([tuple(x.shape) for x in layers] for layers in (found, wanted))
        if shapes != others:  # they would be broadcast
            raise UserError(
                f"perceptual loss: {self.what} must have the same shapes for reconstructions as "
                f"for images; got {shapes} and {others}"
            )
        return feature_distance(found, wanted, self.weights)


# --- LPIPS --------------------------------------------------------------------------------------


class VGG16Features(nn.Module):
    """The convolutions of VGG16 (Simonyan and Zisserman 2014), with torchvision's names.

    Gives the five feature maps that LPIPS compares: of the last ReLU of each stage.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        self.taps: list[int] = []
        inputs = 3
        for stage in VGG_STAGES:
            layers += [nn.MaxPool2d(2)] if layers else []
            for outputs in stage:
                layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
                inputs = outputs
            self.taps.append(len(layers) - 1)
        self.features = nn.Sequential(*layers)

    def forward(self, images_B3YX: Tensor) -> list[Tensor]:
        return tapped(self.features, self.taps, images_B3YX)


class _Linear(nn.Module):
    """Weights of the channels of one layer, with LPIPS's names: ``model.1.weight``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Identity(), nn.Conv2d(channels, 1, 1, bias=False))


class _Linears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for index, stage in enumerate(VGG_STAGES):
            self.add_module(f"lin{index}", _Linear(stage[-1]))


def tapped(layers: nn.Sequential, taps: Sequence[int], x: Tensor) -> list[Tensor]:
    """The outputs of some of the layers, by their index."""
    maps = []
    for index, layer in enumerate(list(layers)[: taps[-1] + 1]):
        x = layer(x)
        if index in taps:
            maps.append(x)
    return maps


def lpips_loss(vgg_weights: str, lpips_weights: str, device: torch.device) -> PerceptualLoss:
    """LPIPS with VGG16, version 0.1 (Zhang et al. 2018), of images in [-1, 1].

    Args:
        vgg_weights: file of torchvision's state dict; of its keys, ``features.*`` are read.
        lpips_weights: file of the linear layers, ``lin0.model.1.weight`` (1, 64, 1, 1) to
            ``lin4.model.1.weight`` (1, 512, 1, 1).
    Raises:
        UserError: a file is missing or damaged, or does not hold these weights; it is named.
    """
    vgg, linears = VGG16Features(), _Linears()
    state = _read(vgg_weights)
    convolutions = {key: value for key, value in state.items() if key.startswith("features.")}
    load_state(vgg, convolutions, vgg_weights)
    load_state(linears, _read(lpips_weights), lpips_weights)
    vgg.to(device).eval().requires_grad_(False)
    weights = [value.detach().flatten().to(device) for value in linears.state_dict().values()]
    shift = torch.tensor(LPIPS_SHIFT, device=device).view(1, 3, 1, 1)
    scale = torch.tensor(LPIPS_SCALE, device=device).view(1, 3, 1, 1)

    def features(images_B3YX: Tensor) -> Sequence[Tensor]:
        return vgg((images_B3YX - shift) / scale)

    digests = [file_sha256(Path(path)) for path in (vgg_weights, lpips_weights)]
    return PerceptualLoss(features, "LPIPS with VGG16", " ".join(digests), weights)


def _read(path: str) -> dict[str, Any]:
    with open_regular(path):
        pass
    state = read_safetensors(path) if path.endswith(".safetensors") else read_pickle(path)
    wrong = next((key for key, value in state.items() if not isinstance(value, Tensor)), None)
    if wrong is not None:
        raise UserError(f"{path}: must be a state dict of tensors; {wrong!r:.60} is none")
    return state


# --- a classifier, and any function -------------------------------------------------------------


def classifier_loss(
    classifier: Classifier, accuracy: float, sha256: str, device: torch.device
) -> PerceptualLoss:
    """The features of a classifier: the output of each of its ReLUs.

    Args:
        classifier: trained.  accuracy: of the classifier, a share of the held-out images.
    """
    stages = classifier.stages.to(device).eval().requires_grad_(False)
    taps = [index for index, layer in enumerate(stages) if isinstance(layer, nn.ReLU)]
    what = (
        "features of a classifier trained first on the same training images and labels "
        f"({accuracy:.1%} of the held-out images right)"
    )
    return PerceptualLoss(lambda images: tapped(stages, taps, images), what, sha256)


def function_loss(name: str, recipe: str) -> PerceptualLoss:
    """The features that a function gives.

    Args:
        name: "MODULE:FUNCTION".  recipe: its name, for messages.
    Raises:
        UserError: there is no such function.
    """
    where = f"{recipe}: vae_training.perceptual.network {name}"
    module, function = named_function(where, name)
    checked: list[bool] = []

    def features(images_B3YX: Tensor) -> Sequence[Tensor]:
        # A copy: other losses read the images too, and a function may change what it is given.
        output = called(where, function, images_B3YX.clone())
        layers: list[Any] = list(output) if isinstance(output, list | tuple) else [output]
        if not layers or not all(_is_features(layer, len(images_B3YX)) for layer in layers):
            got = [tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in layers]
            raise UserError(
                f"{where}: must return floating features ({len(images_B3YX)}, C, ...) of as many "
                f"images, one tensor or a list of them; got {got}"
            )
        if images_B3YX.requires_grad and not any(layer.requires_grad for layer in layers):
            raise UserError(f"{where}: its features have no gradient to the images")
        if not checked:  # once: on a GPU it waits for the device
            if not all(layer.isfinite().all() for layer in layers):
                raise UserError(f"{where}: its features are not finite")
            checked.append(True)
        return layers

    return PerceptualLoss(features, f"features of {name}", module_sha256(module))


def _is_features(value: object, count: int) -> bool:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return False
    return value.dim() >= 2 and len(value) == count and value.numel() > 0


def given_loss(section: PerceptualSection, recipe: str, device: torch.device) -> PerceptualLoss:
    """The perceptual loss of a section that names files or a function.

    Args:
        section: of another network than the classifier.  recipe: its name, for messages.
    Raises:
        UserError: as :func:`lpips_loss` and :func:`function_loss`.
    """
    if section.vgg_weights is not None and section.lpips_weights is not None:
        return lpips_loss(section.vgg_weights, section.lpips_weights, device)
    return function_loss(section.network, recipe)
