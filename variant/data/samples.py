"""What a training step reads: images or tokens, their labels, and mixup.

A sample is a function of (seed, epoch, index): the batch, the part of the batch, the process and
the worker that read it do not change it.

Axes: B samples, I channels, Y X pixels, L tokens of all scales, N images of the data set.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from variant.data.bad_items import BadItem, BadItems
from variant.data.file_stamps import FileStamps
from variant.data.images import STREAM_MIXUP, ImageData, Indices, epoch_order, stream


def _from_arrays(*values: Any) -> Samples:
    tensors: list[Any] = [torch.from_numpy(v) if isinstance(v, np.ndarray) else v for v in values]
    return Samples(*tensors)


@dataclass(frozen=True)
class Samples:
    """B samples of a source.

    images_BIYX: float32 in [-1, 1], None if there are tokens.  tokens_BL: int64, or None.
    labels_B: int64.  mixed_labels_B, mix_B: labels of the mixup partners (int64) and the weight of
        ``labels_B`` (float32); both None without mixup.
    bad: files that could not be read, in whose place others were.
    """

    images_BIYX: Tensor | None
    tokens_BL: Tensor | None
    labels_B: Tensor
    mixed_labels_B: Tensor | None = None
    mix_B: Tensor | None = None
    bad: tuple[BadItem, ...] = ()

    def __len__(self) -> int:
        return len(self.labels_B)

    def __reduce__(self) -> tuple[Any, ...]:
        # From a DataLoader's worker they come as arrays through a pipe. Tensors would take shared
        # memory: where it is full, a thread of the worker loses them, and the training never ends.
        values = (getattr(self, field.name) for field in dataclasses.fields(self))
        return _from_arrays, tuple(v.numpy() if isinstance(v, Tensor) else v for v in values)

    @property
    def images(self) -> Tensor:
        """``images_BIYX`` of samples that have images."""
        assert self.images_BIYX is not None, "these samples are tokens"
        return self.images_BIYX

    def to(self, device: torch.device) -> Samples:
        """The same on another device; from pinned memory, the copy does not block."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Samples:
        """The same in pinned memory; torch's DataLoader calls this."""
        return self._map(lambda tensor: tensor.pin_memory())

    def part(self, which: slice) -> Samples:
        """Some of the samples."""
        return self._map(lambda tensor: tensor[which])

    def _map(self, change: Callable[[Tensor], Tensor]) -> Samples:
        values = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        return dataclasses.replace(
            self, **{name: change(value) for name, value in values if isinstance(value, Tensor)}
        )


class Source(Protocol):
    """Where the samples of a run come from. Workers of a DataLoader get a copy of it.

    classes: names of the classes, in the order of their labels.
    classes_from: what their number comes from, for messages: a folder, a file, or a recipe's key.
    bad: counts the unreadable files of a run. In a worker they are only listed in the samples; the
        process that trains adds them: ``source.bad.add(samples.bad)``.
    """

    num_train: int
    num_held_out: int
    num_classes: int
    classes: list[str]
    classes_from: str
    bad: BadItems

    def samples(self, indices: Indices, epoch: int) -> Samples:
        """Training samples, augmented and mixed as in that epoch."""
        ...

    def held_out(self, indices: Indices) -> Samples:
        """Held-out samples, not augmented."""
        ...

    def unmixed(self, indices: Indices) -> Samples:
        """Training samples as in epoch 0, without mixup, for an evaluation."""
        ...

    def digest(self) -> str:
        """SHA-256 that identifies the data, wherever it lies."""
        ...

    def class_digests(self) -> dict[str, str]:
        """SHA-256 of the parts of the data by name, for messages; {} where there are none."""
        ...

    def file_stamps(self) -> FileStamps:
        """What tells that files were replaced, where the digest does not read them."""
        ...


class ImageSource:
    """Samples of image data, with mixup; implements :class:`Source`.

    Args:
        seed: of order and mixup.
        alpha: of the Beta distribution of mixup's weights (arXiv 1710.09412); 0 turns it off.
        max_bad: share of the images that may be unreadable.
    """

    def __init__(self, data: ImageData, seed: int, alpha: float, max_bad: float = 0.0) -> None:
        self.data, self.seed, self.alpha = data, seed, alpha
        self.bad = BadItems(data.num_train + data.num_held_out, max_bad)
        self.num_train, self.num_held_out = data.num_train, data.num_held_out
        self.num_classes, self.classes = data.num_classes, data.classes
        self.classes_from = data.classes_from

    def samples(self, indices: Indices, epoch: int) -> Samples:
        if self.alpha == 0:
            return self._samples(*self.data.train(indices, epoch))
        index_B = np.asarray(indices)
        partner_N, mix_N = mixing(self.seed, epoch, self.num_train, self.alpha)
        wanted = np.stack((index_B, partner_N[index_B]))
        # An image and its partner are mostly in the same part: each is read once.
        read, places = np.unique(wanted, return_inverse=True)
        images, labels = self.data.train(read, epoch)
        own, other = torch.from_numpy(places.reshape(wanted.shape))
        mix_B = torch.from_numpy(mix_N[index_B])
        mix_B111 = mix_B.view(-1, 1, 1, 1)
        mixed = mix_B111 * images[own] + (1 - mix_B111) * images[other]
        return self._samples(mixed, labels[own], labels[other], mix_B)

    def held_out(self, indices: Indices) -> Samples:
        return self._samples(*self.data.held_out(indices))

    def unmixed(self, indices: Indices) -> Samples:
        return self._samples(*self.data.train(indices, 0))

    def count_bad(self) -> None:
        """Count the files that could not be read by who reads ``data`` itself.

        Raises:
            UserError: more are lost than ``max_bad`` allows.
        """
        self.bad.add(self.data.take_bad())

    def _samples(self, images: Tensor, labels_B: Tensor, *mixing: Tensor) -> Samples:
        samples = Samples(images, None, labels_B, *mixing, bad=self.data.take_bad())
        return counted(samples, self.bad)

    def digest(self) -> str:
        return self.data.digest()

    def class_digests(self) -> dict[str, str]:
        return self.data.class_digests()

    def file_stamps(self) -> FileStamps:
        return self.data.file_stamps()


def counted(samples: Samples, bad: BadItems) -> Samples:
    """The samples, their bad files counted; in a worker of a DataLoader they stay in the list."""
    if get_worker_info() is None:
        bad.add(samples.bad)
    return samples


@lru_cache(maxsize=2)
def mixing(seed: int, epoch: int, count: int, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """Mixup in an epoch: the partner (N,) int64 and the weight (N,) float32 of each image.

    Neighbours in the order of the epoch are each other's partners, so that an image and its partner
    are in the same batch, and in the same part of it where parts are even. The last of an odd
    number has the first as its partner.
    """
    order_N = epoch_order(seed, epoch, count)
    position_N = np.arange(count) ^ 1
    position_N[position_N == count] = 0
    partner_N = np.empty_like(order_N)
    partner_N[order_N] = order_N[position_N]
    mix_N = stream(seed, epoch, STREAM_MIXUP).beta(alpha, alpha, count).astype(np.float32)
    for values in (partner_N, mix_N):
        values.flags.writeable = False  # the caller's are those of the cache
    return partner_N, mix_N
