"""Images as uint8 pixels of three colours, which feature networks take.

Axes: B images, I channels, 3 colours, Y X pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def three_channels(images_BIYX: Tensor) -> Tensor:
    """Images of one or three channels as (B, 3, Y, X); gray ones repeat their channel."""
    return images_BIYX.expand(-1, 3, -1, -1) if images_BIYX.shape[1] == 1 else images_BIYX


def to_uint8(images_BIYX: Tensor) -> Tensor:
    """Images in [-1, 1] of one or three channels as uint8 (B, 3, Y, X), rounded."""
    return three_channels(((images_BIYX.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8))


def checked_images(op: str, images_B3YX: Tensor) -> Tensor:
    """The images, if they are uint8 of three colours.

    Raises:
        TypeError, ValueError: they are not.
    """
    if images_B3YX.dtype != torch.uint8:
        raise TypeError(
            f"{op}: images must be uint8, 0 to 255; got {images_B3YX.dtype}. A float image in "
            "[0, 1] becomes (255 * image).round().to(torch.uint8)"
        )
    if images_B3YX.dim() != 4 or images_B3YX.shape[1] != 3:
        raise ValueError(f"{op}: images must be (B, 3, Y, X); got {tuple(images_B3YX.shape)}")
    return images_B3YX
