"""Request and result types of a generation, and the checks of its arguments.

Axes: B images, L tokens of all scales, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from variant.engine.images import to_pil
from variant_kernels.arguments import boolean, instance, integer, real, sequence
from variant_kernels.ops.sample_tokens import MAX_SEED

if TYPE_CHECKING:
    from PIL.Image import Image

# Far above any useful value; keeps guided float32 logits finite.
MAX_CFG = 1e4


# Keeps float32 logits finite after the division, with any guidance.
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-4, 1e4

PerScale = float | Sequence[float]


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: guidance, temperature, filters and the source of randomness.

    Every part of a request carries this object, from the command line to the sampling kernel.
    Numbers of numpy and torch are taken and kept as Python's.

    Args:
        cfg: weight of classifier-free guidance at the last scale, in [0, 10000]; it rises linearly
            from 0 at the first. One number per scale is used as it is. 0 everywhere runs no
            unconditional sequences.
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: keep the most probable tokens of this total probability, in [0, 1]; 0 keeps all.
        seed: in [0, 2^63). Without a seed and a generator, torch's default generator draws one.
        generator: draws as ``torch.multinomial`` does, in place of the seed.
        temperature: in [0.0001, 10000], or one per scale. Logits are divided by it before guidance
            and filters; 1 leaves them as they are.
        more_smooth: accumulate a mixture of codes in place of the code of the drawn token: softmax
            of filtered logits with Gumbel noise, as in the original VAR code.
    Attributes:
        guided: whether unconditional sequences run beside the conditional ones.
    Raises:
        TypeError: a value of another type.
        ValueError: a value out of range, or seed and generator together.
    """

    cfg: PerScale | Tensor = 1.5
    top_k: int = 0
    top_p: float = 0.0
    seed: int | Tensor | None = None
    generator: torch.Generator | None = None
    temperature: PerScale = 1.0
    more_smooth: bool = False
    guided: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        op = "generate"
        cfg = _per_scale(op, "cfg", self.cfg, 0, MAX_CFG)
        temperature = _per_scale(
            op,
            "temperature",
            self.temperature,
            MIN_TEMPERATURE,
            MAX_TEMPERATURE,
            "(top_k=1 draws the likeliest token)",
        )
        seed = self.seed
        if seed is not None and self.generator is not None:
            raise ValueError(f"{op}: seed and generator exclude each other; got both")
        if self.generator is not None:
            instance(op, "generator", self.generator, torch.Generator)
        elif seed is None:
            seed = int(torch.randint(MAX_SEED, (), device="cpu"))
        else:
            seed = integer(op, "seed", seed, 0, MAX_SEED)
        checked = {
            "cfg": cfg,
            "top_k": integer(op, "top_k", self.top_k, 0, 2**31 - 1, "(0 keeps all)"),
            "top_p": real(op, "top_p", self.top_p, 0, 1, "(0 keeps all)"),
            "seed": seed,
            "temperature": temperature,
            "more_smooth": boolean(op, "more_smooth", self.more_smooth),
            "guided": any(cfg) if isinstance(cfg, tuple) else cfg > 0,
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def check_run(self, num_scales: int, device: torch.device) -> None:
        """Raises: ValueError unless a model of that many scales can draw so on that device."""
        for name in ("cfg", "temperature"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != num_scales:
                raise ValueError(
                    f"generate: {name} must be one number, or one per scale ({num_scales}); "
                    f"got a list of {len(value)}"
                )
        if self.generator is not None and self.generator.device.type != device.type:
            raise ValueError(
                f"generate: generator must be on the device of the weights ({device}); "
                f"got {self.generator.device}"
            )

    def guidance(self, scale: int, num_scales: int) -> float | Tensor:
        """The weight of guidance at a scale; 0.0 where the unconditional half is not needed."""
        if isinstance(self.cfg, tuple):
            return self.cfg[scale]
        if not self.guided or scale == 0:
            return 0.0
        # Rises linearly from 0 at the first scale to cfg at the last.
        return self.cfg * scale / (num_scales - 1)  # type: ignore[operator]

    def temperature_at(self, scale: int) -> float:
        """The temperature of a scale."""
        return self.temperature[scale] if isinstance(self.temperature, tuple) else self.temperature  # type: ignore[return-value]

    def with_tensors(self, cfg: Tensor, seed: Tensor) -> Sampling:
        """The same with cfg (float64) and seed (int64) as 0-d tensors on the device.

        A CUDA graph reads tensors again at each replay; numbers are fixed when it is recorded: so
        is a cfg per scale. The values are not checked: the host would have to wait for the device.
        """
        sampling = copy(self)
        if not isinstance(self.cfg, tuple):
            object.__setattr__(sampling, "cfg", cfg)
        object.__setattr__(sampling, "seed", seed)
        return sampling

    @property
    def recorded(self) -> tuple[object, ...]:
        """What a CUDA graph fixes when it is recorded."""
        per_scale = self.cfg if isinstance(self.cfg, tuple) else None
        return self.guided, self.top_k, self.top_p, self.temperature, per_scale

    @property
    def can_be_captured(self) -> bool:
        """Whether a CUDA graph can draw: neither from a generator nor with Gumbel noise."""
        return self.generator is None and not self.more_smooth


def _per_scale(
    op: str, name: str, value: object, low: float, high: float, note: str = ""
) -> float | tuple[float, ...]:
    """One number, or a tuple of several, each in [low, high]."""
    numbers = sequence(value)
    if numbers is not None:
        if not numbers:
            raise ValueError(
                f"{op}: {name} must be one number, or one per scale; got an empty list"
            )
        return tuple(
            real(op, f"{name}[{k}]", number, low, high, note) for k, number in enumerate(numbers)
        )
    return real(op, name, value, low, high, note)


@dataclass(frozen=True)
class PartialResult:
    """The argument of ``on_scale``: the tokens so far, and the images that they decode to.

    scale: the scale that has just finished.  tokens: (B, tokens of scales 0..scale) int64.
    A copy, also one by ``pickle``, holds the images in place of the engine that decodes them.
    """

    scale: int
    tokens: Tensor
    _decode: Callable[[], Tensor] = field(repr=False)

    def images(self) -> Tensor:
        """(B, 3, H, W) float32 in [0, 1]; runs the VQ-VAE decoder."""
        return self._decode()

    def __reduce__(self) -> tuple[object, ...]:
        # To another process, which lacks the decoder, it goes with its images.
        return PartialResult, (self.scale, self.tokens, partial(torch.clone, self.images()))


@dataclass(frozen=True)
class Stats:
    """Time and memory of one generation.

    seconds: of the whole call.  decode_seconds: of the VQ-VAE decoder, part of it.  batches: the
    number of parts that the request was split into.  depths: layers run at each scale, of the last
    part.  postponed: the scales after which ``on_scale`` asked for another depth that began later,
    after the bridge.  dtype: of the engine.  product_dtype: of the matrix products; the same, or
    float32 on a CPU (see :class:`variant.Engine`).  kv_dtype: of K and V; the engine's, or
    float8_e4m3fn.  packed: whether the weights were packed for the CPU.  captured: whether a CUDA
    graph ran.
    kv_planned_bytes, kv_allocated_bytes, kv_peak_bytes: K/V cache of the largest part: by the plan,
    as allocated (8-bit K/V: with their scales), and in use at most.
    kv_paper_bytes: K/V cache of the paper's scheme for the same part, in ``dtype``.
    zone_weight_bytes: packed, cast and merged zone weights of the subnets that could run.
    """

    seconds: float
    decode_seconds: float
    batches: int
    depths: tuple[int, ...]
    postponed: tuple[int, ...]
    dtype: str
    product_dtype: str
    kv_dtype: str
    packed: bool
    captured: bool
    kv_planned_bytes: int
    kv_allocated_bytes: int
    kv_peak_bytes: int
    kv_paper_bytes: int
    zone_weight_bytes: int = 0


@dataclass(frozen=True)
class Generation:
    """Images, their tokens, and what they were generated from; on the device of the weights.

    images: (B, 3, H, W) float32 in [0, 1], or uint8 in 0..255 where that was asked for; (0, 3, H,
    W) if not decoded.  tokens: (B, L) int64.  labels, image_ids: (B,) int64; the label of no class
    is the number of classes.  log_probs: (B, L) float32 where asked for: of each token under the
    model, before guidance, temperature and filters.
    """

    images: Tensor
    tokens: Tensor
    stats: Stats
    labels: Tensor
    image_ids: Tensor
    log_probs: Tensor | None = None

    def pil(self) -> list[Image]:
        """The images as 8-bit RGB ``PIL.Image.Image`` objects."""
        return to_pil(self.images)


OnScale = Callable[[int, PartialResult], "int | Sequence[int] | None"]
