"""A teacher for subnet steps: the full network with weights that the step does not train.

    loss = cross-entropy + weight * KL(teacher || subnet), means over all tokens

Axes: B images, L tokens of all scales, V codebook entries.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from variant.models.token_loss import TokenLoss, losses_of
from variant.models.var import VAR
from variant.training.ema import EMA


class Teacher:
    """The full network of a module, in eval mode, with other weights.

    Args:
        module: the one that is trained.
        weights: that it has while it teaches: a moving average, or the weights of the start.
    """

    def __init__(self, module: VAR, weights: EMA) -> None:
        self.module, self.weights = module, weights

    @torch.no_grad()
    def logits(self, labels_B: Tensor, x_teacher: Tensor, **condition: Any) -> Tensor:
        """(B, L, V) float32; arguments as those of :meth:`VAR.forward`.

        To be called before the forward pass of the subnet, whose graph needs its own weights.
        """
        device, was_training = labels_B.device.type, self.module.training
        self.module.eval()
        try:
            with (
                self.weights.in_place_of_weights(),
                # Autocast would keep the casts of the teacher's weights, and the subnet use them.
                torch.autocast(
                    device,
                    dtype=torch.get_autocast_dtype(device),
                    enabled=torch.is_autocast_enabled(device),
                    cache_enabled=False,
                ),
            ):
                return self.module(labels_B, x_teacher, None, **condition)
        finally:
            self.module.train(was_training)


def distillation_loss(
    logits_BLV: Tensor, targets_BL: Tensor, teacher_BLV: Tensor, weight: float
) -> tuple[TokenLoss, Tensor]:
    """The loss of a subnet step with a teacher, and its divergence alone.

    Args:
        logits_BLV, teacher_BLV: of the subnet and of the teacher.
        weight: of the divergence.
    Returns:
        a :class:`TokenLoss`, whose losses by token are cross-entropies; the mean divergence, in
        nats.
    """
    own_BLV = logits_BLV.float().log_softmax(-1)
    given_BLV = teacher_BLV.float().log_softmax(-1)
    losses_BL = losses_of(own_BLV, targets_BL)
    divergence_BL = (given_BLV.exp() * (given_BLV - own_BLV)).sum(-1)
    divergence = divergence_BL.mean()
    mean = losses_BL.mean() + weight * divergence
    return TokenLoss(mean, losses_BL.detach()), divergence.detach()
