"""Generated images as 8-bit pixels and as PIL images.

Axes: B images, I channels, Y X pixels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from variant.models.placement import check_dtype

if TYPE_CHECKING:
    from PIL.Image import Image

# Of the images of a generation.
IMAGE_DTYPES = (torch.float32, torch.uint8)


def check_image_dtype(op: str, dtype: torch.dtype | str) -> torch.dtype:
    """float32 or uint8, by itself or by name.  Raises: TypeError, ValueError for another."""
    checked = check_dtype(op, dtype, name="image_dtype", dtypes=IMAGE_DTYPES)
    return torch.float32 if checked is None else checked


def to_uint8(images: Tensor) -> Tensor:
    """Pixels of any shape, floating point in [0, 1] (others are clamped), rounded to 0..255."""
    if images.dtype == torch.uint8:
        return images
    return (images.float().clamp(0, 1) * 255).round().to(torch.uint8)


def to_pil(images_BIYX: Tensor) -> list[Image]:
    """8-bit RGB images of (B, I, Y, X) with I = 3 or 1; uint8, or floating point in [0, 1].

    Raises:
        ValueError: another shape.
    """
    # Here, because PIL takes as long to import as the kernels.
    from PIL import Image

    shape = tuple(images_BIYX.shape)
    if len(shape) != 4 or shape[1] not in (1, 3):
        raise ValueError(f"to_pil: images must be (B, 3 or 1, Y, X); got {shape}")
    pixels_BYXI = to_uint8(images_BIYX).expand(-1, 3, -1, -1).permute(0, 2, 3, 1)
    return [Image.fromarray(image) for image in pixels_BYXI.cpu().contiguous().numpy()]
