"""The discriminator of a run that trains the VQ-VAE: its state, its losses and its steps.

Axes: B images of a process's part of the batch, I channels, Y X pixels, P Q patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from variant.models.discriminator import PatchDiscriminator
from variant.training.distributed import Ranks
from variant.training.optim import OptimSection, clipped_step, gradient_norm
from variant.training.vae_losses import (
    LECAM_DECAY,
    adaptive_weight,
    hinge_loss,
    lecam_penalty,
    r1_penalty,
)
from variant.training.vae_sections import AdversarySection


class AdversaryModule(nn.Module):
    """The discriminator, and the moving averages of its outputs that LeCAM needs.

    Buffers: ``averages`` of the mean logit of real images and of reconstructions; ``steps`` in
    which they were updated.
    """

    def __init__(self, channels: int, section: AdversarySection) -> None:
        super().__init__()
        self.discriminator = PatchDiscriminator(channels, section.width, section.layers)
        self.register_buffer("averages", torch.zeros(2))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))


class Adversary:
    """The discriminator, its optimiser and its losses.

    The gradients of several processes are added up, so that every process makes the same step.

    Args:
        optim: of the VQ-VAE, whose schedule and largest gradient norm hold here too.
        seed: of the discriminator's weights.
        ranks: the processes of the run.
    Attributes:
        module, optimizer: what a checkpoint must hold.
    """

    def __init__(
        self,
        section: AdversarySection,
        channels: int,
        optim: OptimSection,
        seed: int,
        ranks: Ranks,
        device: torch.device,
    ) -> None:
        self.section, self.optim, self.ranks, self.device = section, optim, ranks, device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.module = AdversaryModule(channels, section).to(device)
        self.discriminator = self.module.discriminator
        self.optimizer = torch.optim.AdamW(
            self.discriminator.parameters(),
            lr=section.learning_rate,
            betas=section.betas,
            weight_decay=0.0,
            fused=True,
        )
        self._scaler = torch.amp.GradScaler(device.type, enabled=False)
        self._sums = torch.zeros(2, device=device)

    def starts_by(self, step: int) -> bool:
        """Whether the discriminator takes part in a step."""
        return step >= self.section.start_step

    @property
    def is_scaled(self) -> bool:
        """Whether the loss of the VQ-VAE is scaled."""
        return self.optim.precision == "fp16"

    def precision(self) -> Any:
        """Around forward passes: float32 in a run of fp16, whose loss scaling is not for them."""
        return self.full_precision() if self.is_scaled else nullcontext()

    def full_precision(self) -> torch.autocast:
        """Without autocast; also around backward passes."""
        return torch.autocast(self.device.type, enabled=False)

    def logits(self, images_BIYX: Tensor) -> Tensor:
        """Logits (B, 1, P, Q) float32 of patches."""
        return self.discriminator(images_BIYX).float()

    def weigh(
        self, reconstructed_BIYX: Tensor, gradients: Sequence[Tensor], last_layer: Tensor
    ) -> Tensor:
        """The weight of the generator's loss: the recipe's times the adaptive one, a scalar.

        Args:
            reconstructed_BIYX: with a graph back to the last layer.
            gradients: of the reconstruction's losses and of the generator's loss with respect to
                ``reconstructed_BIYX``; both may have the same factor.
            last_layer: the weight of the decoder's last convolution.
        """
        if not self.section.adaptive:
            return torch.tensor(self.section.weight, device=self.device)
        at_last_layer = [
            torch.autograd.grad(reconstructed_BIYX, last_layer, gradient, retain_graph=True)[0]
            for gradient in gradients
        ]
        # Of means over this process's images; their numbers may differ.
        both = torch.stack(at_last_layer) * len(reconstructed_BIYX)
        return self.section.weight * adaptive_weight(*self.ranks.added(both).unbind())

    def accumulate(self, images_BIYX: Tensor, logits_fake: Tensor, share: float) -> Tensor:
        """Add the gradient of the discriminator's loss of one part of a batch; returns the loss.

        Args:
            images_BIYX: real images.  logits_fake: of their reconstructions, with a graph.
            share: of the part in the batch of all processes.
        """
        section = self.section
        is_r1 = section.regularizer == "r1"
        with self.full_precision() if is_r1 else nullcontext():
            images_BIYX = images_BIYX.detach().requires_grad_(is_r1)
            logits_real = self.logits(images_BIYX)
            loss = hinge_loss(logits_real, logits_fake)
            if is_r1:
                loss = loss + section.regularizer_weight * r1_penalty(logits_real, images_BIYX)
        averages, steps = self.module.get_buffer("averages"), self.module.get_buffer("steps")
        if section.regularizer == "lecam":
            penalty = lecam_penalty(logits_real, logits_fake, averages)
            # Before the first step there are no averages.
            loss = loss + section.regularizer_weight * penalty * (steps > 0)
        with self.full_precision():
            (loss * share).backward(inputs=list(self.discriminator.parameters()))
        self._sums += share * torch.stack((logits_real.mean(), logits_fake.mean())).detach()
        return loss.detach()

    def step(self, rate: float) -> Tensor:
        """The discriminator's step with the accumulated gradients; returns their norm.

        A norm that is not finite skips the step; LeCAM's averages then stay as they are.

        Args:
            rate: learning rate of the VQ-VAE in this step.
        """
        parameters = list(self.discriminator.parameters())
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = self.ranks.added(torch.cat([grad.flatten() for grad in gradients]))
        sizes = [grad.numel() for grad in gradients]
        for grad, part in zip(gradients, flat.split(sizes), strict=True):
            grad.copy_(part.view_as(grad))
        for group in self.optimizer.param_groups:
            group["lr"] = self.section.learning_rate * rate / self.optim.learning_rate
        norm = gradient_norm(self.discriminator)
        clipped_step(self.optimizer, self._scaler, norm, self.optim.clip)
        self.optimizer.zero_grad(set_to_none=True)
        means = self.ranks.added(self._sums)
        averages, steps = self.module.get_buffer("averages"), self.module.get_buffer("steps")
        new = torch.where(steps > 0, averages.lerp(means, 1 - LECAM_DECAY), means)
        is_finite = norm.isfinite() & means.isfinite().all()
        averages.copy_(torch.where(is_finite, new, averages))
        steps += is_finite
        self._sums.zero_()
        return norm
