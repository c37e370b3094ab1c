"""The loss of the VQ-VAE's reconstructions: pixel error, perceptual distance, adversary.

Axes: B images, I channels, Y X pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from variant.training.adversary import Adversary
from variant.training.perceptual import PerceptualLoss
from variant.training.recipe import VAETraining
from variant.training.vae_losses import generator_loss, pixel_error, with_gradient

# Takes a key, a value and its weight in the mean: a mean over images weighs as many as they are.
Measure = Callable[[str, Tensor, Tensor | float], None]


class ImageLoss:
    """The loss of reconstructions, as a recipe weighs its terms.

    Args:
        perceptual, adversary: None are none.
        last_layer: the weight of the decoder's last convolution.
        measure: takes the value of each term.
    """

    def __init__(
        self,
        training: VAETraining,
        perceptual: PerceptualLoss | None,
        adversary: Adversary | None,
        last_layer: Tensor,
        measure: Measure,
    ) -> None:
        self.training, self.last_layer, self.measure = training, last_layer, measure
        self.perceptual, self.adversary = perceptual, adversary

    def __call__(
        self,
        reconstructed_BIYX: Tensor,
        images_BIYX: Tensor,
        step: int,
        share: float,
        scale: Tensor | None = None,
    ) -> Tensor:
        """The loss, a scalar with a gradient; also the discriminator's gradient, accumulated.

        Args:
            reconstructed_BIYX: float32, with a graph back to ``last_layer``.
            images_BIYX: in [-1, 1].
            share: of these images in the batch of all processes.
            scale: of the loss in fp16, in which small gradients are zero; a scalar. None is 1.
        """
        adversary = self.adversary
        if adversary is None or not adversary.starts_by(step):
            return self._reconstruction(reconstructed_BIYX, images_BIYX)
        # Both gradients at the reconstruction are known before its graph is traversed, once: the
        # networks of the losses run backward once, too.
        leaf_BIYX = reconstructed_BIYX.detach().requires_grad_()
        reconstruction = self._reconstruction(leaf_BIYX, images_BIYX)
        with adversary.precision():
            logits_fake = adversary.logits(leaf_BIYX)
        generator = generator_loss(logits_fake)
        with adversary.full_precision():
            scale = torch.ones_like(generator) if scale is None else scale
            # They do not pass through the scaled loss, so that they need its scale by themselves.
            (scaled,) = torch.autograd.grad(reconstruction * scale, leaf_BIYX)
            (disputed,) = torch.autograd.grad(generator, leaf_BIYX, retain_graph=True)
            wanted, both = scaled / scale, (scaled, disputed * scale)
            weight = adversary.weigh(reconstructed_BIYX, both, self.last_layer)
        with adversary.precision():
            discriminator = adversary.accumulate(images_BIYX, logits_fake, share)
        # An overflow at this scale: the gradient is not finite, which skips the step.
        is_finite = weight.isfinite()
        counted = weight.where(is_finite, 0) if adversary.is_scaled else weight
        count = len(images_BIYX)
        self.measure("loss/generator", generator, count)
        self.measure("loss/discriminator", discriminator, count)
        self.measure("adversary/weight", counted, count * is_finite)
        value = (reconstruction + counted * generator).detach()
        return with_gradient(reconstructed_BIYX, value, wanted + weight * disputed)

    def held_out(self, reconstructed_BIYX: Tensor, images_BIYX: Tensor) -> dict[str, float]:
        """The terms that need no adversary, without a gradient, by name."""
        pixels = pixel_error(self.training.pixel_loss, reconstructed_BIYX, images_BIYX)
        losses = {"reconstruction": pixels.item()}
        if self.perceptual is not None:
            losses["perceptual"] = self.perceptual(reconstructed_BIYX, images_BIYX).item()
        return losses

    def _reconstruction(self, reconstructed_BIYX: Tensor, images_BIYX: Tensor) -> Tensor:
        training = self.training
        pixels = pixel_error(training.pixel_loss, reconstructed_BIYX, images_BIYX)
        self.measure("loss/reconstruction", pixels, len(images_BIYX))
        loss = training.reconstruction * pixels
        if self.perceptual is None:
            return loss
        distance = self.perceptual(reconstructed_BIYX, images_BIYX)
        self.measure("loss/perceptual", distance, len(images_BIYX))
        return loss + training.perceptual.weight * distance
