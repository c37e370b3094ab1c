"""The linear layers of the transformer's blocks.

Their class is torch's with another product, so that what looks for ``nn.Linear`` finds them.
"""

from __future__ import annotations

from torch import Tensor, nn

from variant_kernels.linear import linear


class Linear(nn.Linear):
    """``nn.Linear`` by :func:`variant_kernels.linear.linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


class LinearWithoutBias(nn.Linear):
    """A linear layer without parameters for a bias, which its caller may give."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, input: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear(input, self.weight, bias)
