"""A module that several processes train together: DistributedDataParallel or FSDP2."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import ConfigDict
from torch import Tensor, nn

from variant.models.config import STRICT, require_plain_numbers
from variant.training.distributed import Ranks

# Bytes a parameter of weights, gradient and AdamW's two moments in float32.
TRAINED_BYTES = 16
# "auto" keeps all of that on every GPU (ddp) while it takes at most this share of the memory; the
# rest is for activations.
AUTO_SHARE = 0.25


@dataclass(frozen=True)
class ParallelSection:
    """How the processes that torchrun starts share one training; without effect on a single one.

    mode: "ddp": every process has all weights (DistributedDataParallel). "fsdp2": each has a part
        of the weights, gradients and moments (fully_shard of each block). "auto": ddp where these
        take at most a quarter of the GPU's memory.
    """

    mode: Literal["auto", "ddp", "fsdp2"] = "auto"

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    def __post_init__(self) -> None:
        require_plain_numbers(self)


def chosen_mode(section: ParallelSection, parameters: int, device: torch.device) -> str:
    """The mode: "ddp" or "fsdp2".  Args: parameters: number of trained ones."""
    if section.mode != "auto":
        return section.mode
    if device.type != "cuda":
        return "ddp"
    memory = torch.cuda.get_device_properties(device).total_memory
    return "ddp" if TRAINED_BYTES * parameters <= AUTO_SHARE * memory else "fsdp2"


class Parallel:
    """A module, prepared for the processes of a run.

    network: what a training step calls in place of the module; its backward pass averages the
        gradients over the processes.
    mode: "single", "ddp" or "fsdp2", which shards the module's parameters in place.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module, self.mode = module, "single"
        self.network: Callable[..., Any] = module

    @contextmanager
    def part(self, *, is_last: bool) -> Iterator[None]:
        """Around the forward and the backward pass of one part of a batch.

        Gradients are exchanged in the last part only; until then each process adds up its own.
        """
        yield


class _DDP(Parallel):
    def __init__(
        self, module: nn.Module, device: torch.device, *, uses_every_parameter: bool
    ) -> None:
        super().__init__(module)
        self.mode = "ddp"
        wrapper = nn.parallel.DistributedDataParallel
        # No buffer changes in training. torch 2.13 has another name for this.
        names = inspect.signature(wrapper.__init__).parameters
        sync = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
        options: dict[str, Any] = {sync: False}
        self.network = self._wrapped = wrapper(
            module,
            device_ids=[device] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,  # else the gradients are in memory twice
            find_unused_parameters=not uses_every_parameter,
            **options,
        )

    @contextmanager
    def part(self, *, is_last: bool) -> Iterator[None]:
        with nullcontext() if is_last else self._wrapped.no_sync():
            yield


class _FSDP2(Parallel):
    def __init__(
        self,
        module: nn.Module,
        blocks: Iterable[nn.Module],
        device: torch.device,
        size: int,
        dtype: torch.dtype,
    ) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        super().__init__(module)
        self.mode = "fsdp2"
        # torch warns in every block, as linear layers return views: a hook would be lost if one of
        # them were changed in place. Nothing changes the output of a block.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        mesh = init_device_mesh(device.type, (size,))
        policy = MixedPrecisionPolicy()
        if dtype != torch.float32:
            # Blocks are gathered in 16 bits, as autocast would cast them. Their inputs stay as they
            # are: the residual stream is float32. So does what is outside of the blocks.
            policy = MixedPrecisionPolicy(
                param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
            )
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        self._root: Any = fully_shard(module, mesh=mesh)

    @contextmanager
    def part(self, *, is_last: bool) -> Iterator[None]:
        self._root.set_requires_gradient_sync(is_last)
        yield


def parallelize(
    module: nn.Module,
    ranks: Ranks,
    mode: str,
    device: torch.device,
    *,
    blocks: Iterable[nn.Module],
    dtype: torch.dtype,
    uses_every_parameter: bool,
) -> Parallel:
    """Prepare a module, which has the same weights in every process.

    Args:
        mode: "ddp" or "fsdp2"; with one process neither.
        blocks: modules of the repeated layers, each of which FSDP2 gathers at once.
        dtype: of the matrix products.
        uses_every_parameter: whether every training step has a gradient for every parameter.
    """
    if ranks.size == 1:
        return Parallel(module)
    if mode == "fsdp2":
        return _FSDP2(module, blocks, device, ranks.size, dtype)
    return _DDP(module, device, uses_every_parameter=uses_every_parameter)


def whole(value: Any, *, keep: bool = True) -> Any:
    """The same nest of dictionaries, lists and tuples with whole tensors in place of sharded ones.

    Every rank must call this. Whole tensors are on the CPU; other ones stay where they are.

    Args:
        keep: False gives None for sharded tensors, on a rank that only helps the others.
    """
    if isinstance(value, Tensor) and is_sharded(value):
        full = value.detach().full_tensor()  # type: ignore[attr-defined]
        return full.cpu() if keep else None
    if isinstance(value, dict):
        return {key: whole(item, keep=keep) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(whole(item, keep=keep) for item in value)
    return value


def sharded_like(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, sharded as a parameter of its shape is; unchanged if that is not sharded."""
    if not is_sharded(parameter):
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    # Every rank has the whole tensor, so none needs to send its own.
    value = value.to(parameter.device)
    return distribute_tensor(value, mesh, placements, src_data_rank=None)


def local_part(tensor: Tensor) -> Tensor:
    """What this process has of a tensor: all of it, if it is not sharded."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def unsharded(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor on its device, which is not waited for; others as they are.

    Every rank must call this.
    """
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[operator]


def is_sharded(tensor: Tensor) -> bool:
    # Not by the class DTensor, whose import takes a second.
    return hasattr(tensor, "full_tensor")
