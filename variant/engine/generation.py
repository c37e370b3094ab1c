"""What a generation is asked for and what it gives back.

Axes: B images, L tokens of all scales.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from variant_kernels.dispatch.request import dtype_name

# Far beyond any use; keeps guided float32 logits finite.
MAX_CFG = 1e4


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: guidance, filters and the source of randomness.

    Exactly one of seed and generator is used; with neither a seed is drawn from torch's default
    generator.

    Raises:
        ValueError: a value out of range, or seed and generator together.
    """

    cfg: float = 1.5
    top_k: int = 0
    top_p: float = 0.0
    seed: int | None = None
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if not _number(self.cfg) or not 0 <= self.cfg <= MAX_CFG:
            raise ValueError(f"generate: cfg must be in [0, {MAX_CFG:g}]; got {self.cfg!r}")
        if not isinstance(self.top_k, int) or not 0 <= self.top_k < 2**31:
            raise ValueError(
                f"generate: top_k must be an integer >= 0 (0 keeps all); got {self.top_k!r}"
            )
        if not _number(self.top_p) or not 0 <= self.top_p <= 1:
            raise ValueError(f"generate: top_p must be in [0, 1] (0 keeps all); got {self.top_p}")
        if self.seed is not None and self.generator is not None:
            raise ValueError("generate: seed and generator exclude each other; got both")
        if self.seed is not None and not (isinstance(self.seed, int) and 0 <= self.seed < 2**63):
            raise ValueError(f"generate: seed must be an integer in [0, 2^63); got {self.seed!r}")
        if self.seed is None and self.generator is None:
            object.__setattr__(self, "seed", int(torch.randint(2**63 - 1, ())))

    @property
    def guided(self) -> bool:
        """Whether unconditional sequences must run beside the conditional ones."""
        return self.cfg > 0


@dataclass(frozen=True)
class PartialResult:
    """What ``on_scale`` sees: the tokens so far, and the image they would give if it ended here.

    scale: the scale just finished.  tokens: (B, tokens so far) int64.
    """

    scale: int
    tokens: Tensor
    _decode: Callable[[], Tensor] = field(repr=False)

    def images(self) -> Tensor:
        """(B, 3, H, W) in [0, 1]; runs the VQ-VAE decoder."""
        return self._decode()


@dataclass(frozen=True)
class Stats:
    """What a generation took.

    seconds: everything.  decode_seconds: the VQ-VAE decoder's share.  batches: into how many parts
    the request was split.  depths: layers run at each scale (of the last part).  dtype: of the
    matrix products.  kv_dtype: of K and V, the same unless 8 bits were asked for.  packed: whether
    the weights were packed for the CPU.  captured: whether a GPU ran it as a graph.
    kv_planned_bytes, kv_allocated_bytes, kv_peak_bytes: of the largest part; what the plan says,
    what the slab really takes (8-bit K/V: with their scales), what was in use at once.
    kv_paper_bytes: what the paper's scheme would hold for the same part in ``dtype``.
    """

    seconds: float
    decode_seconds: float
    batches: int
    depths: tuple[int, ...]
    dtype: str
    kv_dtype: str
    packed: bool
    captured: bool
    kv_planned_bytes: int
    kv_allocated_bytes: int
    kv_peak_bytes: int
    kv_paper_bytes: int


@dataclass(frozen=True)
class Generation:
    """images (B, 3, H, W) float32 in [0, 1] (none if not decoded), tokens (B, L) int64, stats."""

    images: Tensor
    tokens: Tensor
    stats: Stats


OnScale = Callable[[int, PartialResult], "int | Sequence[int] | None"]


def check_labels(
    labels: int | Sequence[int] | Tensor, num_classes: int, op: str = "generate"
) -> Tensor:
    """(B,) int64 on the CPU.  Raises: ValueError for none, for fractions, for unknown classes."""
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
    """int64 on the CPU.  Raises: ValueError for anything that is no integer."""
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
