"""Configs of the models: frozen dataclasses, checked when built and when read from a file."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, Union, get_args, get_origin

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError

from variant.models.class_names import check_class_names
from variant.models.ranges import Within, bound_text, check_ranges, hints_of, numbers_within
from variant_kernels.arguments import (
    boolean,
    choice,
    instance,
    integer,
    real,
    sequence,
    shown,
    typed,
)
from variant_kernels.plans.depth_schedule import check_layers
from variant_kernels.plans.scale_layout import ScaleLayout
from variant_kernels.wording import counted

GROUPS = 32  # of every group normalisation in the VQ-VAE

# The largest sizes, several times those of any published model: a damaged or hostile config is
# refused at once, before anything of its size is built or planned.
LIMITS = {
    "depth": 256,
    "embed_dim": 2**15,
    "num_heads": 2**11,
    "num_classes": 2**24,
    "vocab_size": 2**24,
    "vae_channels": 2**12,
    "z_channels": 2**12,
    "mlp_ratio": 64,
    "scales": 32,  # the length of patch_nums
    "tokens": 2**16,  # of all scales: the sum of the squares of patch_nums
    "subnets": 16,
    "ch": 2**12,
    "ch_mult": 64,  # each of them, and
    "resolutions": 8,  # how many there are
    "num_res_blocks": 32,
    "share_quant_resi": 32,
    "quant_conv_ks": 31,
    "in_channels": 3,
    "beta": 10**6,
}
MAX_SHOWN = 120  # characters of a value in a message

# What a subnet's layers use for the tokens of the flexible zone: the weights of the full network,
# or zone weights: an adaLN projection of their own, low-rank additions (LoRA), or copies.
ZoneKind = Literal["shared", "adaln", "lora", "copies"]
ZONE_KINDS = ("shared", "adaln", "lora", "copies")

# What JSON and TOML give for a number: no text, no boolean, no fraction for an integer.
Integer = Annotated[int, Field(strict=True)]
Real = Annotated[float, Field(strict=True)]


def _integer_of_key(key: Any) -> Any:
    """The integer of a key of JSON, which is text: "02" would be the key 2 once more."""
    if not isinstance(key, str):
        return key
    if not re.fullmatch("-?(0|[1-9][0-9]{0,9})", key):
        raise PydanticCustomError("int_parsing", "Input should be an integer in plain digits")
    return int(key)


IntegerKey = Annotated[int, BeforeValidator(_integer_of_key)]

Config = TypeVar("Config")


def problems_of(error: ValidationError, kind: type) -> list[str]:
    """One text for every problem that pydantic found, which begins with the dotted key.

    Args:
        kind: the dataclass that was to be built.
    """
    problems = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        expected = bound_text(problem["type"], problem.get("ctx", {}))
        if expected is not None:
            got = shown(problem["input"], MAX_SHOWN)
            problems.append(f"{where} must be {expected}; got {got}")
            continue
        if problem["type"] == "value_error":
            problems.append(_with_key(message, where, kind, problem["loc"]))
            continue
        if problem["type"] == "unexpected_keyword_argument":
            message = "unknown key"
        elif problem["type"] == "missing":
            message = "missing"
        else:
            message = f"{message}; got {shown(problem['input'], MAX_SHOWN)}"
        problems.append(f"{where}: {message}" if where else message)
    return problems


def _with_key(message: str, where: str, kind: Any, loc: Sequence[str | int]) -> str:
    """The message of a section's own check, with its key's full name: ``data.copies must ...``.

    Args:
        where: the dotted name of the section; empty for ``kind`` itself.
    """
    if not where:
        return message
    sections = [kind]
    for part in loc:
        types = [t for section in sections for t in _types(hints_of(section).get(str(part)))]
        sections = [t for t in types if dataclasses.is_dataclass(t)]
    names = [section.__name__ for section in sections if isinstance(section, type)]
    for prefix in (*names, where):
        message = message.removeprefix(f"{prefix}: ")
    first = re.match(r"\w*", message)
    is_key = first and any(first[0] in hints_of(section) for section in sections)
    return f"{where}.{message}" if is_key else f"{where}: {message}"


def _types(hint: Any) -> list[Any]:
    """The types in a union, or the one type."""
    return list(get_args(hint)) if get_origin(hint) in (Union, UnionType) else [hint]


def parse_dataclass(kind: type[Config], values: Mapping[str, Any], where: str) -> Config:
    """Build a dataclass from plain values (JSON, TOML), checking names, types and ranges.

    Types are not converted, except integers to floats: 8.0, true and "8" are no integers.

    Raises:
        TypeError: the values are no mapping.
        ValueError: one line that starts with ``where`` and names every bad key.
    """
    instance(where, "values", values, Mapping)
    try:
        return validate_dataclass(kind, values)
    except ValidationError as error:
        text = "; ".join(problems_of(error, kind)).removeprefix(f"{where}: ")
        raise ValueError(f"{where}: {text}") from None
    except RecursionError:
        raise ValueError(f"{where}: is nested too deeply") from None


def validate_dataclass(kind: type[Config], values: Mapping[str, Any]) -> Config:
    """As :func:`parse_dataclass`, with pydantic's own errors.

    Raises:
        ValidationError: with every problem.  RecursionError: the values are nested too deeply.
    """
    # As JSON, because strict validation of Python values takes no lists as tuples. Dates of TOML
    # become text, which no key takes.
    text = json.dumps(dict(values), default=str)
    return _adapter(kind).validate_json(text, strict=True)


@cache
def _adapter(kind: type[Config]) -> TypeAdapter[Config]:
    """Of a dataclass: building it takes longer than a validation."""
    return TypeAdapter(kind)


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
            raise ValueError(f"{type(self).__name__}: {what}; got {shown(got)}")

    def _check_numbers(self) -> None:
        """Check numbers against the ranges of their types; those of numpy become Python's."""
        for name, (kind, within) in numbers_within(type(self)).items():
            check: Any = integer if kind is int else real
            value = check(type(self).__name__, name, getattr(self, name), within.low, within.high)
            object.__setattr__(self, name, value)

    def _integers(self, name: str, longest: int) -> tuple[int, ...]:
        given = getattr(self, name)
        op, values = type(self).__name__, sequence(given)
        if values is None:
            raise TypeError(f"{op}: {name} must be a list of integers; got {typed(given)}")
        self._require(
            1 <= len(values) <= longest, f"{name} must have 1 to {longest} integers", len(values)
        )
        return tuple(integer(op, f"{name}[{i}]", value, 1) for i, value in enumerate(values))

    def _check_patch_nums(self) -> None:
        patch_nums = self._integers("patch_nums", int(LIMITS["scales"]))
        object.__setattr__(self, "patch_nums", patch_nums)
        self._require(
            all(a < b for a, b in itertools.pairwise(patch_nums)),
            "patch_nums must be ascending positive integers",
            patch_nums,
        )
        tokens = sum(side * side for side in patch_nums)
        self._require(
            tokens <= LIMITS["tokens"],
            f"patch_nums must have at most {LIMITS['tokens']:,} tokens in total",
            tokens,
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
        zone_weights: weights of each subnet's layers for the tokens of the flexible zone. "shared":
            those of the full network. "adaln": an adaLN projection of their own. "lora": low-rank
            additions to the linear layers. "copies": copies of the layers.
            See :mod:`variant.models.zones`.
        lora_rank: rank of the additions of "lora", in [1, embed_dim]; 0 for the others.
        zone_adaln: with "lora": whether the layers also have an adaLN projection of their own.
        class_names: of all classes in the order of their labels, or none.
    Raises:
        TypeError: a value that is no number where there must be one.
        ValueError: a value out of range (LIMITS), naming it.
    """

    depth: Annotated[Integer, Within(1, LIMITS["depth"])]
    embed_dim: Annotated[Integer, Within(1, LIMITS["embed_dim"])]
    num_heads: Annotated[Integer, Within(1, LIMITS["num_heads"])]
    num_classes: Annotated[Integer, Within(1, LIMITS["num_classes"])]
    patch_nums: tuple[Integer, ...]
    vocab_size: Annotated[Integer, Within(1, LIMITS["vocab_size"])]
    vae_channels: Annotated[Integer, Within(1, LIMITS["vae_channels"])]
    mlp_ratio: Annotated[Real, Within(0, LIMITS["mlp_ratio"])] = 4.0
    norm_eps: Annotated[Real, Within(0, 1)] = 1e-6
    shared_aln: bool = False
    attn_l2_norm: bool = True
    cond_drop_rate: Annotated[Real, Within(0, 1)] = 0.1
    drop_path_rate: Annotated[Real, Within(0, 1)] = 0.0
    subnets: dict[IntegerKey, tuple[Integer, ...]] = field(default_factory=dict)
    bridge: Integer | None = None
    zone_weights: ZoneKind = "shared"
    lora_rank: Integer = 0
    zone_adaln: bool = True
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_patch_nums()
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
        self._require(self.drop_path_rate < 1, "drop_path_rate must be < 1", self.drop_path_rate)
        num_scales = len(self.patch_nums)
        if self.bridge is not None:
            bridge = integer("VARConfig", "bridge", self.bridge, 0, num_scales)
            object.__setattr__(self, "bridge", bridge)
        instance("VARConfig", "subnets", self.subnets, Mapping)
        self._require(
            len(self.subnets) <= LIMITS["subnets"],
            f"subnets must be at most {LIMITS['subnets']}",
            len(self.subnets),
        )
        subnets = {
            int(depth): check_layers(self.depth, layers, "VARConfig", f"subnets[{depth}]")
            for depth, layers in sorted(self.subnets.items())
        }
        for depth, layers in subnets.items():
            self._require(
                len(layers) == depth,
                f"subnets[{depth}] must list {counted(depth, 'layer')}",
                layers,
            )
        self._require(not subnets or self.bridge is not None, "subnets need a bridge", self.bridge)
        object.__setattr__(self, "subnets", subnets)
        names = check_class_names("VARConfig", self.class_names, self.num_classes)
        object.__setattr__(self, "class_names", names)
        self._check_zone_weights()

    def _check_zone_weights(self) -> None:
        op = type(self).__name__
        choice(op, "zone_weights", self.zone_weights, ZONE_KINDS)
        rank = integer(op, "lora_rank", self.lora_rank, 0, self.embed_dim)
        object.__setattr__(self, "lora_rank", rank)
        object.__setattr__(self, "zone_adaln", boolean(op, "zone_adaln", self.zone_adaln))
        try:
            check_zone_options(self.zone_weights, rank, self.zone_adaln)
        except ValueError as error:
            raise ValueError(f"{op}: {error}") from None
        if self.zone_weights != "shared":
            shallow = all(depth < self.depth for depth in self.subnets)
            self._require(
                bool(self.subnets) and shallow,
                f'zone_weights "{self.zone_weights}" need subnets, each of fewer layers than depth',
                list(self.subnets),
            )

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
        vocab_size: codebook entries.
        z_channels: width of a codebook entry.
        ch: channels of the first convolution; ch times each of ch_mult must be a multiple of 32.
        ch_mult: channels at each resolution, in units of ch; each resolution after the first halves
            the image.
        num_res_blocks: residual blocks per resolution (one more in the decoder).
        patch_nums: ascending sides of the token maps; the last is the side of the feature map.
        share_quant_resi: residual convolutions shared by the scales: 1 for one, 0 for one per
            scale.
        quant_resi: weight of a residual convolution; the identity has the rest. 0 for none.
        quant_conv_ks: kernel size of the convolutions before and after the quantiser (odd).
        using_znorm: the nearest code by cosine, not by Euclidean distance.
        beta: weight of the commitment loss.
        in_channels: image channels.
    Raises:
        TypeError: a value that is no number where there must be one.
        ValueError: a value out of range (LIMITS), naming it.
    """

    vocab_size: Annotated[Integer, Within(1, LIMITS["vocab_size"])]
    z_channels: Annotated[Integer, Within(1, LIMITS["z_channels"])]
    ch: Annotated[Integer, Within(1, LIMITS["ch"])]
    ch_mult: tuple[Annotated[Integer, Within(1, LIMITS["ch_mult"])], ...] = (1, 1, 2, 2, 4)
    num_res_blocks: Annotated[Integer, Within(1, LIMITS["num_res_blocks"])] = 2
    patch_nums: tuple[Annotated[Integer, Within(1)], ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    share_quant_resi: Annotated[Integer, Within(0, LIMITS["share_quant_resi"])] = 4
    quant_resi: Annotated[Real, Within(0, 1)] = 0.5
    quant_conv_ks: Annotated[Integer, Within(1, LIMITS["quant_conv_ks"])] = 3
    using_znorm: bool = False
    beta: Annotated[Real, Within(0, LIMITS["beta"])] = 0.25
    in_channels: Annotated[Integer, Within(1, LIMITS["in_channels"], "1 or 3")] = 3

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_patch_nums()
        object.__setattr__(self, "ch_mult", self._integers("ch_mult", int(LIMITS["resolutions"])))
        self._require(
            max(self.ch_mult) <= LIMITS["ch_mult"],
            f"ch_mult must be at most {LIMITS['ch_mult']}",
            self.ch_mult,
        )
        for multiple in (1, *self.ch_mult):
            self._require(
                self.ch * multiple % GROUPS == 0,
                f"ch times each of ch_mult must be a multiple of {GROUPS}, the groups of the "
                "group normalisation",
                f"{self.ch} * {multiple}",
            )
        self._require(self.quant_conv_ks % 2 == 1, "quant_conv_ks must be odd", self.quant_conv_ks)
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


def check_zone_options(kind: str, lora_rank: int, adaln: bool) -> None:
    """Raises: ValueError for a rank or a ``zone_adaln`` that the kind of zone weights has no use
    for, and for "lora" without a rank."""
    if (lora_rank > 0) != (kind == "lora"):
        expected = "at least 1, such as 16," if kind == "lora" else "0"
        raise ValueError(
            f'lora_rank must be {expected} with zone_weights "{kind}"; got {lora_rank}'
        )
    if not adaln and kind != "lora":
        raise ValueError(f'zone_adaln = false needs zone_weights "lora"; got "{kind}"')


def check_pair_of_configs(var: VARConfig, vae: VQVAEConfig) -> None:
    """Raises: ValueError unless a transformer and a VQ-VAE have one codebook and one layout."""
    wrong = [
        f"on {what}; got {shown(ours)} and {shown(theirs)}"
        for what, ours, theirs in (
            ("patch_nums", var.patch_nums, vae.patch_nums),
            ("vocab_size", var.vocab_size, vae.vocab_size),
            ("vae_channels / z_channels", var.vae_channels, vae.z_channels),
        )
        if ours != theirs
    ]
    if wrong:
        raise ValueError(f"the transformer and the VQ-VAE must agree {'; '.join(wrong)}")


STRICT = ConfigDict(extra="forbid")
MAX_INTEGER = 2**63 - 1  # of torch's integers and seeds


def require_plain_numbers(section: Any) -> None:
    """Check the numbers of a dataclass: their ranges, finite, no integer beyond 64 bits.

    Raises:
        ValueError: naming the field.
    """
    check_ranges(section)
    for entry in dataclasses.fields(section):
        value = getattr(section, entry.name)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float):
                require(math.isfinite(number), f"{entry.name} must be finite", number)
            elif isinstance(number, int):
                is_small = abs(number) <= MAX_INTEGER
                require(is_small, f"{entry.name} must be below 2^63", number)


def require(holds: bool, what: str, got: object) -> None:
    if not holds:
        raise ValueError(f"{what}; got {shown(got)}")
