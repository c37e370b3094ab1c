"""Checks of the arguments of a generation that are tensors, or become tensors.

Axes: B images, K scales, T tokens of one scale, L tokens of all scales, H W a map of any size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from variant.models.class_names import numbered
from variant.models.config import VARConfig
from variant_kernels import ScaleLayout
from variant_kernels.arguments import shown
from variant_kernels.dispatch.request import dtype_name

# Classes by number or by name.
Labels = int | str | Sequence[int | str] | Tensor

# The original's editing keeps the given tokens of scales of at most so many tokens.
COARSE_TOKENS = 3


def _integers(op: str, name: str, values: object) -> Tensor:
    """Values as int64 on the CPU.  Raises: TypeError if one is not an integer."""
    if isinstance(values, Tensor) and not _has_values(values):
        raise TypeError(f"{op}: {name} must be a plain tensor of integers; got {shown(values)}")
    # torch takes True beside integers as 1, the bytes of a text, and what a mask hides.
    if _has_booleans(values):
        raise TypeError(f"{op}: {name} must be integers; got bool")
    if isinstance(values, bytearray) or np.ma.is_masked(values):
        got = "masked values" if isinstance(values, np.ndarray) else "bytearray"
        raise TypeError(f"{op}: {name} must be integers; got {got}")
    try:
        tensor = torch.as_tensor(_plain(values), device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise TypeError(f"{op}: {name} must be integers of 64 bits; got {shown(values)}") from None
    dtype = tensor.dtype
    if tensor.numel() and (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool):
        raise TypeError(f"{op}: {name} must be integers; got {dtype_name(dtype)}")
    if dtype == torch.uint64 and bool((tensor.view(torch.int64) < 0).any()):
        raise TypeError(f"{op}: {name} must be integers below 2^63; got larger ones (uint64)")
    # A copy: the caller may write into his own, also between two batches.
    return tensor.to(torch.int64, copy=True)


def _has_booleans(values: object, levels: int = 3) -> bool:
    """Whether a list, also one of lists or an array of objects, holds a boolean.

    Args:
        levels: of lists that are looked at; those of arguments have two, and one may hold itself.
    """
    if isinstance(values, np.ndarray):
        return values.dtype.kind == "O" and _has_booleans(values.tolist(), levels)
    if not isinstance(values, list | tuple) or not levels:
        return False
    kinds = set(map(type, values))
    if not kinds.isdisjoint((bool, np.bool_)):
        return True
    nested = not kinds.isdisjoint((list, tuple))
    return nested and any(_has_booleans(value, levels - 1) for value in values)


def _plain(values: object) -> object:
    """An array of numpy as torch can read it; anything else as it is.

    torch refuses reversed axes, the other byte order and objects, and warns of arrays that cannot
    be written to.
    """
    if not isinstance(values, np.ndarray):
        return values
    if values.dtype.kind == "O":
        return values.tolist()
    return values.astype(values.dtype.newbyteorder("="), order="C")


def _has_values(tensor: Tensor) -> bool:
    """Whether a tensor is dense and neither quantized nor on the meta device."""
    return tensor.layout == torch.strided and not (
        tensor.is_quantized or tensor.is_meta or tensor.is_nested
    )


def check_labels(labels: Labels, config: VARConfig, op: str = "generate") -> Tensor:
    """Labels as (B,) int64 on the CPU; no class, -1 or ``num_classes``, is ``num_classes``.

    Raises:
        TypeError: fractions or other objects, or names for a model without names.
        ValueError: none, or an unknown class.
    """
    num_classes = config.num_classes
    labels_B = _integers(op, "labels", numbered(op, labels, config.class_names))
    if labels_B.ndim == 0:
        labels_B = labels_B.unsqueeze(0)
    if labels_B.ndim != 1 or labels_B.numel() == 0:
        raise ValueError(
            f"{op}: labels must be one or more integers; got shape {tuple(labels_B.shape)}"
        )
    low, high = (int(x) for x in torch.aminmax(labels_B))
    if low < -1 or high > num_classes:
        raise ValueError(
            f"{op}: labels must be in [0, {num_classes}), or -1 or {num_classes} for no class; "
            f"got {low if low < -1 else high}"
        )
    return labels_B.masked_fill(labels_B < 0, num_classes)


def check_image_ids(
    image_ids: Sequence[int] | Tensor | None, count: int, device: torch.device
) -> Tensor:
    """(B,) int64, 0..B-1 by default.

    Raises:
        TypeError: fractions or other objects.  ValueError: not one per label.
    """
    if image_ids is None:
        return torch.arange(count, device=device)
    image_ids_B = _integers("generate", "image_ids", image_ids).to(device, non_blocking=True)
    if image_ids_B.shape != (count,):
        raise ValueError(
            f"generate: image_ids must have one id per label ({count}); "
            f"got shape {tuple(image_ids_B.shape)}"
        )
    return image_ids_B


def check_tokens(
    op: str, name: str, tokens: object, layout: ScaleLayout, vocab_size: int, count: int | None
) -> Tensor:
    """(B, L) int64 on the CPU.

    Args:
        count: B; None is any, also 0.
    Raises:
        TypeError: fractions or other objects.  ValueError: a wrong shape or value.
    """
    tokens_BL = _integers(op, name, tokens)
    shape = tuple(tokens_BL.shape)
    if len(shape) != 2 or shape[1] != layout.total or (count is not None and shape[0] != count):
        batch = "B" if count is None else count
        raise ValueError(f"{op}: {name} must be ({batch}, {layout.total}); got {shape}")
    if tokens_BL.numel():
        low, high = (int(x) for x in torch.aminmax(tokens_BL))
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"{op}: {name} must be in [0, {vocab_size}); got {low if low < 0 else high}"
            )
    return tokens_BL


@dataclass(frozen=True)
class GivenTokens:
    """Tokens of images to edit, and which of them stay.

    tokens_BL: (B, L) int64.  keep_BL: (B, L) bool; where it is False tokens are drawn.
    kept_scales: those of which every token stays.
    """

    tokens_BL: Tensor
    keep_BL: Tensor
    kept_scales: frozenset[int]

    def split(self, size: int) -> list[GivenTokens]:
        """Parts of ``size`` images."""
        parts = zip(self.tokens_BL.split(size), self.keep_BL.split(size), strict=True)
        return [GivenTokens(*part, self.kept_scales) for part in parts]

    def to(self, device: torch.device) -> GivenTokens:
        """The same on another device."""
        tokens_BL = self.tokens_BL.to(device, non_blocking=True)
        return GivenTokens(tokens_BL, self.keep_BL.to(device, non_blocking=True), self.kept_scales)

    def of_scale(self, tokens: slice, images: slice) -> tuple[Tensor, Tensor]:
        """Tokens and mask of one scale, each (images, T)."""
        return self.tokens_BL[images, tokens], self.keep_BL[images, tokens]


def check_given(
    tokens: object, mask: object, layout: ScaleLayout, vocab_size: int, count: int
) -> GivenTokens | None:
    """The given tokens of ``count`` images; None if neither tokens nor mask are given.

    Args:
        tokens: (B, L), (L,), or a list of one (B, T) tensor per scale.
    Raises:
        TypeError: of another type.  ValueError: one without the other, a wrong shape or value.
    """
    if tokens is None and mask is None:
        return None
    if tokens is None or mask is None:
        raise ValueError(
            "generate: tokens and mask go together (mask: which of the tokens stay); got "
            f"{'mask' if tokens is None else 'tokens'} only"
        )
    tokens_BL = _integers("generate", "tokens", _joined(tokens, layout))
    if tokens_BL.ndim == 1:
        tokens_BL = tokens_BL.unsqueeze(0)
    one = tokens_BL.ndim == 2 and len(tokens_BL) == 1
    tokens_BL = check_tokens(
        "generate", "tokens", tokens_BL, layout, vocab_size, 1 if one else count
    ).expand(count, -1)
    keep_BL = check_mask(mask, layout, count).expand(count, -1)
    kept = (k for k in range(layout.num_scales) if bool(keep_BL[:, layout.slice(k)].all()))
    return GivenTokens(tokens_BL, keep_BL, frozenset(kept))


def _joined(tokens: object, layout: ScaleLayout) -> object:
    """Tokens in one tensor where they come as one (B, T) tensor per scale, as the original's
    ``img_to_idxBl`` gives them; others as they are.

    Raises:
        ValueError: their numbers of tokens are not those of the scales, or of different batches.
    """
    parts = list(tokens) if isinstance(tokens, list | tuple) else []
    if not parts or not all(isinstance(part, Tensor) and part.ndim == 2 for part in parts):
        return tokens
    expected = [layout.slice(k).stop - layout.slice(k).start for k in range(layout.num_scales)]
    found = [tuple(part.shape) for part in parts]
    if found != [(len(parts[0]), count) for count in expected]:
        raise ValueError(
            f"generate: tokens by scale must be one (B, T) tensor per scale, T = {expected}; got "
            f"{found}"
        )
    return torch.cat([_integers("generate", "tokens", part) for part in parts], dim=1)


def check_mask(mask: object, layout: ScaleLayout, count: int) -> Tensor:
    """Which given tokens stay, (1, L) or (B, L) bool on the CPU.

    Args:
        mask: of tokens, (L,), (1, L) or (B, L); or a map (H, W), (1, H, W) or (B, H, W), which
            :func:`keep_by_map` brings to every scale. Booleans, or numbers: 0 redraws, 1 keeps.
    Raises:
        TypeError: no tensor or array of numbers.  ValueError: another shape, or other values.
    """
    try:
        given = torch.as_tensor(_plain(mask), device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"generate: mask must be a tensor or an array; got {type(mask).__name__}"
        ) from None
    if given.layout is not torch.strided or given.is_nested:
        raise TypeError(f"generate: mask must be a dense tensor; got {shown(mask)}")
    if given.is_complex():
        raise TypeError(f"generate: mask must be booleans or numbers; got {given.dtype}")
    total, shape = layout.total, tuple(given.shape)
    of_tokens = given.ndim in (1, 2) and shape[-1] == total
    if shape == (total, total) and count != total:  # a square map; other numbers are a mistake
        of_tokens = False
    batched = given.ndim == (2 if of_tokens else 3)
    fits = shape[0] in (1, count) if batched else given.ndim == (1 if of_tokens else 2)
    if not fits or not given.numel():
        raise ValueError(
            f"generate: mask must be of tokens, ({total},) or ({count}, {total}), or a map, (H, W) "
            f"or ({count}, H, W); got {shape}"
        )
    values = given.float()
    if of_tokens:
        allowed, expected = (
            (values == 0) | (values == 1),
            "of tokens must be 0 (redraw) or 1 (keep)",
        )
    else:  # written so that NaN fails too
        allowed = (values >= 0) & (values <= 1)
        expected = "must be in [0, 1] (0 redraws, 1 keeps)"
    others = values[~allowed]
    if len(others):
        raise ValueError(f"generate: mask {expected}; got {others[0].item():g}")
    if of_tokens:
        return values.bool().reshape(-1, total)
    return keep_by_map(values.reshape(-1, *shape[-2:]), layout)


def keep_by_map(map_BHW: Tensor, layout: ScaleLayout) -> Tensor:
    """Which tokens a map of what to keep keeps at every scale, (B, L) bool.

    A token stays where the map, resized to its scale by bilinear interpolation, is above 1/2, and
    at scales of at most three tokens always: as in the zero-shot editing of the original VAR code.
    """
    kept = []
    for height, width in layout.shapes:
        small = F.interpolate(
            map_BHW.float().unsqueeze(1), size=(height, width), mode="bilinear", align_corners=False
        )
        keep_BT = small.gt(0.5).flatten(1)
        kept.append(keep_BT | (keep_BT.shape[1] <= COARSE_TOKENS))
    return torch.cat(kept, dim=1)
