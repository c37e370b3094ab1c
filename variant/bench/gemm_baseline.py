"""The matrix products of a generation alone; the rest of the time is what the engine adds."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from variant.engine import packed_layers
from variant.engine.weights import MLP_TOKENS, casts_modulations, on_gpu
from variant.models.flops import Linear, linears
from variant.models.var import VAR, projection
from variant_kernels import DepthSchedule
from variant_kernels.packed_linear import can_pack
from variant_kernels.products import product_dtype

Product = Callable[[Tensor], Tensor]


class GemmsAlone:
    """Every linear layer of a generation with its own weights, by the engine's library calls.

    Each product reads its own weights, packed as in the engine: reading them dominates at batch 1.
    Inputs are created once and shared by layers of the same shape.
    """

    def __init__(self, var: VAR, dtype: torch.dtype, batch: int) -> None:
        device = var.head.weight.device
        self.var, self.dtype, self.batch = var, product_dtype(device, dtype), batch
        self.packed = can_pack(device, self.dtype)
        self._products: dict[tuple[int, str], Product] = {}
        self._inputs: dict[tuple[int, int, torch.dtype], Tensor] = {}
        self._graphs: dict[tuple[tuple[int, ...], ...], torch.cuda.CUDAGraph] = {}

    @torch.inference_mode()
    def run(self, schedule: DepthSchedule) -> None:
        """All products once; on a GPU as one graph, because the engine replays a graph too."""
        if not on_gpu(self.var.head.weight):
            self._launch(schedule)
            return
        if schedule.layers not in self._graphs:
            self._launch(schedule)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._launch(schedule)
            self._graphs[schedule.layers] = graph
        self._graphs[schedule.layers].replay()

    def _launch(self, schedule: DepthSchedule) -> None:
        for linear in linears(self.var.config, schedule, self.batch):
            product, x = self._product(linear), self._input(linear)
            # On a CPU the engine splits the MLP into parts that stay in the cache.
            in_parts = linear.name in ("fc1", "fc2") and x.device.type == "cpu"
            parts = x.split(MLP_TOKENS) if in_parts else (x,)
            for part in parts:
                product(part)

    def _input(self, linear: Linear) -> Tensor:
        key = linear.rows, linear.inputs, self._how(linear)[0]
        if key not in self._inputs:
            x = torch.randn(linear.rows, linear.inputs, device=self.var.head.weight.device)
            self._inputs[key] = x.to(key[2])
        return self._inputs[key]

    def _how(self, linear: Linear) -> tuple[torch.dtype, bool]:
        """The dtype in which the engine computes a product, and whether its weights are packed."""
        own = self.var.head.weight.dtype
        if linear.name == "word_embed":
            return torch.float32, False
        if linear.name in ("ada_lin", "head_nm", "shared_ada_lin"):
            cast = casts_modulations(self.var, self.dtype, self.packed)
            return (self.dtype, self.packed) if cast else (own, False)
        return self.dtype, self.packed

    def _product(self, linear: Linear) -> Product:
        key = linear.layer, linear.name
        if key not in self._products:
            dtype, packed = self._how(linear)
            self._products[key] = packed_layers.Linear(*self._weights(linear), dtype, packed=packed)
        return self._products[key]

    def _weights(self, linear: Linear) -> tuple[Tensor, Tensor]:
        var, name = self.var, linear.name
        if name in ("head", "word_embed"):
            return _affine(getattr(var, name))
        if name == "head_nm":
            return _affine(projection(var.head_nm.ada_lin))
        if name == "shared_ada_lin":
            return _affine(projection(cast("nn.Sequential", var.shared_ada_lin)))
        block = var.layers()[linear.layer]
        if name == "ada_lin":
            return _affine(projection(block.ada_lin))
        if name == "mat_qkv":
            return block.attn.mat_qkv.weight, block.attn.qkv_bias()
        return _affine(block.attn.proj if name == "proj" else getattr(block.ffn, name))


def _affine(linear: nn.Module) -> tuple[Tensor, Tensor]:
    assert isinstance(linear, nn.Linear)
    return linear.weight, linear.bias
