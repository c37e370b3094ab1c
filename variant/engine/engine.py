"""The engine: generation at any depth from one set of weights.

The step loop is in ``step_loop.py``, one batch in ``batches.py``, graphs in ``graph_replay.py``,
memory in ``memory.py``.

Axes: B images, L tokens of all scales, V codebook entries, E codebook vector width, H W the feature
map (of images: pixels).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Unpack, cast

import torch
from torch import Tensor

from variant.engine import memory
from variant.engine.arguments import (
    Labels,
    check_given,
    check_image_ids,
    check_labels,
    check_tokens,
)
from variant.engine.batches import (
    Batch,
    BatchRunner,
    Request,
    cache_plan,
    can_be_captured,
    check_pixels,
    decode_rgb,
    without_autocast,
)
from variant.engine.cast_models import CastModels, check_pair, without_graphs_if_full
from variant.engine.cuda_graphs import GraphCache, GraphRecorder, Recorder
from variant.engine.drawing import extra_logit_bytes
from variant.engine.generation import Generation, PerScale, Sampling
from variant.engine.graph_replay import GraphReplay
from variant.engine.images import check_image_dtype
from variant.engine.kernels import Launchers
from variant.engine.kv_dtype import KVDtype, check_kv_dtype
from variant.engine.memory import free_bytes, largest_batch
from variant.engine.runs import Call, CallOptions, Current, Run, Source
from variant.engine.step_loop import teacher_forced_logits
from variant.engine.weights import EngineWeights
from variant.models.config import VARConfig
from variant.models.parts import explained, head_weight
from variant.models.placement import DTYPES, check_dtype
from variant.models.var import VAR
from variant.models.vqvae import ENCODER, VQVAE
from variant_kernels import CachePlan, DepthSchedule
from variant_kernels.arguments import boolean, instance, integer
from variant_kernels.dispatch.request import dtype_name
from variant_kernels.dispatch.select import check_name
from variant_kernels.integrations.alterations import global_hooks
from variant_kernels.untraced import untraced


def new_recorder(device: torch.device) -> Recorder | None:
    """A recorder of CUDA graphs; None where the device has no graphs."""
    return GraphRecorder(device) if device.type == "cuda" else None


class Engine(CastModels):
    """Generates with one VAR and its VQ-VAE at any depth.

    Weights are cast once to ``dtype`` (shared where they have it already); the residual stream is
    float32 also in 16-bit engines. A caller's autocast has no effect. Weights that changed (those
    made under ``torch.inference_mode()`` are read for that at each call) are cast again at the next
    call, but after changes that torch does not record (:meth:`refresh`), as in place by ``.data``.
    ``torch.compile`` does not trace calls: kernels are compiled before.

    Args:
        var, vae: the models; same codebook and layout.
        dtype: of weights, K/V and matrix products: float32, bfloat16 or float16, or its name;
            None is the dtype of the weights. On a CPU in float16, and in bfloat16 where its
            products are not native (AVX-512 BF16 or AMX), K and V are stored in it, and weights and
            products are float32, which is faster there; the engine warns once.
        backend: of the kernels; "auto" takes the fastest that can run.
        page_size: tokens per cache page.
        kv_dtype: of K and V; None is exact: ``dtype``. "fp8" (or torch.float8_e4m3fn) stores 8 bits
            and one scale per token and head: about half the cache of a 16-bit engine, at an error
            that :mod:`variant.evaluation.kv_error` measures. A single call may ask for it too.
        pack: on a CPU, keep a second copy of the weights in oneDNN's blocked layout
            (:mod:`variant.engine.packed_layers`): faster; False saves that memory.
        capture: on a GPU, record one CUDA graph per batch size and schedule at its first use and
            replay it afterwards (:mod:`variant.engine.graph_replay`); False launches every kernel
            from Python. Calls with ``on_scale`` or ``generator`` are never recorded.
    Raises:
        TypeError: a model is of another class, or a part that is read was removed or replaced.
        ValueError: the two models do not fit each other, a part has other tensors than the config
            asks for, a weight is on the meta device, or the backend cannot run these dtypes.
    """

    def __init__(
        self,
        var: VAR,
        vae: VQVAE,
        *,
        dtype: torch.dtype | str | None = None,
        backend: str = "auto",
        page_size: int = 16,
        kv_dtype: KVDtype = None,
        pack: bool = True,
        capture: bool = True,
    ) -> None:
        check_pair(var, vae, "Engine")
        check_name("Engine", backend)
        dtype = check_engine_dtype("Engine", dtype, var)
        super().__init__(var, vae, dtype, boolean("Engine", "pack", pack))
        self.page_size = integer("Engine", "page_size", page_size, 1)
        self.kv_dtype = check_kv_dtype("Engine", kv_dtype)
        self.backend, self.capture = backend, boolean("Engine", "capture", capture)
        self._launchers(self.kv_dtype)  # raises where the backend cannot run these dtypes

    # --- launchers, graphs ----------------------------------------------------------------------

    def _launchers(self, kv_dtype: torch.dtype | None) -> Launchers:
        # Chosen at each call, because use_backend and VARIANT_BACKEND may have changed.
        return Launchers(
            self.backend,
            self.device.type,
            self.dtype,
            self.product_dtype,
            self.var,
            self.page_size,
            kv_dtype,
        )

    def _kv_dtype(self, op: str, kv_dtype: KVDtype) -> torch.dtype | None:
        """The K/V dtype of one call; None is the engine's own."""
        return check_kv_dtype(op, kv_dtype) or self.kv_dtype

    def _graphs_for(self, runner: BatchRunner) -> GraphReplay | None:
        """The graphs recorded with the weights of ``runner``; None where graphs are not used."""
        if not self.capture or not runner.launchers.can_be_captured or global_hooks():
            return None  # a graph would not call the hooks
        with self._lock:
            if self._graphs is None or self._graphs[0] is not runner.weights:
                recorder = new_recorder(self.device)
                self._graphs = None
                if recorder is not None:
                    self._graphs = runner.weights, self._replay(recorder)
            return None if self._graphs is None else self._graphs[1]

    def _source(self, kv_dtype: torch.dtype | None) -> Source:
        """The runners of one call: one choice of launchers, the weights of each batch's start."""
        launchers = self._launchers(kv_dtype)

        def runner_of(weights: EngineWeights) -> BatchRunner:
            tables = self._page_tables
            return BatchRunner(self.var, self.vae, self.page_size, weights, launchers, tables)

        def checked() -> Current:
            runner = runner_of(self._weights())
            return runner, self._graphs_for(runner)

        def presumed() -> tuple[BatchRunner, GraphReplay] | None:
            last = self._presumed() if self.capture and launchers.can_be_captured else None
            return None if last is None else (runner_of(last[0]), last[1])

        return Source(launchers, checked, presumed, self._unchanged)

    # --- public ---------------------------------------------------------------------------------

    @without_graphs_if_full
    @without_autocast
    @torch.no_grad()
    def forced_logits(
        self,
        labels_B: Tensor,
        tokens_BL: Tensor,
        *,
        depth: int | Sequence[int] | DepthSchedule | None = None,
        bridge: int | None = None,
        kv_dtype: KVDtype = None,
    ) -> Tensor:
        """Logits of the cached, paged path for given tokens (teacher forcing).

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
        kv_dtype = self._kv_dtype("forced_logits", kv_dtype)
        labels_B = check_labels(labels_B, self.var.config, "forced_logits")
        tokens_BL = self._check_tokens("forced_logits", tokens_BL, len(labels_B))
        schedule = self.var.schedule(depth, bridge, op="forced_logits")
        with explained("Engine", self, ENCODER):
            runner, _ = self._source(kv_dtype).checked()
            state = runner.start(labels_B, schedule=schedule, guidance=False)
            return teacher_forced_logits(state, tokens_BL.to(self.device))

    @untraced
    def forced_log_probs(
        self,
        labels_B: Tensor,
        tokens_BL: Tensor,
        *,
        depth: int | Sequence[int] | DepthSchedule | None = None,
        bridge: int | None = None,
        cfg: PerScale = 0.0,
        max_batch: int | None = None,
        kv_dtype: KVDtype = None,
    ) -> Tensor:
        """Log-probability of each given token by the cached, paged path (teacher forcing).

        The log-softmax of :meth:`forced_logits` at the tokens, without guidance, temperature and
        filters. With the ``cfg`` and batches of a generation it equals that one's ``log_probs`` bit
        by bit.

        Args:
            labels_B: (B,) int64.  tokens_BL: (B, L) int64.
            cfg: above 0 unconditional sequences run too, which can only change the last bits.
            depth, bridge, max_batch, kv_dtype: as in ``generate``.
        Returns:
            (B, L) float32.
        Raises:
            TypeError, ValueError, MemoryError: as ``generate``.
        """
        op = "forced_log_probs"  # checked here, for messages that do not begin with "generate"
        labels_B = check_labels(labels_B, self.var.config, op)
        result = self.generate_with(
            labels_B,
            Sampling(cfg, seed=0),
            depth=self.var.schedule(depth, bridge, op=op),
            tokens=self._check_tokens(op, tokens_BL, len(labels_B)),
            mask=torch.ones(self.var.layout.total, dtype=torch.bool, device="cpu"),
            log_probs=True,
            max_batch=max_batch,
            decode=False,
            kv_dtype=self._kv_dtype(op, kv_dtype),
        )
        return cast("Tensor", result.log_probs)

    def generate(
        self,
        labels: Labels,
        *,
        cfg: PerScale = 1.5,
        top_k: int = 0,
        top_p: float = 0.0,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        temperature: PerScale = 1.0,
        more_smooth: bool = False,
        **options: Unpack[CallOptions],
    ) -> Generation:
        """One image per label; arguments, result and errors of ``VARiant.generate``.

        Args:
            options: the other arguments, but ``dtype``; and ``decode``: False returns no images,
                (0, 3, H, W); :meth:`decode` makes them later. ``kv_dtype`` None is the engine's.
        """
        sampling = Sampling(cfg, top_k, top_p, seed, generator, temperature, more_smooth)
        return self.generate_with(labels, sampling, **options)

    @untraced
    def generate_with(
        self,
        labels: Labels,
        sampling: Sampling,
        **options: Unpack[CallOptions],
    ) -> Generation:
        """:meth:`generate` with guidance, filters, seed and generator in one object."""
        started = time.perf_counter()
        run = self._run(labels, sampling, options)
        parts = list(run.parts())  # each is finished
        return run.generation(parts, time.perf_counter() - started)

    def generate_batches(
        self,
        labels: Labels,
        *,
        cfg: PerScale = 1.5,
        top_k: int = 0,
        top_p: float = 0.0,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        temperature: PerScale = 1.0,
        more_smooth: bool = False,
        **options: Unpack[CallOptions],
    ) -> Iterator[Generation]:
        """:meth:`generate` one batch at a time; see ``VARiant.generate_batches``."""
        sampling = Sampling(cfg, top_k, top_p, seed, generator, temperature, more_smooth)
        return self.generate_batches_with(labels, sampling, **options)

    def generate_batches_with(
        self,
        labels: Labels,
        sampling: Sampling,
        **options: Unpack[CallOptions],
    ) -> Iterator[Generation]:
        """:meth:`generate_batches` with guidance, filters, seed and generator in one object."""
        return self._run(labels, sampling, options).batches()

    @without_autocast
    @torch.no_grad()
    def _run(self, labels: Labels, sampling: Sampling, options: CallOptions) -> Run:
        """The batches of a request, none of them started; raises what ``generate`` raises."""
        call = Call.of(options)
        kv_dtype = self._kv_dtype("generate", call.kv_dtype)
        request, batch = _checked(self, labels, sampling, call)
        source, size = self._source(kv_dtype), largest_batch(len(batch.labels_B), call.max_batch)
        plan = cache_plan(self.var.layout, request.schedule, self.page_size)
        run = Run(source, [], self, plan, request, batch, size)
        if run.is_recorded():  # it fits
            return run
        first = source.checked()  # casts the weights: the copies must not count as free
        return replace(run, first=[first], size=self._fitting(run, first, call.max_batch))

    def _fitting(self, run: Run, first: Current, max_batch: int | None) -> int:
        """Images per batch that fit into memory."""
        (runner, graphs), request, count = first, run.request, len(run.whole.labels_B)
        can_switch, sampling = request.on_scale is not None, request.sampling
        runner.weights.zone_bytes(runner.zones(request.schedule, can_switch=can_switch))
        logit_bytes = extra_logit_bytes(sampling, request.log_probs)
        per_image = self._image_bytes(run.plan, runner.launchers, sampling.guided, logit_bytes)
        fixed = self.decoder_bytes()
        needed = per_image * run.size + fixed
        captured = graphs is not None and can_be_captured(request, run.whole)
        free = _available(self.device, self._recordings, needed, captured)
        return memory.batch_size(count, max_batch, per_image=per_image, fixed=fixed, available=free)

    @without_graphs_if_full
    @without_autocast
    @torch.no_grad()
    def decode(self, tokens_BL: Tensor) -> Tensor:
        """Images of given tokens by the engine's decoder, in its dtype.

        Args:
            tokens_BL: (B, L) int64.
        Returns:
            (B, 3, H, W) float32 in [0, 1].
        Raises:
            ValueError: tokens of a wrong shape, or outside [0, vocab_size).
        """
        layout, size = self.var.layout, self.vae.config.image_size
        tokens_BL = self._check_tokens("decode", tokens_BL, None).to(self.device)
        if not len(tokens_BL):
            return torch.empty(0, 3, size, size, device=self.device)
        with explained("Engine", self, ENCODER):
            f_hat_BEHW = self.vae.new_features(len(tokens_BL))
            for k in range(layout.num_scales):
                self.vae.accumulate(f_hat_BEHW, tokens_BL[:, layout.slice(k)], k)
            weights = self._weights()
            return check_pixels(decode_rgb(weights, f_hat_BEHW), weights.dtype)

    def _check_tokens(self, op: str, tokens_BL: Tensor, count: int | None) -> Tensor:
        vocab = self.var.config.vocab_size
        return check_tokens(op, "tokens_BL", tokens_BL, self.var.layout, vocab, count)

    def image_bytes(self, plan: CachePlan, guidance: bool = True, kv_dtype: KVDtype = None) -> int:
        """Bytes that one more image in a batch needs: its K/V pages and the largest tensors."""
        instance("image_bytes", "plan", plan, CachePlan)
        guidance = boolean("image_bytes", "guidance", guidance)
        launchers = self._launchers(self._kv_dtype("image_bytes", kv_dtype))
        return self._image_bytes(plan, launchers, guidance)

    def _image_bytes(
        self, plan: CachePlan, launchers: Launchers, guidance: bool, extra_logit_bytes: int = 0
    ) -> int:
        return memory.image_bytes(
            self.var.config,
            self.vae.config,
            plan,
            self.product_dtype,
            launchers,
            guidance=guidance,
            packed=self.packed,
            extra_logit_bytes=extra_logit_bytes,
        )

    def decoder_bytes(self) -> int:
        """Bytes that decoding needs at any batch size."""
        return memory.decoder_bytes(self.vae.config, packed=self.packed)


def kernels_of(engine: Engine, kv_dtype: KVDtype = None) -> dict[str, str]:
    """The backend of each op that a call takes now, where "auto" and VARIANT_BACKEND have chosen.

    Args:
        kv_dtype: of the call; None is the engine's own.
    """
    return dict(engine._launchers(engine._kv_dtype("kernels_of", kv_dtype)).names)


def _checked(
    models: CastModels, labels: Labels, sampling: Sampling, call: Call
) -> tuple[Request, Batch]:
    """A request and all its images; raises what ``generate`` raises, but MemoryError."""
    op, config, layout = "generate", models.var.config, models.var.layout
    labels_B = check_labels(labels, config)
    instance(op, "sampling", sampling, Sampling).check_run(layout.num_scales, models.device)
    request = Request(
        schedule=models.var.schedule(call.depth, call.bridge, op=op),
        sampling=sampling,
        flexible_from=_flexible_from(call, config),
        on_scale=call.on_scale,
        decode=boolean(op, "decode", call.decode),
        image_dtype=check_image_dtype(op, call.image_dtype),
        log_probs=boolean(op, "log_probs", call.log_probs),
    )
    request.check()
    count = len(labels_B)
    image_ids_B = check_image_ids(call.image_ids, count, models.device)
    given = check_given(call.tokens, call.mask, layout, config.vocab_size, count)
    return request, Batch(labels_B, image_ids_B, given)


def _flexible_from(call: Call, config: VARConfig) -> int:
    """The first scale at which ``on_scale`` can change the depth."""
    if isinstance(call.depth, DepthSchedule):  # it has no bridge
        return 0
    return int((config.bridge or 0) if call.bridge is None else call.bridge)


def _available(
    device: torch.device, recordings: GraphCache | None, needed: int, captured: bool
) -> int:
    """Bytes for a batch; drops the recordings where a batch without a graph needs their memory.

    Args:
        needed: by the largest batch that was asked for.
        captured: a graph generates the batch: it may use the memory of earlier graphs.
    """
    free = free_bytes(device)
    if recordings is None or (needed <= free and not captured):
        return free
    idle = int(recordings.idle_bytes() * memory.USABLE_SHARE)
    if captured or not idle:
        return free + idle
    recordings.clear()
    return free_bytes(device)


def check_engine_dtype(op: str, dtype: torch.dtype | str | None, var: VAR) -> torch.dtype:
    """The dtype of an engine, by itself or by name; None is that of the weights.

    Raises:
        TypeError, ValueError: see :func:`variant.models.placement.check_dtype`.
    """
    asked, weights = check_dtype(op, dtype), head_weight(op, var).dtype
    if asked is None and weights not in DTYPES:
        raise ValueError(
            f"{op}: the weights are {dtype_name(weights)}, in which no engine runs; "
            f"dtype must be one of {', '.join(map(dtype_name, DTYPES))}"
        )
    return asked or weights
