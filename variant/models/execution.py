"""How the transformer's blocks run in training: what is recomputed, what is compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Checkpointing = Literal["none", "attention", "full"]


@dataclass(frozen=True)
class Execution:
    """How blocks run.

    checkpointing: what the backward pass computes again instead of keeping it: nothing, the inside
        of the self-attention, or each block from its input.
    compiled: ``torch.compile`` of ``Block.compute``; None runs it eagerly.
    """

    checkpointing: Checkpointing = "none"
    compiled: Callable[..., Any] | None = None

    @property
    def leaves_sums_open(self) -> bool:
        """Whether a block leaves its last sum to the norm of the next one.

        A checkpoint would have to keep both addends, and a compiled block adds them in a kernel of
        its own.
        """
        return self.compiled is None and self.checkpointing != "full"


PLAIN = Execution()


def recompute(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)``; the backward pass calls it again instead of keeping what it needs.

    Ours draws no random numbers, but a dropout in the place of a part or in a hook does: with
    others in the backward pass the gradients would be of another network.
    """
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=True)


@contextmanager
def computed_again(result: Tensor, compute: Callable[[], Tensor]) -> Iterator[None]:
    """Within the block, autograd keeps ``compute`` in place of ``result``.

    For cheap functions of a tensor that is kept in any case. Unlike :func:`recompute` it runs
    nothing twice but ``compute``: not the casts of weights under autocast, for instance. What has
    the memory of ``result`` but another order (as transposed) or other values (written in place,
    as by a dropout) is kept.
    """
    state = _state(result)

    def pack(tensor: Tensor) -> Tensor | torch.Size:
        same = tensor.is_contiguous() and _state(tensor) == state
        return tensor.shape if same else tensor

    def unpack(packed: Tensor | torch.Size) -> Tensor:
        return packed if isinstance(packed, Tensor) else compute().view(packed)

    if not result.is_contiguous():
        yield
        return
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _state(x: Tensor) -> tuple[int, int, torch.dtype, int]:
    return x.data_ptr(), x.numel(), x.dtype, x._version
