"""Tensors in the form that kernels take: addresses, strides, a contiguous last dimension; and what
tells whether a tensor is still the one that it was.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch.autograd.graph import increment_version
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from variant_kernels.untraced import untraced


def address_and_strides(x: torch.Tensor) -> tuple[int, ...]:
    """(address, strides in elements) without the stride of the last dimension, which is 1.

    Raises:
        ValueError: it is not 1. A kernel would read other elements without a word: the checks of an
            op see its arguments, not the copies that are made of them.
    """
    *strides, last = x.stride()
    if last != 1 and x.shape[-1] > 1 and x.numel():  # contiguous() copies no empty tensor
        raise ValueError(
            f"address_and_strides: x must have a contiguous last dimension; got shape "
            f"{tuple(x.shape)} and strides {x.stride()}. Call .contiguous()"
        )
    return (x.data_ptr(), *strides)


def last_contiguous(x: torch.Tensor) -> torch.Tensor:
    """x, copied only if its last dimension is not contiguous (a gradient may be expanded)."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def empty_as(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A new contiguous tensor of x's shape: 1.1 us where torch.empty(x.shape, ...) takes 2.3."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


_MAX_STEPS: Any = 10**6


def overlaps_itself(x: torch.Tensor) -> bool:
    """Whether two elements may share an address, as in an expanded tensor.

    True also for the rare strides that interleave without a common address.
    """
    reach = 0
    for step, count in sorted((abs(s), n) for n, s in zip(x.shape, x.stride(), strict=True)):
        if count > 1 and step <= reach:
            return True
        reach += step * (count - 1)
    return False


def share_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether an element of a and an element of b share an address; False for interleaved views."""
    try:
        # numpy takes any number of steps; its stub knows two of them.
        return np.shares_memory(_Addresses.of(a), _Addresses.of(b), max_work=_MAX_STEPS)
    except np.exceptions.TooHardError:
        return True


class _Addresses:
    """The addresses of a tensor on any device, as numpy takes them; no memory is read."""

    def __init__(self, x: torch.Tensor) -> None:
        size = x.element_size()
        self.__array_interface__ = {
            "version": 3,
            "data": (x.data_ptr(), True),
            "shape": tuple(x.shape),
            "strides": tuple(size * step for step in x.stride()),
            "typestr": f"|V{size}",
        }

    @classmethod
    def of(cls, x: torch.Tensor) -> np.ndarray:
        return np.asarray(cls(x))


# --- changes ------------------------------------------------------------------------------------

# Of so many words of 64 bits, sums are checked in place of the words.
_LARGE = 2**16
# Words per sum. A prime: rows of no usual weight begin with one.
_CHUNK = 509
_ODD = 0x2545F4914F6CDD1D


class Memory:
    """The memory of some tensors, which this object does not keep alive.

    Memory that was freed is soon given to another tensor, at the same address: an address tells a
    tensor only while the old memory is there.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self._references = [StorageWeakRef(x.untyped_storage()) for x in tensors]
        self._ids = [reference.cdata for reference in self._references]

    @property
    def was_freed(self) -> bool:
        """Whether any of it was freed since."""
        return any(map(torch.UntypedStorage._expired, self._ids))


@untraced
def _record_step(optimizer: Optimizer, *_: Any) -> None:
    """Give every parameter of an optimiser that made a step a new version.

    torch's fused optimisers (``AdamW(fused=True)``) and those of other libraries, which write
    through addresses, leave the versions as they are. All others have given new ones already.
    """
    for group in optimizer.param_groups:
        increment_version(group["params"])


register_optimizer_step_post_hook(_record_step)


def version_of(x: torch.Tensor) -> int:
    """A number that differs after any change in place that torch records.

    Tensors that were made under ``torch.inference_mode()`` have no version. Theirs is a checksum of
    the values, for which all of them are read; a GPU is waited for.
    """
    return _checksum(x) if x.is_inference() else x._version


def _checksum(x: torch.Tensor) -> int:
    """Of the bits of all values in their order; 0 for a tensor without values."""
    if x.is_meta or x.numel() == 0:
        return 0
    bytes_N = x.detach().contiguous().flatten().view(torch.uint8)
    if bytes_N.data_ptr() % 8:
        bytes_N = bytes_N.clone()
    whole = len(bytes_N) // 8 * 8
    words_N = bytes_N[:whole].view(torch.int64)
    parts = [words_N]
    if len(words_N) >= _LARGE:
        # Few temporary values; the sums across the chunks tell the order within them.
        summed = len(words_N) // _CHUNK * _CHUNK
        chunks = words_N[:summed].view(-1, _CHUNK)
        parts = [chunks.sum(1), chunks.sum(0), words_N[summed:]]
    values_N = torch.cat((*parts, bytes_N[whole:].long()))
    # Low bits of round numbers are zero: bring the high ones down.
    values_N = (values_N ^ (values_N >> 32)) * _ODD
    values_N = values_N ^ (values_N >> 32)
    # Odd factors modulo 2^64: every change of one value changes the sum.
    factors_N = torch.arange(1, 2 * len(values_N), 2, device=x.device)
    return int((values_N * factors_N).sum())
