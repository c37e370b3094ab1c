"""Request and result types of a generation, and the checks of its arguments.

Axes: B images, L tokens of all scales, H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

from variant.engine.images import to_pil
from variant_kernels.dispatch.request import dtype_name

if TYPE_CHECKING:
    from PIL.Image import Image

# Far above any useful value; keeps guided float32 logits finite.
MAX_CFG = 1e4


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: guidance, filters and the source of randomness.

    Every part of a request carries this object, from the command line to the sampling kernel.

    Args:
        cfg: weight of classifier-free guidance at the last scale, in [0, 10000]; it rises linearly
            from 0 at the first. 0 runs no unconditional sequences.
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: keep the most probable tokens of this total probability, in [0, 1]; 0 keeps all.
        seed: in [0, 2^63). Without a seed and a generator, torch's default generator draws one.
        generator: draws as ``torch.multinomial`` does, in place of the seed.
    Attributes:
        guided: whether unconditional sequences run beside the conditional ones.
    Raises:
        ValueError: a value out of range, or seed and generator together.
    """

    cfg: float | Tensor = 1.5
    top_k: int = 0
    top_p: float = 0.0
    seed: int | Tensor | None = None
    generator: torch.Generator | None = None
    guided: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not _is_number(self.cfg) or not 0 <= self.cfg <= MAX_CFG:
            raise ValueError(f"generate: cfg must be in [0, {MAX_CFG:g}]; got {self.cfg!r}")
        if not isinstance(self.top_k, int) or not 0 <= self.top_k < 2**31:
            raise ValueError(
                f"generate: top_k must be an integer >= 0 (0 keeps all); got {self.top_k!r}"
            )
        if not _is_number(self.top_p) or not 0 <= self.top_p <= 1:
            raise ValueError(f"generate: top_p must be in [0, 1] (0 keeps all); got {self.top_p}")
        if self.seed is not None and self.generator is not None:
            raise ValueError("generate: seed and generator exclude each other; got both")
        if self.seed is not None and not (isinstance(self.seed, int) and 0 <= self.seed < 2**63):
            raise ValueError(f"generate: seed must be an integer in [0, 2^63); got {self.seed!r}")
        if self.seed is None and self.generator is None:
            object.__setattr__(self, "seed", int(torch.randint(2**63 - 1, ())))
        object.__setattr__(self, "guided", bool(self.cfg > 0))

    def with_tensors(self, cfg: Tensor, seed: Tensor) -> Sampling:
        """The same with cfg (float64) and seed (int64) as 0-d tensors on the device.

        A CUDA graph reads tensors again at each replay; numbers are fixed when it is recorded. The
        values are not checked: the host would have to wait for the device.
        """
        sampling = copy(self)
        object.__setattr__(sampling, "cfg", cfg)
        object.__setattr__(sampling, "seed", seed)
        return sampling


@dataclass(frozen=True)
class PartialResult:
    """The argument of ``on_scale``: the tokens so far, and the images that they decode to.

    scale: the scale that has just finished.  tokens: (B, tokens of scales 0..scale) int64.
    """

    scale: int
    tokens: Tensor
    _decode: Callable[[], Tensor] = field(repr=False)

    def images(self) -> Tensor:
        """(B, 3, H, W) float32 in [0, 1]; runs the VQ-VAE decoder."""
        return self._decode()


@dataclass(frozen=True)
class Stats:
    """Time and memory of one generation.

    seconds: of the whole call.  decode_seconds: of the VQ-VAE decoder, part of it.  batches: the
    number of parts that the request was split into.  depths: layers run at each scale, of the last
    part.  dtype: of the engine.  product_dtype: of the matrix products; the same, or float32 on a
    CPU without native 16-bit products.  kv_dtype: of K and V; the engine's, or float8_e4m3fn.
    packed: whether the weights were packed for the CPU.  captured: whether a CUDA graph ran.
    kv_planned_bytes, kv_allocated_bytes, kv_peak_bytes: K/V cache of the largest part: by the plan,
    as allocated (8-bit K/V: with their scales), and in use at most.
    kv_paper_bytes: K/V cache of the paper's scheme for the same part, in ``dtype``.
    """

    seconds: float
    decode_seconds: float
    batches: int
    depths: tuple[int, ...]
    dtype: str
    product_dtype: str
    kv_dtype: str
    packed: bool
    captured: bool
    kv_planned_bytes: int
    kv_allocated_bytes: int
    kv_peak_bytes: int
    kv_paper_bytes: int


@dataclass(frozen=True)
class Generation:
    """Images, their tokens, and what they were generated from; on the device of the weights.

    images: (B, 3, H, W) float32 in [0, 1], or uint8 in 0..255 where that was asked for; (0, 3, H,
    W) if not decoded.  tokens: (B, L) int64.  labels, image_ids: (B,) int64.
    """

    images: Tensor
    tokens: Tensor
    stats: Stats
    labels: Tensor
    image_ids: Tensor

    def pil(self) -> list[Image]:
        """The images as 8-bit RGB ``PIL.Image.Image`` objects."""
        return to_pil(self.images)


OnScale = Callable[[int, PartialResult], "int | Sequence[int] | None"]


def check_labels(
    labels: int | Sequence[int] | Tensor, num_classes: int, op: str = "generate"
) -> Tensor:
    """Labels as (B,) int64 on the CPU.  Raises: ValueError for none, fractions, unknown classes."""
    labels_B = _integers(op, "labels", labels)
    if labels_B.ndim == 0:
        labels_B = labels_B.unsqueeze(0)
    if labels_B.ndim != 1 or labels_B.numel() == 0:
        raise ValueError(
            f"{op}: labels must be one or more integers; got shape {tuple(labels_B.shape)}"
        )
    low, high = (int(x) for x in torch.aminmax(labels_B))
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"{op}: labels must be in [0, {num_classes}); got {low if low < 0 else high}"
        )
    return labels_B


def _integers(op: str, name: str, values: object) -> Tensor:
    """Values as int64 on the CPU.  Raises: ValueError if one is not an integer."""
    try:
        tensor = torch.as_tensor(values, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{op}: {name} must be integers; got {values!r}") from None
    if tensor.numel() and (tensor.is_floating_point() or tensor.dtype == torch.bool):
        raise ValueError(f"{op}: {name} must be integers; got {dtype_name(tensor.dtype)}")
    return tensor.to(torch.int64)


def check_image_ids(
    image_ids: Sequence[int] | Tensor | None, count: int, device: torch.device
) -> Tensor:
    """(B,) int64, 0..B-1 by default.  Raises: ValueError unless there is one per label."""
    if image_ids is None:
        return torch.arange(count, device=device)
    image_ids_B = _integers("generate", "image_ids", image_ids).to(device, non_blocking=True)
    if image_ids_B.shape != (count,):
        raise ValueError(
            f"generate: image_ids must have one id per label ({count}); "
            f"got {tuple(image_ids_B.shape)}"
        )
    return image_ids_B


def check_tokens(tokens: Tensor, shape: tuple[int, int], vocab_size: int, op: str) -> Tensor:
    """(B, L) int64 on the CPU.  Raises: ValueError for a wrong shape, dtype or value."""
    tokens_BL = _integers(op, "tokens_BL", tokens)
    if tokens_BL.shape != shape:
        raise ValueError(f"{op}: tokens_BL must be {shape}; got {tuple(tokens_BL.shape)}")
    low, high = (int(x) for x in torch.aminmax(tokens_BL))
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"{op}: tokens_BL must be in [0, {vocab_size}); got {low if low < 0 else high}"
        )
    return tokens_BL
