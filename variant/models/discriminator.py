"""A discriminator of image patches for the adversarial loss of the VQ-VAE.

PatchGAN (Isola et al. 2017, "Image-to-image translation with conditional adversarial networks"):
one logit for every patch. Group norm in place of batch norm, so that an image's logits depend on
this image alone, however a batch is divided.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from variant.models.config import GROUPS

LEAST_SIDE = 3  # after the layers of stride 2; two layers follow, each of which takes 1 off
MOST_WIDER = 8  # times the width of the first layer
SLOPE = 0.2


class PatchDiscriminator(nn.Module):
    """Images (B, I, Y, X) in about [-1, 1] to logits (B, 1, P, Q) of patches, high for real ones.

    Args:
        channels: I.  width: channels of the first layer.  layers: layers of stride 2, which needs
            Y and X of at least 3 * 2**layers.
    """

    def __init__(self, channels: int, width: int, layers: int) -> None:
        super().__init__()
        stack: list[nn.Module] = [
            nn.Conv2d(channels, width, 4, stride=2, padding=1),
            nn.LeakyReLU(SLOPE),
        ]
        inputs = width
        for layer in range(1, layers + 1):
            outputs = width * min(2**layer, MOST_WIDER)
            stride = 2 if layer < layers else 1
            stack += [
                nn.Conv2d(inputs, outputs, 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(math.gcd(GROUPS, outputs), outputs),
                nn.LeakyReLU(SLOPE),
            ]
            inputs = outputs
        self.stack = nn.Sequential(*stack, nn.Conv2d(inputs, 1, 4, padding=1))
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.normal_(part.weight, 0.0, 0.02)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)

    def forward(self, images_BIYX: Tensor) -> Tensor:
        return self.stack(images_BIYX)
