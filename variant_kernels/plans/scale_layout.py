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
from operator import index


@dataclass(frozen=True)
class ScaleLayout:
    """Tokens per scale, their offsets and their total.

    Hashable and comparable: caches of masks, plans and kernels use layouts as keys.

    Args:
        shapes: ``((h_0, w_0), ..., (h_{K-1}, w_{K-1}))``, each at least 1.
    Raises:
        ValueError: no scale, or a side below 1.
    """

    shapes: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        if not self.shapes:
            raise ValueError("ScaleLayout: shapes must name at least one scale; got none")
        for scale, shape in enumerate(self.shapes):
            if len(shape) != 2 or not all(isinstance(side, int) and side >= 1 for side in shape):
                raise ValueError(
                    f"ScaleLayout: shapes[{scale}] must be (height, width), both integers >= 1; "
                    f"got {shape!r}"
                )

    @classmethod
    def from_patch_nums(cls, patch_nums: Sequence[int | tuple[int, int]]) -> ScaleLayout:
        """Layout from the side of each square scale, or from (height, width) pairs.

        ``from_patch_nums((1, 2, 3, 4, 5, 6, 8, 10, 13, 16))`` is the 680-token layout of the
        256x256 VAR models.
        """
        shapes = []
        for sides in patch_nums:
            pair = tuple(sides) if isinstance(sides, Sequence) else (sides, sides)
            try:
                shapes.append(tuple(index(side) for side in pair))
            except TypeError:
                raise ValueError(
                    f"ScaleLayout.from_patch_nums: a side must be an integer or a pair of them; "
                    f"got {sides!r}"
                ) from None
        return cls(tuple(shapes))

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
        if not 0 <= scale < self.num_scales:
            raise ValueError(
                f"ScaleLayout.slice: scale must be in [0, {self.num_scales}); got {scale}"
            )
        return slice(self.offsets[scale], self.offsets[scale] + self.tokens[scale])

    def visible(self, scale: int) -> int:
        """Tokens that a query of ``scale`` attends to: its own scale and all earlier ones."""
        return self.slice(scale).stop

    def prefix(self, num_scales: int) -> ScaleLayout:
        """The layout of the first ``num_scales`` scales (1 <= num_scales <= K)."""
        if not 1 <= num_scales <= self.num_scales:
            raise ValueError(
                f"ScaleLayout.prefix: num_scales must be in [1, {self.num_scales}]; "
                f"got {num_scales}"
            )
        return ScaleLayout(self.shapes[:num_scales])
