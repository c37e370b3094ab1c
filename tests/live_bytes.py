"""Counts the bytes of the tensors that live inside a block."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages made inside the block: ``now`` alive, and at most ``peak``.

    Every result of an op is seen, also those of the backward pass and of checkpoints. Temporary
    memory inside an op is not.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._sizes = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        # An argument that no earlier op returned was made outside the block.
        self._see((args, kwargs), inside=False)
        self._see(results, inside=True)
        return results

    def _see(self, tree, *, inside):
        for x in tree_leaves(tree):
            if not isinstance(x, torch.Tensor):
                continue
            storage = x.untyped_storage()
            if storage._cdata in self._sizes:
                continue
            self._sizes[storage._cdata] = size = storage.nbytes() if inside else 0
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, storage._cdata)

    def _drop(self, key):
        self.now -= self._sizes.pop(key)
