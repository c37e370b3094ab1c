"""The residual stream between the layers: sums left open, and layers that run on a prefix.

Axes: B images, L tokens, C width.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch import cat as concatenate

from variant_kernels import adaln_modulate, gated_residual_adaln


class OpenSum(NamedTuple):
    """``x + gate * y`` before it is added: the next norm adds it in its own pass over the tokens.

    x_BLC: residual stream.  y_BLC: output of a branch.  gate_BC: of that branch.
    """

    x_BLC: Tensor
    y_BLC: Tensor
    gate_BC: Tensor


def closed(stream: Tensor | OpenSum) -> Tensor:
    """The residual stream (B, L, C), the open branch added."""
    if isinstance(stream, Tensor):
        return stream
    return stream.x_BLC + stream.gate_BC.unsqueeze(1) * stream.y_BLC


def modulated(
    stream: Tensor | OpenSum, scale_BC: Tensor, shift_BC: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The closed stream and its modulated norm, both (B, L, C); see ``adaln_modulate``."""
    if isinstance(stream, Tensor):
        return stream, adaln_modulate(stream, scale_BC, shift_BC, eps=eps)
    return gated_residual_adaln(*stream, scale_BC, shift_BC, eps=eps)


class PrefixStream:
    """The residual stream of all tokens, of which the next layer runs on a prefix.

    The tokens behind the prefix wait in pieces until a layer needs them again: a row of layers with
    one prefix copies no other token.
    """

    def __init__(self, x_BLC: Tensor) -> None:
        self.head: Tensor | OpenSum = x_BLC
        self._length = x_BLC.shape[1]
        self._rest: list[Tensor] = []  # the next tokens last

    def prefix(self, length: int) -> Tensor | OpenSum:
        """The first ``length`` tokens; the layer's result is then assigned to ``head``."""
        if length < self._length:
            self._shorten(length)
        elif length > self._length:
            self._lengthen(length)
        self._length = length
        return self.head

    def _shorten(self, length: int) -> None:
        sizes = (length, self._length - length)
        # split and not two slices: the gradient of a slice is a whole tensor of zeros. The copy is
        # contiguous, so that all layers of one prefix have inputs with equal strides.
        if isinstance(self.head, Tensor):
            head_BLC, rest_BLC = self.head.split(sizes, dim=1)
            self.head = head_BLC.contiguous()
        else:
            x_BLC, rest_x_BLC = self.head.x_BLC.split(sizes, dim=1)
            y_BLC, rest_y_BLC = self.head.y_BLC.split(sizes, dim=1)
            gate_BC = self.head.gate_BC
            self.head = OpenSum(x_BLC.contiguous(), y_BLC.contiguous(), gate_BC)
            rest_BLC = closed(OpenSum(rest_x_BLC, rest_y_BLC, gate_BC))
        self._rest.append(rest_BLC)

    def _lengthen(self, length: int) -> None:
        parts, missing = [closed(self.head)], length - self._length
        while missing:
            piece_BLC = self._rest.pop()
            if piece_BLC.shape[1] > missing:
                piece_BLC, later_BLC = piece_BLC.split(
                    (missing, piece_BLC.shape[1] - missing), dim=1
                )
                self._rest.append(later_BLC)
            parts.append(piece_BLC)
            missing -= piece_BLC.shape[1]
        self.head = concatenate(parts, dim=1)
