"""The DINOv2 vision transformers, whose features define FD-DINOv2, in torch.

Oquab et al. 2023, "DINOv2: Learning robust visual features without supervision". Stein et al. 2023,
"Exposing flaws of generative model evaluation metrics", take the class token of ViT-L/14 in place
of the Inception network's features, of images that Pillow resizes to 224 x 224. The names of the
weights are those of the published files; the size of the network follows from them. Networks with
register tokens are other networks and are refused.

Axes: B images, 3 colours, Y X pixels, L tokens, D features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from variant.evaluation.inception import checked_images

SIDE, PATCH = 224, 14
PLACES = SIDE // PATCH
# Sides of the grid of learned positions: 518 pixels.
LEARNED_PLACES = 37
# Added by the published code to the number of places before it divides by that of learned ones.
PLACE_OFFSET = 0.1
HEAD_DIM = 64
# Means and deviations of the colours of ImageNet, of images in [0, 1].
MEANS, DEVIATIONS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Size:
    """Layers and width of a published network. ``gated``: its MLP is a SwiGLU."""

    name: str
    depth: int
    width: int
    gated: bool = False


SIZES = (
    Size("ViT-S/14", 12, 384),
    Size("ViT-B/14", 12, 768),
    Size("ViT-L/14", 24, 1024),
    Size("ViT-g/14", 40, 1536, gated=True),
)
# That of FD-DINOv2.
STANDARD = "ViT-L/14"


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BLD: Tensor) -> Tensor:
        heads = self.qkv(x_BLD).unflatten(-1, (3, -1, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_BLD)))


class SwiGLU(nn.Module):
    """Two thirds of an MLP's hidden width, rounded up to a multiple of 8."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = -(-(4 * width * 2 // 3) // 8) * 8
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x_BLD: Tensor) -> Tensor:
        gate, value = self.w12(x_BLD).chunk(2, -1)
        return self.w3(F.silu(gate) * value)


class LayerScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x_BLD: Tensor) -> Tensor:
        return x_BLD * self.gamma


class Block(nn.Module):
    def __init__(self, width: int, gated: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width)
        self.ls1 = LayerScale(width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = SwiGLU(width) if gated else MLP(width)
        self.ls2 = LayerScale(width)

    def forward(self, x_BLD: Tensor) -> Tensor:
        x_BLD = x_BLD + self.ls1(self.attn(self.norm1(x_BLD)))
        return x_BLD + self.ls2(self.mlp(self.norm2(x_BLD)))


class PatchEmbedding(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, PATCH, PATCH)

    def forward(self, x_B3YX: Tensor) -> Tensor:
        return self.proj(x_B3YX).flatten(2).transpose(1, 2)


class DINOv2(nn.Module):
    """The network, in evaluation mode; the weights are random until they are loaded."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        self.patch_embed = PatchEmbedding(size.width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, size.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + LEARNED_PLACES**2, size.width))
        # Of the published files; images without masks do not use it.
        self.mask_token = nn.Parameter(torch.zeros(1, size.width))
        self.blocks = nn.ModuleList(Block(size.width, size.gated) for _ in range(size.depth))
        self.norm = nn.LayerNorm(size.width, eps=1e-6)
        self.eval().requires_grad_(False)

    def forward(self, images_B3YX: Tensor) -> Tensor:
        """Features (B, D), float32, of uint8 images of any size.

        Raises:
            TypeError, ValueError: they are not uint8 of three colours.
        """
        images_B3YX = checked_images("DINOv2", images_B3YX)
        x = self.patch_embed(normalised(resize_as_pillow(images_B3YX)))
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.positions()
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]

    def positions(self) -> Tensor:
        """Learned positions (1, 1 + 16 x 16, D), of the class token and the places of an image."""
        grid = self.pos_embed[:, 1:].unflatten(1, (LEARNED_PLACES, LEARNED_PLACES))
        # The given factor and not the ratio of the sizes decides which places are read.
        factor = (PLACES + PLACE_OFFSET) / LEARNED_PLACES
        grid = F.interpolate(
            grid.permute(0, 3, 1, 2), scale_factor=(factor, factor), mode="bicubic"
        )
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], 1)


def size_of(state: Mapping[str, object]) -> Size:
    """The published size that a state dict belongs to.

    Raises:
        ValueError: it is of none of them.
    """
    positions = state.get("pos_embed")
    width = positions.shape[-1] if isinstance(positions, Tensor) and positions.dim() else None
    names = [name for name in state if isinstance(name, str) and name.startswith("blocks.")]
    depth = len({name.split(".")[1] for name in names})
    if "register_tokens" in state:
        raise ValueError("it has register tokens; FD-DINOv2 is that of the networks without")
    for size in SIZES:
        if (size.depth, size.width) == (depth, width):
            return size
    names = ", ".join(size.name for size in SIZES)
    raise ValueError(f"it is none of DINOv2's networks {names}: {depth} blocks of width {width}")


def resize_as_pillow(images_B3YX: Tensor) -> Tensor:
    """Images of 224 x 224, uint8, by Pillow's bicubic filter, which averages where it shrinks."""
    if images_B3YX.shape[2:] == (SIDE, SIDE):
        return images_B3YX
    pictures = images_B3YX.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    resized = [
        np.asarray(Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
        for pixels in pictures
    ]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).to(images_B3YX.device)


def normalised(images_B3YX: Tensor) -> Tensor:
    """uint8 images as float32 of mean 0 and deviation 1 by colour, on ImageNet."""
    means, deviations = (
        torch.tensor(values, device=images_B3YX.device)[:, None, None]
        for values in (MEANS, DEVIATIONS)
    )
    return (images_B3YX.float() / 255 - means) / deviations
