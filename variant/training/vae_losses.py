"""Losses of the VQ-VAE's reconstructions, each a function of tensors.

Axes: B images, I channels, Y X pixels, C features, P Q patches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MOST_ADAPTIVE = 1e4
EPSILON = 1e-10  # of LPIPS
LECAM_DECAY = 0.99


def pixel_error(kind: str, reconstructed_BIYX: Tensor, images_BIYX: Tensor) -> Tensor:
    """Mean over all pixels of the squared ("l2") or absolute ("l1") difference."""
    loss = F.mse_loss if kind == "l2" else F.l1_loss
    return loss(reconstructed_BIYX, images_BIYX)


def unit_features(features_BCYX: Tensor) -> Tensor:
    """Features divided by their norm over the channels, which are axis 1."""
    # The inner term keeps the gradient finite where all channels are zero.
    norm = (features_BCYX.square().sum(1, keepdim=True) + EPSILON**2).sqrt()
    return features_BCYX / (norm + EPSILON)


def feature_distance(
    features: Sequence[Tensor], others: Sequence[Tensor], weights: Sequence[Tensor] | None = None
) -> Tensor:
    """Distance between the features of images and of their reconstructions, a scalar.

    Features are divided by their norm over the channels (:func:`unit_features`). Their squared
    differences are summed over the channels and averaged over images and places. With weights, the
    layers are added, as in LPIPS (Zhang et al. 2018, "The unreasonable effectiveness of deep
    features as a perceptual metric", equation 1); without, they are averaged.

    Args:
        features, others: of the layers, (B, C, ...) each.
        weights: of the channels of each layer, (C,); None weighs all alike.
    """
    total = features[0].new_zeros(())
    for layer, (one, other) in enumerate(zip(features, others, strict=True)):
        difference = (unit_features(one) - unit_features(other)).square()
        if weights is not None:
            difference = difference * weights[layer].view(1, -1, *[1] * (difference.dim() - 2))
        total = total + difference.sum(1).mean()
    return total if weights is not None else total / len(features)


def generator_loss(logits_fake: Tensor) -> Tensor:
    """The generator's side of the hinge loss: minus the mean logit of reconstructions."""
    return -logits_fake.mean()


def hinge_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """The discriminator's hinge loss (Lim and Ye 2017, "Geometric GAN"), the mean of both sides."""
    return 0.5 * (F.relu(1 - logits_real).mean() + F.relu(1 + logits_fake).mean())


def r1_penalty(logits_real: Tensor, images_BIYX: Tensor) -> Tensor:
    """Half the mean over images of the squared norm of the gradient at real images.

    Mescheder et al. 2018, "Which training methods for GANs do actually converge?", equation 9; of
    the mean logit of an image's patches. It can be differentiated.
    """
    total = logits_real.mean(dim=(1, 2, 3)).sum()
    (gradient,) = torch.autograd.grad(total, images_BIYX, create_graph=True)
    return 0.5 * gradient.square().sum(dim=(1, 2, 3)).mean()


def lecam_penalty(logits_real: Tensor, logits_fake: Tensor, averages_2: Tensor) -> Tensor:
    """The regulariser of Tseng et al. 2021, "Regularizing generative adversarial networks under
    limited data" (LeCAM), as its authors compute it: one-sided.

    Args:
        averages_2: moving averages of the mean logit of real images and of reconstructions.
    """
    real, fake = averages_2.unbind()
    return F.relu(logits_real - fake).square().mean() + F.relu(real - logits_fake).square().mean()


def adaptive_weight(reconstruction: Tensor, generator: Tensor) -> Tensor:
    """The norm of one gradient over that of another, at most 10,000; a scalar.

    Esser et al. 2021, "Taming transformers for high-resolution image synthesis", equation 7,
    without its constant in the denominator. Two zero gradients give 0, one that is not finite NaN.

    Args:
        reconstruction, generator: gradients of the losses of these names at the decoder's last
            layer.
    """
    above, below = reconstruction.norm(), generator.norm()
    ratio = (above / below.clamp_min(torch.finfo(below.dtype).tiny)).clamp_max(MOST_ADAPTIVE)
    return ratio.where(above.isfinite() & below.isfinite(), math.nan)


class _WithGradient(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, _, gradient = inputs
        ctx.save_for_backward(x, gradient)
        ctx.save_for_forward(x, gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, gradient = ctx.saved_tensors
        return _GivenGradient.apply(grads[0], x, gradient), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        _, gradient = ctx.saved_tensors
        return (tangents[0] * gradient).sum()


class _GivenGradient(torch.autograd.Function):
    """The gradient where it was computed: how it changes with ``x`` is not known."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor, x: Tensor, gradient: Tensor) -> Tensor:
        return grad * gradient

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError("with_gradient: has no second derivative")

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError("with_gradient: has no second derivative")


def with_gradient(x: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
    """A scalar loss of ``x`` whose value and gradient are known.

    Args:
        value: a scalar.  gradient: of the value with respect to ``x``, of its shape; both are
            constants.
    Gradient: x, also in forward mode and under torch.func's transforms; no second derivative.
    """
    return _WithGradient.apply(x, value, gradient)  # pyright: ignore[reportReturnType]
