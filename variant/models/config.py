"""Configs of the models: frozen dataclasses, checked when built and when read from a file."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Self, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from variant_kernels.plans.depth_schedule import check_layers
from variant_kernels.plans.scale_layout import ScaleLayout

GROUPS = 32  # of every group normalisation in the VQ-VAE

Config = TypeVar("Config")


def describe_validation_error(error: ValidationError) -> str:
    """All problems that pydantic found, on one line: ``model.depth: Input should be ...``."""
    problems = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "unexpected_keyword_argument":
            message = "unknown key"
        elif problem["type"] == "missing":
            message = "missing"
        elif problem["type"] != "value_error":
            message = f"{message}; got {problem['input']!r}"
        problems.append(f"{where}: {message}" if where else message)
    return "; ".join(problems)


def parse_dataclass(kind: type[Config], values: Mapping[str, Any], where: str) -> Config:
    """Build a dataclass from plain values (JSON, TOML), checking names, types and ranges.

    Types are not converted, except integers to floats: 8.0, true and "8" are no integers.

    Raises:
        ValueError: one line that starts with ``where`` and names every bad key.
    """
    try:
        # As JSON, because strict validation of Python values takes no lists as tuples. Dates of
        # TOML become text, which no key takes.
        text = json.dumps(dict(values), default=str)
        return TypeAdapter(kind).validate_json(text, strict=True)
    except ValidationError as error:
        raise ValueError(f"{where}: {describe_validation_error(error)}") from None


def to_plain(value: Any) -> Any:
    """A dataclass as plain values for JSON and TOML: dicts with string keys, lists, scalars."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return value


class _Plain:
    """to_dict and from_dict, shared by the two model configurations."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; :meth:`from_dict` is the inverse."""
        return to_plain(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Raises: ValueError, one line, for unknown or missing keys and for bad values."""
        return parse_dataclass(cls, values, cls.__name__)

    def _require(self, holds: bool, what: str, got: object) -> None:
        if not holds:
            raise ValueError(f"{type(self).__name__}: {what}; got {got!r}")

    def _check_patch_nums(self, patch_nums: tuple[int, ...]) -> None:
        self._require(
            bool(patch_nums)
            and patch_nums[0] >= 1
            and all(a < b for a, b in itertools.pairwise(patch_nums)),
            "patch_nums must be ascending positive integers",
            patch_nums,
        )


@dataclass(frozen=True)
class VARConfig(_Plain):
    """A VAR transformer.

    Args:
        depth: number of layers.
        embed_dim: width of the residual stream; ``embed_dim / num_heads`` must be a multiple of 8
            in [16, 256].
        num_classes: class labels; one more embedding stands for "no label".
        patch_nums: sides of the token maps, ascending.
        vocab_size, vae_channels: codebook entries and their width; those of the VQ-VAE.
        mlp_ratio: hidden width of the feed-forward, in units of embed_dim.
        norm_eps: epsilon of every layer normalisation.
        shared_aln: one class projection shared by all layers.
        attn_l2_norm: q and k are L2-normalised and scaled by a learned factor per head.
        cond_drop_rate: probability that a label is dropped in training mode.
        drop_path_rate: stochastic depth of the last layer, rising linearly from 0.
        subnets: {depth: layers} that the weights were trained with.
        bridge: number of first scales that run every layer in those subnets.
    Raises:
        ValueError: a value out of range, naming it.
    """

    depth: int
    embed_dim: int
    num_heads: int
    num_classes: int
    patch_nums: tuple[int, ...]
    vocab_size: int
    vae_channels: int
    mlp_ratio: float = 4.0
    norm_eps: float = 1e-6
    shared_aln: bool = False
    attn_l2_norm: bool = True
    cond_drop_rate: float = 0.1
    drop_path_rate: float = 0.0
    subnets: dict[int, tuple[int, ...]] = field(default_factory=dict)
    bridge: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch_nums", tuple(self.patch_nums))
        for name in ("depth", "embed_dim", "num_heads", "num_classes", "vocab_size"):
            self._require(
                getattr(self, name) >= 1, f"{name} must be at least 1", getattr(self, name)
            )
        self._require(self.vae_channels >= 1, "vae_channels must be at least 1", self.vae_channels)
        self._check_patch_nums(self.patch_nums)
        head_dim = self.embed_dim / self.num_heads
        self._require(
            head_dim % 8 == 0 and 16 <= head_dim <= 256,
            "embed_dim / num_heads must be a multiple of 8 in [16, 256]",
            f"{self.embed_dim} / {self.num_heads}",
        )
        self._require(
            self.mlp_ratio > 0 and float(self.embed_dim * self.mlp_ratio).is_integer(),
            f"mlp_ratio times embed_dim ({self.embed_dim}) must be a positive integer",
            self.mlp_ratio,
        )
        self._require(self.norm_eps > 0, "norm_eps must be positive", self.norm_eps)
        self._require(
            0 <= self.cond_drop_rate <= 1, "cond_drop_rate must be in [0, 1]", self.cond_drop_rate
        )
        self._require(
            0 <= self.drop_path_rate < 1, "drop_path_rate must be in [0, 1)", self.drop_path_rate
        )
        num_scales = len(self.patch_nums)
        self._require(
            self.bridge is None or 0 <= self.bridge <= num_scales,
            f"bridge must be in [0, {num_scales}]",
            self.bridge,
        )
        subnets = {
            int(depth): check_layers(self.depth, layers, f"VARConfig: subnets[{depth}]")
            for depth, layers in sorted(self.subnets.items())
        }
        for depth, layers in subnets.items():
            self._require(
                len(layers) == depth, f"subnets[{depth}] must list {depth} layers", layers
            )
        self._require(not subnets or self.bridge is not None, "subnets need a bridge", self.bridge)
        object.__setattr__(self, "subnets", subnets)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.embed_dim // self.num_heads

    @cached_property
    def layout(self) -> ScaleLayout:
        """The position of each scale's tokens in the sequence."""
        return ScaleLayout.from_patch_nums(self.patch_nums)


@dataclass(frozen=True)
class VQVAEConfig(_Plain):
    """A multi-scale VQ-VAE.

    Args:
        vocab_size, z_channels: codebook entries and their width.
        ch, ch_mult: width of the first convolution, and its multiple at each resolution; each
            resolution after the first halves the image.
        num_res_blocks: residual blocks per resolution (one more in the decoder).
        patch_nums: sides of the token maps; the last is the side of the feature map.
        share_quant_resi: residual convolutions shared by the scales: 1 for one, 0 for one per
            scale.
        quant_resi: weight of a residual convolution; the identity has the rest. 0 for none.
        quant_conv_ks: kernel size of the convolutions before and after the quantiser (odd).
        using_znorm: the nearest code by cosine, not by Euclidean distance.
        beta: weight of the commitment loss.
        in_channels: image channels, 1 or 3.
    Raises:
        ValueError: a value out of range, naming it.
    """

    vocab_size: int
    z_channels: int
    ch: int
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    patch_nums: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    share_quant_resi: int = 4
    quant_resi: float = 0.5
    quant_conv_ks: int = 3
    using_znorm: bool = False
    beta: float = 0.25
    in_channels: int = 3

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch_nums", tuple(self.patch_nums))
        object.__setattr__(self, "ch_mult", tuple(self.ch_mult))
        for name in ("vocab_size", "z_channels", "ch", "num_res_blocks"):
            self._require(
                getattr(self, name) >= 1, f"{name} must be at least 1", getattr(self, name)
            )
        self._check_patch_nums(self.patch_nums)
        self._require(
            bool(self.ch_mult) and min(self.ch_mult) >= 1,
            "ch_mult must be positive integers",
            self.ch_mult,
        )
        for multiple in (1, *self.ch_mult):
            self._require(
                self.ch * multiple % GROUPS == 0,
                f"ch times each of ch_mult must be a multiple of {GROUPS}, the groups of the "
                "group normalisation",
                f"{self.ch} * {multiple}",
            )
        self._require(
            self.share_quant_resi >= 0, "share_quant_resi must be >= 0", self.share_quant_resi
        )
        self._require(0 <= self.quant_resi <= 1, "quant_resi must be in [0, 1]", self.quant_resi)
        self._require(
            self.quant_conv_ks >= 1 and self.quant_conv_ks % 2 == 1,
            "quant_conv_ks must be odd and positive",
            self.quant_conv_ks,
        )
        self._require(self.beta >= 0, "beta must be >= 0", self.beta)
        self._require(self.in_channels in (1, 3), "in_channels must be 1 or 3", self.in_channels)

    @property
    def downsample(self) -> int:
        """Side of the image divided by that of the feature map."""
        return 2 ** (len(self.ch_mult) - 1)

    @property
    def image_size(self) -> int:
        """Side of the images, in pixels."""
        return self.patch_nums[-1] * self.downsample

    @cached_property
    def layout(self) -> ScaleLayout:
        """The position of each scale's tokens in the sequence."""
        return ScaleLayout.from_patch_nums(self.patch_nums)


STRICT = ConfigDict(extra="forbid")
MAX_INTEGER = 2**63 - 1  # of torch's integers and seeds


def require_plain_numbers(section: Any) -> None:
    """Check that no number of a dataclass is infinite, NaN or an integer beyond 64 bits.

    Raises:
        ValueError: naming the field.
    """
    for entry in dataclasses.fields(section):
        value = getattr(section, entry.name)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float):
                require(math.isfinite(number), f"{entry.name} must be finite", number)
            elif isinstance(number, int):
                is_small = abs(number) <= MAX_INTEGER
                require(is_small, f"{entry.name} must be below 2^63", _shown(number))


def _shown(number: int) -> int | str:
    """The number, or the size of one of more digits than Python prints."""
    bits = number.bit_length()
    return number if bits < 200 else f"an integer of {bits} bits"


def require(holds: bool, what: str, got: object) -> None:
    if not holds:
        raise ValueError(f"{what}; got {got!r}")
