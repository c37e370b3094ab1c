"""The engine: generation at any depth, its weights, its memory and its graphs.

The step loop itself is in ``steps.py``.

Axes: B images, R sequences (B, or 2B with guidance: conditional rows first), L tokens of all
scales, V codebook entries, E codebook vector width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, wraps
from threading import Lock
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from variant.engine.cuda_graphs import Captures, GraphRecorder, Recorder, Tensors
from variant.engine.generation import (
    Generation,
    OnScale,
    PartialResult,
    Sampling,
    Stats,
    check_image_ids,
    check_labels,
    check_tokens,
)
from variant.engine.kernels import Kernels
from variant.engine.kv_dtype import KVDtype, check_kv_dtype
from variant.engine.memory import free_bytes
from variant.engine.step_loop import Draws, Run, force, paint
from variant.engine.weights import EngineWeights, Fingerprint
from variant.models.var import VAR
from variant.models.vqvae import VQVAE
from variant_kernels import CachePlan, DepthSchedule, PagedKVCache, ScaleLayout
from variant_kernels.dispatch.request import dtype_name
from variant_kernels.kv_cache import PageTables
from variant_kernels.packed_linear import can_pack

# Schedules and batch sizes whose page tables wait for the next call.
TABLES_KEPT = 16
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class _Painted:
    """One batch before it is decoded; K/V bytes as allocated and as used at most."""

    tokens_BL: Tensor
    f_hat_BEHW: Tensor
    schedule: DepthSchedule
    allocated_bytes: int
    peak_bytes: int


F = TypeVar("F", bound=Callable[..., Any])


def _in_its_own_dtype(method: F) -> F:
    """A demo that puts everything under autocast, as the original's does, changes nothing here."""

    @wraps(method)
    def run(self: Engine, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(self.device.type, enabled=False):
            return method(self, *args, **kwargs)

    return cast("F", run)


@lru_cache(maxsize=64)
def _plan(layout: ScaleLayout, schedule: DepthSchedule, page_size: int) -> CachePlan:
    """Made once: 0.3 ms for VAR-d30, at every call, while a GPU has nothing to do."""
    return CachePlan(layout, schedule, page_size)


def new_recorder(device: torch.device) -> Recorder | None:
    """What records generations on ``device``, if anything does."""
    return GraphRecorder(device) if device.type == "cuda" else None


class Engine:
    """Generates with one VAR and its VQ-VAE at any depth.

    Weights are cast once to ``dtype`` (shared where it is their own); the residual stream is
    float32 also in 16-bit engines. torch's autocast around a call changes nothing. Weights changed
    in place (by an optimiser, by ``load_state_dict``) are noticed at the next call; after changes
    through ``.data`` call :meth:`refresh`.

    Args:
        var, vae: the models; same codebook and layout.
        dtype: of weights, K/V and matrix products; None is the weights' own.
        backend: of the kernels; "auto" takes the fastest.
        page_size: tokens per cache page.
        kv_dtype: of K and V; None is exact: ``dtype``. "fp8" (or torch.float8_e4m3fn) keeps 8 bits
            and one scale per token and head: about half the cache of a 16-bit engine, at an error
            that :mod:`variant.kv_error` measures. A call may ask for it alone.
        pack: on a CPU keep a second copy of the weights, in the order that oneDNN computes with
            (:mod:`variant.packing`): faster; False saves that memory.
        capture: on a GPU record each batch size and schedule as one graph when it is first met and
            replay it afterwards (:mod:`variant.capture`); False launches every kernel from Python.
            Calls with ``on_scale`` or ``generator`` are never recorded.
    Raises:
        ValueError: the two models do not fit each other, or the backend cannot serve the dtypes.
    """

    def __init__(
        self,
        var: VAR,
        vae: VQVAE,
        *,
        dtype: torch.dtype | None = None,
        backend: str = "auto",
        page_size: int = 16,
        kv_dtype: KVDtype = None,
        pack: bool = True,
        capture: bool = True,
    ) -> None:
        check_pair(var, vae)
        own = var.head.weight.dtype
        self.var, self.vae = var, vae
        self.dtype = own if dtype is None else dtype
        if self.dtype not in DTYPES:
            names = ", ".join(dtype_name(d) for d in DTYPES)
            raise ValueError(f"Engine: dtype must be one of {names}; got {self.dtype}")
        if page_size < 1:
            raise ValueError(f"Engine: page_size must be at least 1; got {page_size}")
        self.page_size = page_size
        self.kv_dtype = check_kv_dtype("Engine", kv_dtype)
        self.backend = backend
        self.pack, self.capture = pack, capture
        self._lock = Lock()
        self._cast: tuple[tuple[tuple[int, int], ...], EngineWeights] | None = None
        self._captures: tuple[EngineWeights, Captures] | None = None
        self._tables: dict[Hashable, PageTables] = {}
        self._fingerprint = Fingerprint()
        self._kv_bytes: dict[Hashable, tuple[int, int]] = {}
        self._kernels(self.kv_dtype)  # a backend that cannot serve the dtypes is refused here

    def __getstate__(self) -> dict[str, object]:
        """Without the lock, cast weights and graphs, so that a used model can be pickled."""
        dropped = {"_lock": None, "_cast": None, "_captures": None, "_tables": {}}
        return {**self.__dict__, **dropped, "_fingerprint": Fingerprint()}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state, _lock=Lock())

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.var.head.weight.device

    @property
    def packed(self) -> bool:
        """Whether the weights are packed for the CPU's matrix library."""
        return self.pack and can_pack(self.device, self.dtype)

    # --- weights --------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Cast the weights anew at the next call; needed only after a change through ``.data``."""
        with self._lock:
            self._cast = self._captures = None

    def _weights(self) -> EngineWeights:
        """The weights in the engine's dtype, cast again if any changed since the last call."""
        fingerprint = self._fingerprint(self.var, self.vae)
        with self._lock:
            if self._cast is None or self._cast[0] != fingerprint:
                # The old copies, and graphs that read them, go before the new ones are made.
                self._cast = self._captures = None
                weights = EngineWeights(self.var, self.vae, self.dtype, self.packed)
                self._cast = fingerprint, weights
            return self._cast[1]

    def _kernels(self, kv_dtype: torch.dtype | None) -> Kernels:
        # Chosen per call: use_backend and VARIANT_BACKEND count.
        return Kernels(
            self.backend, self.device.type, self.dtype, self.var, self.page_size, kv_dtype
        )

    def _kv_dtype(self, op: str, kv_dtype: KVDtype) -> torch.dtype | None:
        """What a call asks for; None is the engine's own."""
        return check_kv_dtype(op, kv_dtype) or self.kv_dtype

    def _start(
        self,
        labels_B: Tensor,
        schedule: DepthSchedule,
        guidance: bool,
        weights: EngineWeights,
        kernels: Kernels,
        steps: PageTables | None = None,
    ) -> Run:
        """A run of one batch; its cache is allocated here."""
        config, labels_R = self.var.config, labels_B.to(self.device, non_blocking=True)
        if guidance:
            labels_R = torch.cat((labels_R, torch.full_like(labels_R, config.num_classes)))
        plan = _plan(self.var.layout, schedule, self.page_size)
        cache = PagedKVCache(
            plan,
            len(labels_R),
            config.num_heads,
            config.head_dim,
            kernels.pages_dtype,
            self.device,
            page_tables=self._steps(schedule, len(labels_R)) if steps is None else steps,
        )
        return Run(
            self.var,
            self.vae,
            kernels=kernels,
            weights=weights,
            cache=cache,
            labels_R=labels_R,
        )

    def _captures_for(self, weights: EngineWeights, kernels: Kernels) -> Captures | None:
        """The recordings made with these weights; None where nothing is recorded."""
        if not self.capture or not kernels.can_be_captured:
            return None
        with self._lock:
            if self._captures is None or self._captures[0] is not weights:
                recorder = new_recorder(self.device)
                self._captures = None if recorder is None else (weights, Captures(recorder))
            return None if self._captures is None else self._captures[1]

    def _steps(self, schedule: DepthSchedule, rows: int) -> PageTables:
        """Page tables of a schedule, kept for the next run."""
        key = (schedule.layers, rows, self.page_size, self.device)
        with self._lock:
            steps = self._tables.pop(key, {})
            self._tables[key] = steps  # last in, last out
            while len(self._tables) > TABLES_KEPT:
                del self._tables[next(iter(self._tables))]
        return steps

    # --- public ---------------------------------------------------------------------------------

    @_in_its_own_dtype
    @torch.no_grad()
    def forced_logits(
        self,
        labels_B: Tensor,
        tokens_BL: Tensor,
        *,
        depth: int | Sequence[int] | None = None,
        bridge: int | None = None,
        kv_dtype: KVDtype = None,
    ) -> Tensor:
        """Logits of the cached, paged path when it is fed with given tokens.

        The conditional half only; equals ``VAR.forward(labels, vae.teacher_input(tokens))`` up to
        rounding.

        Args:
            labels_B: (B,) int64.  tokens_BL: (B, L) int64.
            depth, bridge, kv_dtype: as in ``generate``.
        Returns:
            (B, L, V) float32.
        Raises:
            ValueError: an argument out of range.
        """
        kv_wanted = self._kv_dtype("forced_logits", kv_dtype)
        labels_B = check_labels(labels_B, self.var.config.num_classes, "forced_logits")
        shape = (len(labels_B), self.var.layout.total)
        tokens_BL = check_tokens(tokens_BL, shape, self.var.config.vocab_size, "forced_logits").to(
            self.device
        )
        schedule = self.var.schedule(depth, bridge)
        run = self._start(labels_B, schedule, False, self._weights(), self._kernels(kv_wanted))
        return force(run, tokens_BL)

    @_in_its_own_dtype
    @torch.no_grad()
    def generate(
        self,
        labels: int | Sequence[int] | Tensor,
        *,
        depth: int | Sequence[int] | None = None,
        bridge: int | None = None,
        cfg: float = 1.5,
        top_k: int = 0,
        top_p: float = 0.0,
        seed: int | None = None,
        image_ids: Sequence[int] | Tensor | None = None,
        generator: torch.Generator | None = None,
        max_batch: int | None = None,
        on_scale: OnScale | None = None,
        decode: bool = True,
        kv_dtype: KVDtype = None,
    ) -> Generation:
        """Paint one image per label.

        Args:
            labels: classes in [0, num_classes).
            depth: layers in the flexible zone, as a number or a list; None runs every layer.
            bridge: first scales that run every layer; None is the config's bridge.
            cfg: classifier-free guidance; its weight rises linearly from 0 to cfg over the scales.
            top_k, top_p: filters of ``sample_tokens``; 0 keeps all.
            seed: same seed and image id, same tokens, whatever the batch, unless two are so near
                that the last bits of a matrix product, which may depend on the batch, decide; None
                draws a seed.
            image_ids: which image of the seed each label is; None is 0..B-1.
            generator: draw as ``torch.multinomial`` does, like the original code; excludes seed.
                The draws depend on how a request is split, so name ``max_batch`` with it.
            max_batch: images at once; None is as many as free memory holds by the plan.
            on_scale: called as ``on_scale(k, partial)`` after each scale of each part; may return
                a shallower depth for the scales that follow (from ``bridge`` on at the earliest).
            decode: False leaves the images out, (0, 3, H, W); :meth:`decode` makes them later.
            kv_dtype: "fp8" keeps K and V of this call in 8 bits; None is the engine's own.
        Returns:
            :class:`Generation`.
        Raises:
            ValueError: an argument out of range.  MemoryError: not even one image fits.
        """
        started = self._clock()
        kv_wanted = self._kv_dtype("generate", kv_dtype)
        labels_B = check_labels(labels, self.var.config.num_classes)
        sampling = Sampling(cfg, top_k, top_p, seed, generator)
        schedule = self.var.schedule(depth, bridge)
        image_ids_B = check_image_ids(image_ids, len(labels_B), self.device)
        weights = self._weights()  # cast now: copies must not be counted as free memory
        batch = self._batch_size(len(labels_B), schedule, sampling.guided, max_batch, kv_wanted)
        parts: list[tuple[Tensor, Tensor, Stats]] = []
        for first in range(0, len(labels_B), batch):
            part = slice(first, first + batch)
            parts.append(
                self._generate_part(
                    labels_B[part],
                    image_ids_B[part],
                    schedule,
                    sampling,
                    weights,
                    on_scale=on_scale,
                    first_flexible=self._bridge(bridge),
                    decode=decode,
                    kv_dtype=kv_wanted,
                )
            )
        first_stats = parts[0][2]
        stats = Stats(
            seconds=self._clock() - started,
            decode_seconds=sum(stats.decode_seconds for _, _, stats in parts),
            batches=len(parts),
            depths=parts[-1][2].depths,
            dtype=first_stats.dtype,
            kv_dtype=first_stats.kv_dtype,
            packed=first_stats.packed,
            captured=first_stats.captured,
            kv_planned_bytes=first_stats.kv_planned_bytes,
            kv_allocated_bytes=first_stats.kv_allocated_bytes,
            kv_peak_bytes=max(stats.kv_peak_bytes for _, _, stats in parts),
            kv_paper_bytes=first_stats.kv_paper_bytes,
        )
        images = torch.cat([images for images, _, _ in parts])
        return Generation(images, torch.cat([tokens for _, tokens, _ in parts]), stats)

    @_in_its_own_dtype
    @torch.no_grad()
    def decode(self, tokens_BL: Tensor) -> Tensor:
        """Images of given tokens by the engine's decoder, in its dtype.

        Args:
            tokens_BL: (B, L) int64.
        Returns:
            (B, 3, H, W) float32 in [0, 1].
        Raises:
            ValueError: tokens of a wrong shape, or (on CPU) outside [0, vocab_size).
        """
        layout, vocab = self.var.layout, self.var.config.vocab_size
        shape = (len(tokens_BL), layout.total)
        tokens_BL = check_tokens(tokens_BL, shape, vocab, "decode").to(self.device)
        f_hat_BEHW = self.vae.new_features(len(tokens_BL))
        for k in range(layout.num_scales):
            self.vae.accumulate(f_hat_BEHW, tokens_BL[:, layout.slice(k)], k)
        return self._decode(self._weights(), f_hat_BEHW)

    # --- parts of generate ----------------------------------------------------------------------

    def _generate_part(
        self,
        labels_B: Tensor,
        image_ids_B: Tensor,
        schedule: DepthSchedule,
        sampling: Sampling,
        weights: EngineWeights,
        *,
        on_scale: OnScale | None,
        first_flexible: int,
        decode: bool,
        kv_dtype: torch.dtype | None,
    ) -> tuple[Tensor, Tensor, Stats]:
        started = self._clock()
        kernels = self._kernels(kv_dtype)
        draws = Draws(
            image_ids_B=image_ids_B,
            cfg=sampling.cfg,
            seed=sampling.seed or 0,
            guided=sampling.guided,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            generator=sampling.generator,
        )
        captures = self._captures_for(weights, kernels)
        captured = captures is not None and on_scale is None and draws.generator is None
        if captures is not None and captured:
            painted = self._replay(captures, labels_B, draws, schedule, weights, kernels)
        else:
            painted = self._paint(
                self._start(labels_B, schedule, draws.guided, weights, kernels),
                draws,
                on_scale,
                first_flexible,
            )
        decoding = self._clock()
        size = self.vae.config.image_size
        images = torch.empty(0, 3, size, size, device=self.device)
        if decode:
            images = self._decode(weights, painted.f_hat_BEHW, captures)
        ended = self._clock()
        plan = _plan(self.var.layout, schedule, self.page_size)
        config, batch = self.var.config, len(labels_B)
        heads, head_dim = config.num_heads, config.head_dim
        width = torch.empty((), dtype=self.dtype).itemsize
        stats = Stats(
            seconds=ended - started,
            decode_seconds=ended - decoding,
            batches=1,
            depths=painted.schedule.depths,
            dtype=dtype_name(self.dtype),
            kv_dtype=dtype_name(kernels.pages_dtype),
            packed=weights.packed,
            captured=captured,
            kv_planned_bytes=plan.peak_bytes(
                batch, heads, head_dim, kernels.pages_dtype, draws.guided
            ),
            kv_allocated_bytes=painted.allocated_bytes,
            kv_peak_bytes=painted.peak_bytes,
            kv_paper_bytes=plan.paper_bytes(
                batch, heads, head_dim, k_bytes=width, v_bytes=width, guidance=draws.guided
            ),
        )
        return images, painted.tokens_BL, stats

    def _paint(
        self,
        run: Run,
        draws: Draws,
        on_scale: OnScale | None = None,
        first_flexible: int = 0,
    ) -> _Painted:
        layout = self.var.layout

        def after_scale(k: int, tokens_BL: Tensor, f_hat_BEHW: Tensor) -> None:
            assert on_scale is not None
            wanted = on_scale(k, self._partial(run.weights, k, tokens_BL, f_hat_BEHW))
            if wanted is not None and k + 1 < layout.num_scales:
                run.switch(max(k + 1, first_flexible), self.var.layers_of(wanted))

        tokens_BL, f_hat_BEHW = paint(run, draws, None if on_scale is None else after_scale)
        cache = run.cache
        return _Painted(
            tokens_BL, f_hat_BEHW, run.schedule, cache.allocated_bytes, cache.peak_bytes
        )

    def _replay(
        self,
        captures: Captures,
        labels_B: Tensor,
        draws: Draws,
        schedule: DepthSchedule,
        weights: EngineWeights,
        kernels: Kernels,
    ) -> _Painted:
        """:meth:`_paint` by a graph; recorded when the schedule is first met."""
        names = tuple(kernels.names.values())
        key = (schedule.layers, self.page_size, len(labels_B), draws.guided)
        key = (*key, draws.top_k, draws.top_p, names, kernels.pages_dtype)
        steps = self._steps(schedule, len(labels_B) * (2 if draws.guided else 1))

        def whole(labels_B: Tensor, image_ids_B: Tensor, cfg: Tensor, seed: Tensor) -> Tensors:
            run = self._start(labels_B, schedule, draws.guided, weights, kernels, steps)
            painted = self._paint(run, replace(draws, image_ids_B=image_ids_B, cfg=cfg, seed=seed))
            self._kv_bytes[key] = painted.allocated_bytes, painted.peak_bytes
            return painted.tokens_BL, painted.f_hat_BEHW

        # full() is a launch: a tensor made from a number would be copied, and the copy waited for.
        tokens_BL, f_hat_BEHW = captures.run(
            ("paint", key),
            whole,
            labels_B.to(self.device, non_blocking=True),
            draws.image_ids_B,
            torch.full((), float(draws.cfg), dtype=torch.float64, device=self.device),
            torch.full((), int(draws.seed), dtype=torch.int64, device=self.device),
        )
        return _Painted(tokens_BL, f_hat_BEHW, schedule, *self._kv_bytes[key])

    def _clock(self) -> float:
        """Seconds; work queued on a GPU counts as done only when it is."""
        if self.device.type == "cuda":
            # Not for the device: while another thread captures, that is an error.
            done = torch.cuda.Event()
            done.record(torch.cuda.current_stream(self.device))
            done.synchronize()
        return time.perf_counter()

    @_in_its_own_dtype
    @torch.no_grad()
    def _decode(
        self, weights: EngineWeights, f_hat_BEHW: Tensor, captures: Captures | None = None
    ) -> Tensor:
        """(B, 3, H, W) float32 in [0, 1]; one channel is shown as grey."""

        def whole(f_hat_BEHW: Tensor) -> Tensors:
            return (weights.decode(f_hat_BEHW).expand(-1, 3, -1, -1).contiguous(),)

        if captures is None:
            return whole(f_hat_BEHW)[0]
        return captures.run(("decode", tuple(f_hat_BEHW.shape)), whole, f_hat_BEHW)[0]

    def _partial(
        self, weights: EngineWeights, scale: int, tokens_BL: Tensor, f_hat: Tensor
    ) -> PartialResult:
        so_far, features = tokens_BL[:, : self.var.layout.visible(scale)].clone(), f_hat.clone()
        return PartialResult(scale, so_far, lambda: self._decode(weights, features))

    def _bridge(self, bridge: int | None) -> int:
        return bridge if bridge is not None else (self.var.config.bridge or 0)

    def _batch_size(
        self,
        count: int,
        schedule: DepthSchedule,
        guidance: bool,
        max_batch: int | None,
        kv_dtype: torch.dtype | None,
    ) -> int:
        """Images at once: what was asked for, within what free memory holds."""
        if max_batch is not None and not (isinstance(max_batch, int) and max_batch >= 1):
            raise ValueError(f"generate: max_batch must be an integer >= 1; got {max_batch!r}")
        plan = _plan(self.var.layout, schedule, self.page_size)
        one, always = self.image_bytes(plan, guidance, kv_dtype), self.decoder_bytes()
        free = free_bytes(self.device)
        fits = (free - always) // one
        wanted = min(count, max_batch or count)
        if fits < 1 or (max_batch is not None and fits < wanted):
            asked = wanted if max_batch else 1
            raise MemoryError(
                f"generate: {asked} image(s) at once need "
                f"{(one * asked + always) / 2**20:.0f} MiB, "
                f"but {free / 2**20:.0f} MiB are free; use a smaller depth, bridge or max_batch"
            )
        return min(wanted, fits)

    def image_bytes(self, plan: CachePlan, guidance: bool = True, kv_dtype: KVDtype = None) -> int:
        """Memory for one more image in a batch: its K/V pages and the largest step's tensors."""
        config, item = self.var.config, torch.empty((), dtype=self.dtype).itemsize
        kernels = self._kernels(self._kv_dtype("image_bytes", kv_dtype))
        kv = plan.peak_bytes(1, config.num_heads, config.head_dim, kernels.pages_dtype, guidance)
        tokens = max(self.var.layout.tokens) * (2 if guidance else 1)
        hidden = round(config.embed_dim * config.mlp_ratio)
        # Residual stream before and after (float32), packed projection, q, k and attention's
        # output, the MLP's two hidden tensors; or the logits, twice in float32.
        layer = tokens * (8 * config.embed_dim + (7 * config.embed_dim + 2 * hidden) * item)
        logits = tokens * config.vocab_size * (item + 8)
        if kernels.gathers_pages:
            # Plain torch gathers all visible K and V in float32 and holds every score.
            total, heads = self.var.layout.total, config.num_heads
            rows = 2 if guidance else 1
            layer += 4 * rows * total * 2 * config.embed_dim + 8 * heads * tokens * total
        decoder = 0 if self.packed else self._decoder_image_bytes()
        return kv + max(layer, logits, decoder)

    def decoder_bytes(self) -> int:
        """What decoding takes whatever the batch: packed decoders paint one image at a time."""
        return self._decoder_image_bytes() if self.packed else 0

    def _decoder_image_bytes(self) -> int:
        return self.vae.config.image_size**2 * self.vae.config.ch * 4 * 6


def check_pair(var: VAR, vae: VQVAE) -> None:
    """The transformer predicts what the VQ-VAE decodes."""
    a, b = var.config, vae.config
    for what, ours, theirs in (
        ("patch_nums", a.patch_nums, b.patch_nums),
        ("vocab_size", a.vocab_size, b.vocab_size),
        ("vae_channels / z_channels", a.vae_channels, b.z_channels),
    ):
        if ours != theirs:
            raise ValueError(
                f"VARiant: the transformer and the VQ-VAE must agree on {what}; "
                f"got {ours} and {theirs}"
            )
