"""The Inception network of 2015 whose features define FID, in torch.

Szegedy et al. 2015, "Rethinking the Inception architecture for computer vision", as the graph
"inception-2015-12-05" of TensorFlow has it, which differs from torchvision's: averages of pooling
do not count padding, the last block pools by maximum, there are 1008 classes, and images are
resized by TensorFlow 1's bilinear rule. The names of the weights are those of the file that
torch-fidelity publishes.

Axes: B images, 3 colours, Y X pixels, I channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from variant.models.pixels import checked_images

SIDE = 299
FEATURES, CLASSES = 2048, 1008
# Channels of the spatial features of sFID, and their number at 17 x 17 places.
SPATIAL_CHANNELS = 7
SPATIAL_FEATURES = SPATIAL_CHANNELS * 17 * 17

# A convolution of a branch: name, output channels, height and width of the kernel.
Conv = tuple[str, int, int, int]
# What follows one another in a branch; an inner tuple runs on the same input, side by side.
Branch = Sequence[Conv | tuple[Conv, ...]]


class ConvNormReLU(nn.Module):
    """Convolution, batch norm, ReLU. Stride 1 keeps the size unless ``valid``."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: tuple[int, int],
        stride: int = 1,
        valid: bool = False,
    ) -> None:
        super().__init__()
        padding = (0, 0) if valid or stride > 1 else (kernel[0] // 2, kernel[1] // 2)
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Branches of convolutions on one input, concatenated, and a pooled branch at the end.

    Args:
        branches: of the block, without the pooled one.
        pooled: channels of the convolution behind the pooling; None: a block of stride 2, whose
            branches' last convolutions have stride 2 and whose pooling is by maximum, alone.
        maximum: pool by maximum in place of the average.
    """

    def __init__(
        self, inputs: int, branches: Sequence[Branch], pooled: int | None, maximum: bool = False
    ) -> None:
        super().__init__()
        self.branches, self.shrinks, self.maximum = branches, pooled is None, maximum
        self.outputs = inputs if pooled is None else pooled
        for branch in branches:
            channels = inputs
            for place, step in enumerate(branch):
                last = place == len(branch) - 1
                stride = 2 if self.shrinks and last else 1
                side_by_side = _convs(step)
                for name, outputs, height, width in side_by_side:
                    conv = ConvNormReLU(channels, outputs, (height, width), stride)
                    self.add_module(name, conv)
                channels = sum(conv[1] for conv in side_by_side)
            self.outputs += channels
        if pooled is not None:
            self.branch_pool = ConvNormReLU(inputs, pooled, (1, 1))

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for branch in self.branches:
            y = x
            for step in branch:
                y = torch.cat([self.get_submodule(conv[0])(y) for conv in _convs(step)], 1)
            outputs.append(y)
        return torch.cat([*outputs, self._pooled(x)], 1)

    def _pooled(self, x: Tensor) -> Tensor:
        if self.shrinks:
            return F.max_pool2d(x, 3, 2)
        if self.maximum:
            return self.branch_pool(F.max_pool2d(x, 3, 1, 1))
        return self.branch_pool(F.avg_pool2d(x, 3, 1, 1, count_include_pad=False))


def _convs(step: Conv | tuple[Conv, ...]) -> tuple[Conv, ...]:
    return (step,) if isinstance(step[0], str) else step  # type: ignore[return-value]


def _block_35(inputs: int, pooled: int) -> Mixed:
    """At 35 x 35 places."""
    double = [("branch3x3dbl_1", 64, 1, 1), ("branch3x3dbl_2", 96, 3, 3)]
    branches: list[Branch] = [
        [("branch1x1", 64, 1, 1)],
        [("branch5x5_1", 48, 1, 1), ("branch5x5_2", 64, 5, 5)],
        [*double, ("branch3x3dbl_3", 96, 3, 3)],
    ]
    return Mixed(inputs, branches, pooled)


def _block_17(inputs: int, width: int) -> Mixed:
    """At 17 x 17 places; ``width`` channels inside."""
    branches: list[Branch] = [
        [("branch1x1", 192, 1, 1)],
        [
            ("branch7x7_1", width, 1, 1),
            ("branch7x7_2", width, 1, 7),
            ("branch7x7_3", 192, 7, 1),
        ],
        [
            ("branch7x7dbl_1", width, 1, 1),
            ("branch7x7dbl_2", width, 7, 1),
            ("branch7x7dbl_3", width, 1, 7),
            ("branch7x7dbl_4", width, 7, 1),
            ("branch7x7dbl_5", 192, 1, 7),
        ],
    ]
    return Mixed(inputs, branches, 192)


def _block_8(inputs: int, maximum: bool) -> Mixed:
    """At 8 x 8 places."""

    def crossed(name: str, *letters: str) -> tuple[Conv, ...]:
        first, second = letters
        return ((f"{name}{first}", 384, 1, 3), (f"{name}{second}", 384, 3, 1))

    branches: list[Branch] = [
        [("branch1x1", 320, 1, 1)],
        [("branch3x3_1", 384, 1, 1), crossed("branch3x3_2", "a", "b")],
        [
            ("branch3x3dbl_1", 448, 1, 1),
            ("branch3x3dbl_2", 384, 3, 3),
            crossed("branch3x3dbl_3", "a", "b"),
        ],
    ]
    return Mixed(inputs, branches, 192, maximum)


def _shrink_35(inputs: int) -> Mixed:
    double = [("branch3x3dbl_1", 64, 1, 1), ("branch3x3dbl_2", 96, 3, 3)]
    return Mixed(
        inputs, [[("branch3x3", 384, 3, 3)], [*double, ("branch3x3dbl_3", 96, 3, 3)]], None
    )


def _shrink_17(inputs: int) -> Mixed:
    seven = [("branch7x7x3_1", 192, 1, 1), ("branch7x7x3_2", 192, 1, 7)]
    branches: list[Branch] = [
        [("branch3x3_1", 192, 1, 1), ("branch3x3_2", 320, 3, 3)],
        [*seven, ("branch7x7x3_3", 192, 7, 1), ("branch7x7x3_4", 192, 3, 3)],
    ]
    return Mixed(inputs, branches, None)


@dataclass(frozen=True)
class InceptionOutput:
    """features_BD: (B, 2048), "pool_3".

    spatial_BD: (B, 2023), the first 7 channels of "mixed_6/conv" at 17 x 17 places, channels last.
    logits_BC: (B, 1008), without the bias, as the Inception Score has them.
    """

    features_BD: Tensor
    spatial_BD: Tensor
    logits_BC: Tensor


class Inception2015(nn.Module):
    """The network, in evaluation mode; the weights are random until they are loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNormReLU(3, 32, (3, 3), stride=2)
        self.Conv2d_2a_3x3 = ConvNormReLU(32, 32, (3, 3), valid=True)
        self.Conv2d_2b_3x3 = ConvNormReLU(32, 64, (3, 3))
        self.Conv2d_3b_1x1 = ConvNormReLU(64, 80, (1, 1))
        self.Conv2d_4a_3x3 = ConvNormReLU(80, 192, (3, 3), valid=True)
        self.Mixed_5b = _block_35(192, 32)
        self.Mixed_5c = _block_35(self.Mixed_5b.outputs, 64)
        self.Mixed_5d = _block_35(self.Mixed_5c.outputs, 64)
        self.Mixed_6a = _shrink_35(self.Mixed_5d.outputs)
        self.Mixed_6b = _block_17(self.Mixed_6a.outputs, 128)
        self.Mixed_6c = _block_17(self.Mixed_6b.outputs, 160)
        self.Mixed_6d = _block_17(self.Mixed_6c.outputs, 160)
        self.Mixed_6e = _block_17(self.Mixed_6d.outputs, 192)
        self.Mixed_7a = _shrink_17(self.Mixed_6e.outputs)
        self.Mixed_7b = _block_8(self.Mixed_7a.outputs, maximum=False)
        self.Mixed_7c = _block_8(self.Mixed_7b.outputs, maximum=True)
        self.fc = nn.Linear(FEATURES, CLASSES)
        self.eval().requires_grad_(False)

    def forward(self, images_B3YX: Tensor) -> InceptionOutput:
        """Features of uint8 images of any size.

        Raises:
            TypeError, ValueError: they are not uint8 of three colours.
        """
        x = resize_as_tensorflow(checked_images("Inception2015", images_B3YX).float(), SIDE)
        x = (x - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))
        # The first branch of a block is "conv" in TensorFlow: its channels come first.
        spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))
        features = x.mean((2, 3))
        return InceptionOutput(features, spatial, features @ self.fc.weight.T)


def resize_as_tensorflow(images_BIYX: Tensor, side: int) -> Tensor:
    """Bilinear resize of TensorFlow 1: output pixel i lies at i times the ratio of the sizes.

    No half pixel is added, and nothing is averaged where the output is smaller, so that libraries'
    own functions give other values (Parmar et al. 2022, "On aliased resizing").
    """
    rows, row_weights = _neighbours(images_BIYX.shape[2], side, images_BIYX)
    columns, column_weights = _neighbours(images_BIYX.shape[3], side, images_BIYX)
    # Across before down, in the order of the graph: the bits are the same then.
    left, right = (images_BIYX.index_select(3, index) for index in columns)
    x = left + (right - left) * column_weights
    top, bottom = (x.index_select(2, index) for index in rows)
    return top + (bottom - top) * row_weights[:, None]


def _neighbours(size: int, side: int, like: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Indices below and above each output pixel, and the weight of the one above."""
    ratio = torch.tensor(size / side, dtype=torch.float32, device=like.device)
    place = torch.arange(side, dtype=torch.float32, device=like.device) * ratio
    below = place.long().clamp_max(size - 1)
    weight = (place - below).to(like.dtype)
    return (below, (below + 1).clamp_max(size - 1)), weight
