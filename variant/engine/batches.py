"""The batches of one call: started, generated and decoded with one choice of weights and launchers.

Axes: B images, R sequences (B, or 2B with guidance: conditional sequences first), L tokens of all
scales, E codebook vector width, H W the feature map (of images: pixels).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial, wraps
from itertools import pairwise
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from variant.engine.arguments import GivenTokens
from variant.engine.generation import OnScale, PartialResult, Sampling
from variant.engine.graph_replay import GraphReplay
from variant.engine.images import to_uint8
from variant.engine.kernels import Launchers
from variant.engine.page_tables import PageTableCache
from variant.engine.step_loop import BatchState, TokenBatch, generate_tokens
from variant.engine.weights import EngineWeights
from variant.models.parts import explains, unexplained
from variant.models.var import VAR
from variant.models.vqvae import ENCODER, VQVAE
from variant.models.zones import zone_of
from variant_kernels import CachePlan, DepthSchedule, PagedKVCache, ScaleLayout
from variant_kernels.dispatch.request import dtype_name
from variant_kernels.kv_cache import PageTables
from variant_kernels.untraced import untraced
from variant_kernels.wording import counted

F = TypeVar("F", bound=Callable[..., Any])


def without_autocast(method: F) -> F:
    """Runs a method of an object with a ``device`` in its own dtypes, also inside autocast.

    ``torch.compile`` does not trace it: see :func:`untraced`.
    """

    @untraced
    @wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(self.device.type, enabled=False):
            return method(self, *args, **kwargs)

    return cast("F", run)


@lru_cache(maxsize=64)
def cache_plan(layout: ScaleLayout, schedule: DepthSchedule, page_size: int) -> CachePlan:
    """The plan, remembered: it takes 0.3 ms for VAR-d30, during which a GPU would be idle."""
    return CachePlan(layout, schedule, page_size)


class Stopwatch:
    """Times between marks in the work of a device; only the last mark is waited for.

    A wait at every mark would leave a GPU idle until the host has queued more work.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._times: list[float] = []
        self._events: list[torch.cuda.Event] = []

    def mark(self) -> None:
        """Marks the end of the work that is queued now."""
        if self._device.type == "cuda":
            # An event: synchronising the whole device is an error while another thread captures.
            self._events.append(torch.cuda.Event(enable_timing=True))
            self._events[-1].record(torch.cuda.current_stream(self._device))
        else:
            self._times.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Seconds from each mark to the next one; waits for the last."""
        if self._events:
            self._events[-1].synchronize()
            return [a.elapsed_time(b) / 1000 for a, b in pairwise(self._events)]
        return [b - a for a, b in pairwise(self._times)]


def switch_depth(state: BatchState, k: int, begin: int, depth: int | Sequence[int]) -> bool:
    """From scale ``begin`` on, run the depth that ``on_scale`` returned after scale k.

    Returns:
        Whether it differs from the depth that runs there otherwise.
    Raises:
        TypeError, ValueError: no depth of this model, or a deeper one.
    """
    op = f"generate: on_scale after scale {k}"
    layers, schedule = state.var.layers_of(depth, op=op), state.schedule
    if begin == schedule.num_scales or layers == schedule.layers[begin]:
        return False
    planned = schedule.layers[begin]
    if not set(layers) <= set(planned):
        raise ValueError(
            f"{op}: depth can only fall within an image: its layers must be a subset of those that "
            f"were to run at scale {begin}, {list(planned)}; got {list(layers)}"
        )
    state.switch(begin, layers)
    return True


def can_be_captured(request: Request, batch: Batch) -> bool:
    """Whether a CUDA graph can generate the batch."""
    return request.can_be_captured and batch.given is None


def decode_rgb(weights: EngineWeights, f_hat_BEHW: Tensor) -> Tensor:
    """(B, 3, H, W) float32 in [0, 1]; a single channel is repeated."""
    return weights.decode(f_hat_BEHW).expand(-1, 3, -1, -1).contiguous()


def check_pixels(images_B3HW: Tensor, dtype: torch.dtype) -> Tensor:
    """The images of a decoder that computes in that dtype, if they are numbers.

    Raises:
        ValueError: there is NaN, which would become black; on a CPU alone, as a GPU would have to
            synchronise.
    """
    if images_B3HW.device.type == "cpu":
        lost_B = images_B3HW.isnan().flatten(1).any(1)
        if lost_B.any():
            hint = "" if dtype == torch.float32 else ", and use float32 if they overflow in it"
            raise ValueError(
                "Engine: the VQ-VAE's decoder must give numbers; got NaN in "
                f"{int(lost_B.sum())} of {counted(len(lost_B), 'image')} (computed in "
                f"{dtype_name(dtype)}). Check the weights of vae{hint}"
            )
    return images_B3HW


@dataclass(frozen=True)
class Request:
    """The arguments that all batches of one ``generate`` call share.

    flexible_from: the first scale at which ``on_scale`` can change the depth.  decode: whether to
    decode images from the tokens.  image_dtype: of the images, float32 or uint8.  log_probs:
    whether to return the log-probability of each token.
    """

    schedule: DepthSchedule
    sampling: Sampling
    flexible_from: int
    on_scale: OnScale | None
    decode: bool
    image_dtype: torch.dtype
    log_probs: bool

    def check(self) -> None:
        """Raises: TypeError, ValueError for values that do not go together."""
        if self.on_scale is not None and not callable(self.on_scale):
            raise TypeError(
                "generate: on_scale must be a function of (scale, partial); got "
                f"{type(self.on_scale).__name__}"
            )
        if self.log_probs and self.sampling.more_smooth:
            raise ValueError(
                "generate: log_probs and more_smooth exclude each other (mixtures of codes, not "
                "tokens, determine the next scale); got both"
            )

    @property
    def can_be_captured(self) -> bool:
        """Whether a CUDA graph can generate a batch that has no given tokens."""
        return self.on_scale is None and self.sampling.can_be_captured and not self.log_probs


@dataclass(frozen=True)
class Batch:
    """What differs from batch to batch.

    labels_B: (B,) int64.  image_ids_B: (B,) int64 on the device.  given: tokens that stay.
    """

    labels_B: Tensor
    image_ids_B: Tensor
    given: GivenTokens | None = None

    def split(self, size: int) -> Iterator[Batch]:
        """Parts of ``size`` images."""
        labels, ids = self.labels_B.split(size), self.image_ids_B.split(size)
        given = [None] * len(labels) if self.given is None else self.given.split(size)
        return map(Batch, labels, ids, given)


@dataclass(frozen=True)
class Part:
    """The result of one batch.

    images: (B, 3, H, W) float32 in [0, 1] or uint8, or (0, 3, H, W).  tokens_BL: (B, L) int64.
    log_probs_BL: (B, L) float32, or None.  batch: what it was generated from.
    depths: layers run at each scale.  postponed: scales after which ``on_scale`` asked for a depth
    that began later.  allocated_bytes, peak_bytes: of the K/V cache.
    captured: whether a CUDA graph generated it.  seconds: of the batch; decode_seconds: of the
    VQ-VAE decoder, part of it.  product_dtype, packed: of the weights.  zone_weight_bytes: of the
    subnets that could run.
    """

    images: Tensor
    tokens_BL: Tensor
    log_probs_BL: Tensor | None
    batch: Batch
    depths: tuple[int, ...]
    postponed: tuple[int, ...]
    allocated_bytes: int
    peak_bytes: int
    captured: bool
    seconds: float
    decode_seconds: float
    product_dtype: torch.dtype
    packed: bool
    zone_weight_bytes: int


@dataclass(frozen=True)
class BatchRunner:
    """Starts, generates and decodes batches.

    Launchers are chosen once per call of the engine, weights once per batch: what another thread or
    a callback does to the engine meanwhile does not change a batch that has started.

    Args:
        page_tables: shared by all calls of the engine.
    """

    var: VAR
    vae: VQVAE
    page_size: int
    weights: EngineWeights
    launchers: Launchers
    page_tables: PageTableCache

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.var.head.weight.device

    def plan(self, schedule: DepthSchedule) -> CachePlan:
        """The cache plan of a schedule."""
        return cache_plan(self.var.layout, schedule, self.page_size)

    def start(
        self,
        labels_B: Tensor,
        *,
        schedule: DepthSchedule,
        guidance: bool,
        tables: PageTables | None = None,
        can_switch: bool = False,
    ) -> BatchState:
        """The state of a new batch; its cache is allocated here.

        Args:
            tables: page tables of this schedule and batch size; None takes them from the cache.
            can_switch: whether the batch may go on at another depth.
        """
        config, labels_R = self.var.config, labels_B.to(self.device, non_blocking=True)
        if guidance:
            labels_R = torch.cat((labels_R, torch.full_like(labels_R, config.num_classes)))
        cache = PagedKVCache(
            self.plan(schedule),
            len(labels_R),
            config.num_heads,
            config.head_dim,
            self.launchers.pages_dtype,
            self.device,
            page_tables=self._tables(schedule, len(labels_R)) if tables is None else tables,
        )
        return BatchState(
            self.var,
            self.vae,
            launchers=self.launchers,
            weights=self.weights,
            cache=cache,
            labels_R=labels_R,
            zones=self.zones(schedule, can_switch=can_switch),
        )

    def zones(self, schedule: DepthSchedule, *, can_switch: bool) -> tuple[int, ...]:
        """The subnets whose zone weights a batch may use.

        All of them if it ``can_switch``: they must be those of the batch's start.
        """
        config = self.var.config
        layers = tuple(config.subnets.values()) if can_switch else schedule.layers
        zones = {zone_of(config, active) for active in layers}
        return tuple(sorted(zone for zone in zones if zone is not None))

    def _tables(self, schedule: DepthSchedule, num_sequences: int) -> PageTables:
        return self.page_tables.get(
            self.var.layout, schedule, num_sequences, self.page_size, self.device
        )

    @explains("Engine", *ENCODER)
    def generate(
        self,
        batch: Batch,
        request: Request,
        graphs: GraphReplay | None,
        unchanged: Callable[[], bool] | None = None,
    ) -> Part | None:
        """One batch of a request.

        Args:
            graphs: recorded with these weights; None launches every kernel from Python. No field
                of this object: a graph keeps the object that recorded it.
            unchanged: whether these weights are still those of the model; asked when all work is
                queued, while a GPU runs it.
        Returns:
            The result; None where the weights are not ``unchanged``.
        """
        watch = Stopwatch(self.device)
        watch.mark()
        captured = graphs is not None and can_be_captured(request, batch)
        postponed: list[int] = []
        if graphs is not None and captured:
            drawn = self._replay(graphs, batch, request)
        else:
            drawn = self._generate_eagerly(batch, request, postponed)
        watch.mark()
        if request.decode:
            images = self.decode(drawn.f_hat_BEHW, graphs)
            images = to_uint8(images) if request.image_dtype == torch.uint8 else images
        else:
            size = self.vae.config.image_size
            images = torch.empty(0, 3, size, size, dtype=request.image_dtype, device=self.device)
        watch.mark()
        is_current = unchanged is None or unchanged()
        generate_seconds, decode_seconds = watch.seconds()
        if not is_current:
            return None
        zones = self.zones(request.schedule, can_switch=request.on_scale is not None)
        return Part(
            images,
            drawn.tokens_BL,
            drawn.log_probs_BL,
            batch,
            drawn.schedule.depths,
            tuple(postponed),
            drawn.allocated_bytes,
            drawn.peak_bytes,
            captured=captured,
            seconds=generate_seconds + decode_seconds,
            decode_seconds=decode_seconds,
            product_dtype=self.weights.dtype,
            packed=self.weights.packed,
            zone_weight_bytes=self.weights.zone_bytes(zones),
        )

    def _generate_eagerly(self, batch: Batch, request: Request, postponed: list[int]) -> TokenBatch:
        """Adds to ``postponed`` the scales after which a depth was asked for too early."""
        schedule, sampling, layout = request.schedule, request.sampling, self.var.layout
        on_scale = request.on_scale
        state = self.start(
            batch.labels_B,
            schedule=schedule,
            guidance=sampling.guided,
            can_switch=on_scale is not None,
        )

        def after_scale(k: int, tokens_BL: Tensor, f_hat_BEHW: Tensor) -> None:
            assert on_scale is not None
            tokens, features = tokens_BL[:, : layout.visible(k)].clone(), f_hat_BEHW.clone()
            with unexplained():
                depth = on_scale(k, PartialResult(k, tokens, partial(self.decode, features)))
                if depth is not None and k + 1 < layout.num_scales:
                    begin = max(k + 1, request.flexible_from)
                    if switch_depth(state, k, begin, depth) and begin > k + 1:
                        postponed.append(k)

        return generate_tokens(
            state,
            sampling,
            batch.image_ids_B,
            None if on_scale is None else after_scale,
            given=None if batch.given is None else batch.given.to(self.device),
            log_probs=request.log_probs,
        )

    def _replay(self, graphs: GraphReplay, batch: Batch, request: Request) -> TokenBatch:
        schedule, sampling = request.schedule, request.sampling
        labels_B, image_ids_B = batch.labels_B, batch.image_ids_B
        # The graph reads these tables: it must keep them when the cache drops them.
        tables = self._tables(schedule, len(labels_B) * (2 if sampling.guided else 1))
        start = partial(self.start, schedule=schedule, guidance=sampling.guided, tables=tables)
        return graphs.generate_tokens(
            start, labels_B, image_ids_B, sampling, schedule, self._configuration
        )

    @property
    def _configuration(self) -> Hashable:
        """What a recording depends on, besides weights, batch, sampling and schedule."""
        names = tuple(self.launchers.names.values())
        return self.page_size, names, self.launchers.pages_dtype

    def is_recorded(self, batch: Batch, request: Request, graphs: GraphReplay) -> bool:
        """Whether graphs generate and decode the batch: then it needs no memory but its result."""
        if not can_be_captured(request, batch):
            return False
        size = len(batch.labels_B)
        key = size, request.sampling, request.schedule, self._configuration
        shape = size, self.vae.config.z_channels, *self.var.layout.shapes[-1]
        return graphs.has(*key) and (not request.decode or graphs.has_decoder(shape))

    @without_autocast
    @explains("Engine", *ENCODER)
    @torch.no_grad()
    def decode(self, f_hat_BEHW: Tensor, graphs: GraphReplay | None = None) -> Tensor:
        """:func:`decode_rgb` of these weights, by a graph where there is one.

        Raises:
            ValueError: see :func:`check_pixels`.
        """
        decode = partial(decode_rgb, self.weights)
        images = decode(f_hat_BEHW) if graphs is None else graphs.decode(decode, f_hat_BEHW)
        return check_pixels(images, self.weights.dtype)
