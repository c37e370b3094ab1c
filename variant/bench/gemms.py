"""The matrix products of a generation and nothing else: what remains is what the engine adds."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from variant.bench.work import Linear, linears
from variant.transformer import VAR
from variant_kernels import DepthSchedule

Product = Callable[[Tensor], Tensor]


class GemmsAlone:
    """Every linear layer of a generation with its own weights, in the engine's order and dtype.

    The weights are really those of the model: at batch 1 what costs is reading them. Inputs are
    made once and shared by layers of one shape.
    """

    def __init__(self, var: VAR, dtype: torch.dtype, batch: int) -> None:
        self.var, self.dtype, self.batch = var, dtype, batch
        self._products: dict[tuple[int, str], Product] = {}
        self._inputs: dict[tuple[int, int, bool], Tensor] = {}

    @torch.inference_mode()
    def run(self, schedule: DepthSchedule) -> None:
        """All products once."""
        for linear in linears(self.var.config, schedule, self.batch):
            self._product(linear)(self._input(linear))

    def _input(self, linear: Linear) -> Tensor:
        key = linear.rows, linear.inputs, linear.wide
        if key not in self._inputs:
            made = torch.randn(linear.rows, linear.inputs, device=self.var.head.weight.device)
            self._inputs[key] = made.to(self._dtype(linear))
        return self._inputs[key]

    def _dtype(self, linear: Linear) -> torch.dtype:
        return torch.float32 if linear.wide else self.dtype

    def _product(self, linear: Linear) -> Product:
        key = linear.layer, linear.name
        if key not in self._products:
            self._products[key] = _prepare(*self._weights(linear), self._dtype(linear))
        return self._products[key]

    def _weights(self, linear: Linear) -> tuple[Tensor, Tensor]:
        var, name = self.var, linear.name
        if name in ("head", "word_embed"):
            return _affine(getattr(var, name))
        if name == "head_nm":
            return _affine(var.head_nm.ada_lin[1])
        if name == "shared_ada_lin":
            return _affine(var.shared_ada_lin[1])  # type: ignore[index]
        block = var.layers()[linear.layer]
        if name == "ada_lin":
            return _affine(block.ada_lin[1])
        if name == "mat_qkv":
            return block.attn.mat_qkv.weight, block.attn.qkv_bias()
        return _affine(block.attn.proj if name == "proj" else getattr(block.ffn, name))


def _affine(linear: nn.Module) -> tuple[Tensor, Tensor]:
    assert isinstance(linear, nn.Linear)
    return linear.weight, linear.bias


def _prepare(weight_OI: Tensor, bias_O: Tensor, dtype: torch.dtype) -> Product:
    """A product by the library call that the engine uses."""
    weight_OI, bias_O = weight_OI.detach().to(dtype), bias_O.detach().to(dtype)
    return lambda x: F.linear(x, weight_OI, bias_O)
