"""The sections of a recipe for the losses of the VQ-VAE beyond the pixel error."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import ConfigDict

from variant.models.config import STRICT, require, require_plain_numbers
from variant.models.ranges import Count, CountOrZero, NotNegative, Positive, ShareBelowOne
from variant_kernels.wording import counted

CLASSIFIER, LPIPS = "classifier", "lpips"
LPIPS_LEAST_SIDE = 16  # pixels: VGG16 halves them four times before its last features


@dataclass(frozen=True)
class PerceptualSection:
    """Perceptual loss of the VQ-VAE: a distance of features of an image and its reconstruction.

    weight: of the distance in the loss; 0 turns it off.
    network: "classifier": features of a small classifier, which train-vae first trains on the same
        training images and labels. "lpips": LPIPS with VGG16. "MODULE:FUNCTION": a differentiable
        function of float images (B, 3, Y, X) in [-1, 1] that returns features (B, C, ...), one
        tensor or a list of them.
    steps: optimizer steps of the classifier.
    vgg_weights: for "lpips": file of the state dict of torchvision's VGG16 (.pth or .safetensors;
        published as vgg16-397923af.pth).
    lpips_weights: for "lpips": file of the state dict of LPIPS's linear layers (.pth or
        .safetensors; published as v0.1/vgg.pth).
    """

    weight: NotNegative = 0.0
    network: str = CLASSIFIER
    steps: Count = 1500
    vgg_weights: str | None = None
    lpips_weights: str | None = None

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    def __post_init__(self) -> None:
        require_plain_numbers(self)
        module, colon, function = self.network.partition(":")
        is_function = bool(module and colon and function)
        require(
            self.network in (CLASSIFIER, LPIPS) or is_function,
            f'network must be "{CLASSIFIER}", "{LPIPS}" or "MODULE:FUNCTION"',
            self.network,
        )
        for key in ("vgg_weights", "lpips_weights"):
            value = getattr(self, key)
            needed = self.network == LPIPS
            require(
                (value is not None) == needed,
                f'{key} must name a file with network "{LPIPS}"; nothing is downloaded'
                if needed
                else f'{key} needs network "{LPIPS}"',
                value,
            )


@dataclass(frozen=True)
class AdversarySection:
    """Adversarial loss of the VQ-VAE: a discriminator of patches (PatchGAN) with hinge loss.

    weight: of the generator's loss; 0 trains no discriminator. After start_step the last
        evaluated epoch is kept, because an adversary raises the pixel error: the moving average if
        there is one, else the weights.
    start_step: optimizer steps of the VQ-VAE before the discriminator starts.
    adaptive: multiply the weight by the norm of the gradient of the reconstruction's losses over
        that of the generator's loss, both at the decoder's last layer, at most 10,000.
    width: channels of the discriminator's first layer.
    layers: layers of stride 2; each doubles the channels, up to 8 times the width.
    learning_rate: of the discriminator; follows the schedule of [vae_training.optim].
    betas: of the discriminator's AdamW.
    regularizer: of the discriminator: "none"; "r1", the squared gradient at real images; "lecam",
        the distance from moving averages of its outputs.
    regularizer_weight: of the regularizer in the discriminator's loss.
    """

    weight: NotNegative = 0.0
    start_step: CountOrZero = 0
    adaptive: bool = True
    width: Count = 64
    layers: Count = 3
    learning_rate: Positive = 2e-4
    betas: tuple[ShareBelowOne, ShareBelowOne] = (0.5, 0.9)
    regularizer: Literal["none", "r1", "lecam"] = "none"
    regularizer_weight: NotNegative = 0.0

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    def __post_init__(self) -> None:
        require_plain_numbers(self)
        require(
            (self.regularizer == "none") == (self.regularizer_weight == 0),
            "regularizer_weight must be above 0 with a regularizer, and 0 without one",
            self.regularizer_weight,
        )
        for name, most in (("width", 1024), ("layers", 8)):
            value = getattr(self, name)
            require(value <= most, f"{name} must be at most {most}", value)

    def problems(self, steps: int) -> Iterator[str]:
        """What stops a run of so many optimizer steps; each text begins with its key."""
        if self.weight and self.start_step >= steps:
            yield (
                f"start_step must be below the {counted(steps, 'step')} of the run; got "
                f"{self.start_step:,}"
            )
