"""The positions of a multi-scale image's tokens in one sequence.

A VAR model predicts an image as K token maps of growing size; scale k holds
``h_k * w_k`` tokens, and the maps are concatenated in order (VAR, arXiv 2404.02905).
This module works on integers, without tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from variant_kernels.arguments import integer, sequence, typed

# Positions and lengths are int32 in the kernels; the longest sequences of today have 10^5 tokens.
MAX_TOKENS = 2**31 - 1
MAX_SCALES = 1024


@dataclass(frozen=True)
class ScaleLayout:
    """Tokens per scale, their offsets and their total.

    Hashable and comparable: caches of masks, plans and kernels use layouts as keys.

    Args:
        shapes: ``((h_0, w_0), ..., (h_{K-1}, w_{K-1}))``, each at least 1; lists are taken too.
    Raises:
        TypeError: a shape that is no pair of integers.
        ValueError: no scale, more than 1,024, a side below 1, or 2^31 tokens and more.
    """

    shapes: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        shapes = sequence(self.shapes)
        if shapes is None:
            raise TypeError(
                "ScaleLayout: shapes must be ((height, width), ...), one pair for each scale; "
                f"got {typed(self.shapes)}"
            )
        if not 1 <= len(shapes) <= MAX_SCALES:
            raise ValueError(
                f"ScaleLayout: shapes must have 1 to {MAX_SCALES} scales; got {len(shapes)}"
            )
        object.__setattr__(self, "shapes", tuple(map(_pair, range(len(shapes)), shapes)))
        if self.total > MAX_TOKENS:
            raise ValueError(
                f"ScaleLayout: shapes must have fewer than 2^31 tokens in all; got {self.total}"
            )

    @classmethod
    def from_patch_nums(cls, patch_nums: Sequence[int | tuple[int, int]]) -> ScaleLayout:
        """Layout from the side of each square scale, or from (height, width) pairs.

        ``from_patch_nums((1, 2, 3, 4, 5, 6, 8, 10, 13, 16))`` is the 680-token layout of the
        256x256 VAR models.
        """
        sides = sequence(patch_nums)
        if sides is None:
            raise TypeError(
                "ScaleLayout.from_patch_nums: patch_nums must be a list of sides, or of pairs "
                f"(height, width); got {typed(patch_nums)}"
            )
        return cls(tuple(side if sequence(side) is not None else (side, side) for side in sides))

    @cached_property
    def tokens(self) -> tuple[int, ...]:
        """Number of tokens of each scale."""
        return tuple(height * width for height, width in self.shapes)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Position of each scale's first token in the concatenated sequence."""
        return tuple(accumulate(self.tokens, initial=0))[:-1]

    @cached_property
    def total(self) -> int:
        """Length L of the sequence."""
        return sum(self.tokens)

    @property
    def num_scales(self) -> int:
        """K."""
        return len(self.shapes)

    def slice(self, scale: int) -> slice:
        """The positions of ``scale`` as a slice of the sequence.

        Raises:
            ValueError: scale out of range.
        """
        scale = integer("ScaleLayout.slice", "scale", scale, 0, self.num_scales - 1)
        return slice(self.offsets[scale], self.offsets[scale] + self.tokens[scale])

    def visible(self, scale: int) -> int:
        """Tokens that a query of ``scale`` attends to: its own scale and all earlier ones."""
        return self.slice(scale).stop

    def prefix(self, num_scales: int) -> ScaleLayout:
        """The layout of the first ``num_scales`` scales (1 <= num_scales <= K)."""
        num_scales = integer("ScaleLayout.prefix", "num_scales", num_scales, 1, self.num_scales)
        return ScaleLayout(self.shapes[:num_scales])


def _pair(scale: int, shape: object) -> tuple[int, int]:
    sides = sequence(shape)
    if sides is None or len(sides) != 2:
        raise TypeError(
            f"ScaleLayout: shapes[{scale}] must be (height, width), both integers >= 1; "
            f"got {typed(shape)}"
        )
    height, width = (integer("ScaleLayout", f"shapes[{scale}]", side, 1) for side in sides)
    return height, width
