"""Settings of memory and compilation, and the execution of the blocks that follows from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import ConfigDict
from torch import nn

from variant.errors import UserError
from variant.models.config import STRICT, require_plain_numbers
from variant.models.execution import Checkpointing, Execution
from variant.models.var import VAR, Block

# One graph for each prefix of the scales that a layer of some configuration runs on, and twice as
# many where the parts of a batch have two sizes.
MAX_GRAPHS = 64
BACKEND: str | Callable[..., Any] = "inductor"  # of torch.compile
FP8_CAPABILITY = (8, 9)  # of the first GPUs with 8-bit products: Ada and Hopper


@dataclass(frozen=True)
class MemorySection:
    """What the backward pass keeps; `variant plan --train` shows the memory of each choice.

    checkpointing: what is computed again in the backward pass instead of being kept: "none";
        "attention", the inside of the self-attention; or "full", each block from its input.
    """

    checkpointing: Checkpointing = "none"

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    def __post_init__(self) -> None:
        require_plain_numbers(self)


@dataclass(frozen=True)
class CompileSection:
    """What is compiled.

    blocks: compile the transformer's blocks by torch.compile, in one graph for all layers that run
        on the same number of tokens.
    fp8: matrix products of the blocks in 8 bits, by torchao; needs a GPU of compute capability 8.9.
    """

    blocks: bool = False
    fp8: bool = False

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    def __post_init__(self) -> None:
        require_plain_numbers(self)


def execution_of(memory: MemorySection, compilation: CompileSection) -> Execution:
    """How the blocks run in training."""
    compiled = compiled_block(BACKEND) if compilation.blocks else None
    return Execution(memory.checkpointing, compiled)


def compiled_block(backend: str | Callable[..., Any]) -> Callable[..., Any]:
    """``Block.compute`` compiled for all blocks of a model.

    Parameters are inputs of a graph, so all layers that run on the same number of tokens share one.
    A graph break is an error: the part behind it would run eagerly, unnoticed.
    """
    run = torch.compile(Block.compute, backend=backend, fullgraph=True, dynamic=False)

    def compute(*args: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=MAX_GRAPHS):
            return run(*args)

    return compute


def convert_to_fp8(var: VAR, name: str, device: torch.device) -> None:
    """Replace the linear layers of the blocks by torchao's, which multiply in 8 bits.

    Weights stay what they are, and so do the names of the state dict.

    Args:
        name: of the recipe, for errors.
    Raises:
        UserError: torchao is missing, or the device has no 8-bit products.
    """
    try:
        from torchao.float8 import convert_to_float8_training  # pyright: ignore
    except ImportError as error:
        raise UserError(
            f"{name}: compile.fp8 needs torchao ({error}); pip install torchao, or set fp8 = false"
        ) from None
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        raise UserError(
            f"{name}: compile.fp8 needs a GPU of compute capability 8.9 or higher; the device is "
            f"{device}. Set fp8 = false"
        )
    convert_to_float8_training(var, module_filter_fn=is_in_a_block)


def is_in_a_block(module: nn.Module, name: str) -> bool:
    """Whether a module of the transformer is one of the four linear layers of a block.

    Of the products by token these are all but the head's, whose loss is computed in chunks. The
    products by image, of the modulation, are few.
    """
    ends = (".attn.mat_qkv", ".attn.proj", ".ffn.fc1", ".ffn.fc2")
    return name.startswith("blocks.") and name.endswith(ends)
