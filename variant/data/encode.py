"""Tokens of images, independent of the batch that an image is in.

Axes: B images, I channels, Y X pixels, L tokens of all scales.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from variant.models.vqvae import VQVAE

# The features of an image differ in their last bits between batches of 1 to 15 images (measured on
# the CPU: up to 1e-6), and so may a token that is nearly as close to another code. Parts of one
# size give every image the same tokens, in training and in `variant tokenize`, on any number of
# processes; and 16 images of 256x256 pixels fit any GPU.
PART = 16
# On a CPU an image's place in its part counts too (up to 2e-7), unless the rows of its feature map
# begin at full vectors, whose longest have so many floats (AVX-512).
VECTOR = 16


def part_size(vae: VQVAE, device: torch.device) -> int:
    """Images that are encoded at once, so that their tokens depend on nothing but themselves."""
    side = vae.config.patch_nums[-1]  # higher resolutions have multiples of its positions
    return PART if device.type != "cpu" or side * side % VECTOR == 0 else 1


def encode_images(vae: VQVAE, images_BIYX: Tensor) -> Tensor:
    """Tokens (B, L) int64 of images in [-1, 1]; float32 without TF32, in parts of one size.

    The precision of training must not change the tokens, which are its targets.
    """
    device = images_BIYX.device
    size = part_size(vae, device)
    with torch.autocast(device.type, enabled=False), without_tf32():
        return torch.cat([_encode_part(vae, part, size) for part in images_BIYX.split(size)])


def _encode_part(vae: VQVAE, images_BIYX: Tensor, size: int) -> Tensor:
    count = len(images_BIYX)
    padded = F.pad(images_BIYX, (0, 0, 0, 0, 0, 0, 0, size - count))
    return vae.encode(padded)[:count]


@contextmanager
def without_tf32() -> Iterator[None]:
    """Turn TF32 off in CUDA's convolutions and matrix products within the block."""
    backends: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed
