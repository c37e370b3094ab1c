"""Operations on tensors of a GPU that is not there (``benchmarks.offline_triton.gpu``).

Such tensors have shapes, strides and a device, and no values. A torch without CUDA looks for the
device's library in some operations; these are done without it here.
"""

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


def indexed(tensor, index):
    """The view that the integers, slices and None of an index select, and the tensors left over."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if not any(part is Ellipsis for part in parts):
        parts.append(Ellipsis)
    used = sum(part is not None and part is not Ellipsis for part in parts)
    gap = parts.index(Ellipsis)
    parts[gap : gap + 1] = [slice(None)] * (tensor.dim() - used)
    axis, tensors = 0, []
    for part in parts:
        if isinstance(part, int):
            tensor = torch.ops.aten.select(tensor, axis, part)
            continue
        if part is None:
            tensor = tensor.unsqueeze(axis)
        elif isinstance(part, slice):
            tensor = torch.ops.aten.slice(tensor, axis, part.start, part.stop, part.step or 1)
        tensors.append(part if isinstance(part, torch.Tensor) else None)
        axis += 1
    return tensor, tensors if any(part is not None for part in tensors) else None


class Indexing(TorchFunctionMode):
    """Indexes tensors of an absent GPU: torch's own code asks for the device's library first."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        with torch._C._AutoDispatchBelowAutograd():
            return self._call(func, args, kwargs or {})

    def _call(self, func, args, kwargs):
        if func is torch.Tensor.__getitem__:
            tensor, tensors = indexed(*args)
            return tensor if tensors is None else torch.ops.aten.index(tensor, tensors)
        if func is torch.Tensor.__setitem__:
            tensor, tensors = indexed(*args[:2])
            if tensors is not None:
                return torch.ops.aten.index_put_(tensor, tensors, args[2])
            args = (tensor, args[2])
            if not isinstance(args[1], torch.Tensor):
                return tensor.fill_(args[1])
        if func in (torch.Tensor.__setitem__, torch.Tensor.copy_):
            # The op that writes asks for the device's library, too; this one has no effect.
            torch.ops.aten.copy(*args[:2])
            return args[0]
        if func in (torch.Tensor.to, torch.Tensor.cpu):
            return self._to(func, *args, **kwargs)
        if func is F.interpolate:
            x, size = args[0], kwargs.get("size")
            if size is None:
                size = [int(length * kwargs["scale_factor"]) for length in x.shape[2:]]
            return x.new_empty((*x.shape[:2], *size))
        return func(*args, **kwargs)

    def _to(self, func, tensor, *args, dtype=None, device=None, **options):
        if func is torch.Tensor.cpu:
            device = "cpu"
        for given in args:
            if isinstance(given, torch.dtype):
                dtype = given
            elif isinstance(given, str | torch.device):
                device = given
            elif isinstance(given, torch.Tensor):
                device, dtype = given.device, given.dtype
        device = torch.device(device or tensor.device)
        dtype = dtype or tensor.dtype
        if device.type == tensor.device.type and dtype == tensor.dtype:
            return tensor
        return torch.ops.aten._to_copy(tensor, dtype=dtype, device=device)
