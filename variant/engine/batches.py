"""The batches of one call: started, generated and decoded with one choice of weights and launchers.

Axes: B images, R sequences (B, or 2B with guidance: conditional sequences first), L tokens of all
scales, E codebook vector width, H W the feature map (of images: pixels).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial, wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from variant.engine.generation import OnScale, PartialResult, Sampling, Stats
from variant.engine.graph_replay import GraphReplay
from variant.engine.images import to_uint8
from variant.engine.kernels import Launchers
from variant.engine.page_tables import PageTableCache
from variant.engine.step_loop import BatchState, TokenBatch, generate_tokens
from variant.engine.weights import EngineWeights
from variant.models.var import VAR
from variant.models.vqvae import VQVAE
from variant_kernels import CachePlan, DepthSchedule, PagedKVCache, ScaleLayout
from variant_kernels.dispatch.request import dtype_name
from variant_kernels.kv_cache import PageTables

F = TypeVar("F", bound=Callable[..., Any])


def without_autocast(method: F) -> F:
    """Runs a method of an object with a ``device`` in its own dtypes, also inside autocast."""

    @wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(self.device.type, enabled=False):
            return method(self, *args, **kwargs)

    return cast("F", run)


@lru_cache(maxsize=64)
def cache_plan(layout: ScaleLayout, schedule: DepthSchedule, page_size: int) -> CachePlan:
    """The plan, remembered: it takes 0.3 ms for VAR-d30, during which a GPU would be idle."""
    return CachePlan(layout, schedule, page_size)


def synchronized_time(device: torch.device) -> float:
    """Seconds of a monotonic clock, after the work queued on a GPU has finished."""
    if device.type == "cuda":
        # An event: synchronising the whole device is an error while another thread captures.
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(device))
        done.synchronize()
    return time.perf_counter()


def decode_rgb(weights: EngineWeights, f_hat_BEHW: Tensor) -> Tensor:
    """(B, 3, H, W) float32 in [0, 1]; a single channel is repeated."""
    return weights.decode(f_hat_BEHW).expand(-1, 3, -1, -1).contiguous()


@dataclass(frozen=True)
class Request:
    """The arguments that all batches of one ``generate`` call share.

    flexible_from: the first scale at which ``on_scale`` can change the depth.  decode: whether to
    decode images from the tokens.  image_dtype: of the images, float32 or uint8.
    """

    schedule: DepthSchedule
    sampling: Sampling
    flexible_from: int
    on_scale: OnScale | None
    decode: bool
    image_dtype: torch.dtype


@dataclass(frozen=True)
class Part:
    """The result of one batch.

    images: (B, 3, H, W) float32 in [0, 1] or uint8, or (0, 3, H, W).  tokens_BL: (B, L) int64.
    labels_B, image_ids_B: (B,) int64, what it was generated from.
    depths: layers run at each scale.  allocated_bytes, peak_bytes: of the K/V cache.
    captured: whether a CUDA graph generated it.  seconds: of the batch; decode_seconds: of the
    VQ-VAE decoder, part of it.
    """

    images: Tensor
    tokens_BL: Tensor
    labels_B: Tensor
    image_ids_B: Tensor
    depths: tuple[int, ...]
    allocated_bytes: int
    peak_bytes: int
    captured: bool
    seconds: float
    decode_seconds: float


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
    ) -> BatchState:
        """The state of a new batch; its cache is allocated here.

        Args:
            tables: page tables of this schedule and batch size; None takes them from the cache.
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
        )

    def _tables(self, schedule: DepthSchedule, num_sequences: int) -> PageTables:
        return self.page_tables.get(schedule, num_sequences, self.page_size, self.device)

    def generate(
        self,
        labels_B: Tensor,
        image_ids_B: Tensor,
        request: Request,
        graphs: GraphReplay | None,
    ) -> Part:
        """One batch of a request.

        Args:
            labels_B: (B,) int64.  image_ids_B: (B,) int64 on the device.
            graphs: recorded with these weights; None launches every kernel from Python. No field
                of this object: a graph keeps the object that recorded it.
        """
        started = synchronized_time(self.device)
        eager = request.on_scale is not None or request.sampling.generator is not None
        if graphs is None or eager:
            batch = self._generate_eagerly(labels_B, image_ids_B, request)
        else:
            batch = self._replay(graphs, labels_B, image_ids_B, request)
        decoding = synchronized_time(self.device)
        if request.decode:
            images = self.decode(batch.f_hat_BEHW, graphs)
            images = to_uint8(images) if request.image_dtype == torch.uint8 else images
        else:
            size = self.vae.config.image_size
            images = torch.empty(0, 3, size, size, dtype=request.image_dtype, device=self.device)
        return Part(
            images,
            batch.tokens_BL,
            labels_B,
            image_ids_B,
            batch.schedule.depths,
            batch.allocated_bytes,
            batch.peak_bytes,
            captured=graphs is not None and not eager,
            seconds=(finished := synchronized_time(self.device)) - started,
            decode_seconds=finished - decoding,
        )

    def _generate_eagerly(
        self, labels_B: Tensor, image_ids_B: Tensor, request: Request
    ) -> TokenBatch:
        schedule, sampling, layout = request.schedule, request.sampling, self.var.layout
        state = self.start(labels_B, schedule=schedule, guidance=sampling.guided)
        on_scale = request.on_scale
        if on_scale is None:
            return generate_tokens(state, sampling, image_ids_B)

        def after_scale(k: int, tokens_BL: Tensor, f_hat_BEHW: Tensor) -> None:
            tokens, features = tokens_BL[:, : layout.visible(k)].clone(), f_hat_BEHW.clone()
            depth = on_scale(k, PartialResult(k, tokens, partial(self.decode, features)))
            if depth is not None and k + 1 < layout.num_scales:
                layers = self.var.layers_of(depth, op="on_scale")
                state.switch(max(k + 1, request.flexible_from), layers)

        return generate_tokens(state, sampling, image_ids_B, after_scale)

    def _replay(
        self, graphs: GraphReplay, labels_B: Tensor, image_ids_B: Tensor, request: Request
    ) -> TokenBatch:
        schedule, sampling = request.schedule, request.sampling
        # The graph reads these tables: it must keep them when the cache drops them.
        tables = self._tables(schedule, len(labels_B) * (2 if sampling.guided else 1))
        start = partial(self.start, schedule=schedule, guidance=sampling.guided, tables=tables)
        names, pages_dtype = tuple(self.launchers.names.values()), self.launchers.pages_dtype
        return graphs.generate_tokens(
            start,
            labels_B,
            image_ids_B,
            sampling,
            schedule,
            configuration=(self.page_size, names, pages_dtype),
        )

    @without_autocast
    @torch.no_grad()
    def decode(self, f_hat_BEHW: Tensor, graphs: GraphReplay | None = None) -> Tensor:
        """:func:`decode_rgb` of these weights, by a graph where there is one."""
        decode = partial(decode_rgb, self.weights)
        return decode(f_hat_BEHW) if graphs is None else graphs.decode(decode, f_hat_BEHW)

    def stats(
        self, parts: Sequence[Part], request: Request, dtype: torch.dtype, seconds: float
    ) -> Stats:
        """Measurements of a request from those of its parts.

        Args:
            dtype: of the engine.
            seconds: of the whole request.
        """
        first, plan, config = parts[0], self.plan(request.schedule), self.var.config
        pages_dtype, guided = self.launchers.pages_dtype, request.sampling.guided
        # Of the first part: no other is larger.
        sizes = (len(first.tokens_BL), config.num_heads, config.head_dim)
        item = dtype.itemsize
        return Stats(
            seconds=seconds,
            decode_seconds=sum(part.decode_seconds for part in parts),
            batches=len(parts),
            depths=parts[-1].depths,
            dtype=dtype_name(dtype),
            product_dtype=dtype_name(self.weights.dtype),
            kv_dtype=dtype_name(pages_dtype),
            packed=self.weights.packed,
            captured=first.captured,
            kv_planned_bytes=plan.peak_bytes(*sizes, pages_dtype, guided),
            kv_allocated_bytes=first.allocated_bytes,
            kv_peak_bytes=max(part.peak_bytes for part in parts),
            kv_paper_bytes=plan.paper_bytes(*sizes, k_bytes=item, v_bytes=item, guidance=guided),
        )
