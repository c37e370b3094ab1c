"""Generation with a paged cache: the step loop, its weights and its memory.

The modules of ``transformer.py`` are written for training; here the same weights run one scale at
a time, and only the layers that the schedule names.

Axes: B images, R sequences (B, or 2B with guidance: conditional rows first), T tokens of this
scale, L tokens of all scales, C width, H heads, D width of one head, V codebook entries, 6 the
rows of an adaptive layer norm (gates, scales, shifts; each of attention, then of the MLP).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock

import torch
from torch import Tensor

from variant.memory import free_bytes
from variant.sampling import (
    Generation,
    OnScale,
    PartialResult,
    Sampling,
    Stats,
    check_image_ids,
    check_labels,
    check_tokens,
)
from variant.transformer import VAR
from variant.vqvae import VQVAE
from variant.weights import EngineWeights, LayerWeights
from variant_kernels import CachePlan, DepthSchedule, KVStep, PagedKVCache
from variant_kernels.backends import Impl, Request, choose, dtype_name
from variant_kernels.ops import tables
from variant_kernels.ops.sample_tokens import draw_exponential

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class _Kernels:
    """The launchers of one backend choice, called without the checks of the public functions."""

    def __init__(self, backend: str, device: str, dtype: torch.dtype) -> None:
        found = tables()

        def pick(op: str, *dtypes: torch.dtype) -> Impl:
            return choose(op, found[op], backend, Request(device, dtypes))

        # The residual stream is float32, whatever the engine's dtype.
        self.adaln = pick("adaln_modulate", torch.float32, dtype).forward
        self.gated_adaln = pick("gated_residual_adaln", torch.float32, dtype).forward
        self.norm_append = pick("qk_norm_append_paged_kv", dtype, torch.float32).forward
        attention = pick("paged_attention", dtype)
        self.attention = attention.forward
        self.gathers_pages = attention is found["paged_attention"]["reference"]
        self.sample = pick("sample_tokens", dtype).forward


@dataclass
class _Run:
    """One batch in flight. rows_6RC: per layer the six modulation rows; head_2RC: the head's.

    Kernels and weights are chosen when it starts: whatever another thread or a callback does with
    the engine, this run goes on as it began.
    """

    kernels: _Kernels
    weights: EngineWeights
    schedule: DepthSchedule
    cache: PagedKVCache
    rows_6RC: list[tuple[Tensor, ...]]
    head_2RC: tuple[Tensor, ...]


class Engine:
    """Generates with one VAR and its VQ-VAE at any depth.

    Weights are cast once to ``dtype`` (shared where it is their own); the residual stream is
    float32 also in 16-bit engines. Weights changed in place (by an optimiser, by
    ``load_state_dict``) are noticed at the next call; after changes through ``.data`` call
    :meth:`refresh`.

    Args:
        var, vae: the models; same codebook and layout.
        dtype: of weights, K/V and matrix products; None is the weights' own.
        backend: of the kernels; "auto" takes the fastest.
        page_size: tokens per cache page.
        pack: on a CPU keep a second copy of the weights, in the order that oneDNN computes with
            (:mod:`variant.packing`): faster; False saves that memory.
    Raises:
        ValueError: the two models do not fit each other, or the backend cannot serve the dtype.
    """

    def __init__(
        self,
        var: VAR,
        vae: VQVAE,
        *,
        dtype: torch.dtype | None = None,
        backend: str = "auto",
        page_size: int = 16,
        pack: bool = True,
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
        self.backend = backend
        self.pack = pack
        self._lock = Lock()
        self._cast: tuple[tuple[tuple[int, int], ...], EngineWeights] | None = None
        self._kernels()  # a backend that cannot serve the dtype is refused here

    def __getstate__(self) -> dict[str, object]:
        """Without the lock and the cast weights, so that a used model can be pickled."""
        return {**self.__dict__, "_lock": None, "_cast": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state, _lock=Lock())

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.var.head.weight.device

    # --- weights --------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Cast the weights anew at the next call; needed only after a change through ``.data``."""
        with self._lock:
            self._cast = None

    def _weights(self) -> EngineWeights:
        """The weights in the engine's dtype, cast again if any changed since the last call."""
        tensors = [*self.var.parameters(), *self.var.buffers(), *self.vae.parameters()]
        fingerprint = tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)
        with self._lock:
            if self._cast is None or self._cast[0] != fingerprint:
                self._cast = (
                    fingerprint,
                    EngineWeights(self.var, self.vae, self.dtype, self.pack),
                )
            return self._cast[1]

    def _kernels(self) -> _Kernels:
        # Chosen per call: use_backend and VARIANT_BACKEND count.
        return _Kernels(self.backend, self.device.type, self.dtype)

    # --- one scale ------------------------------------------------------------------------------

    def _attention(self, run: _Run, layer: LayerWeights, h_RTC: Tensor, step: KVStep) -> Tensor:
        kernels, cache, config = run.kernels, run.cache, self.var.config
        rows, tokens, width = h_RTC.shape
        q_RTHD = kernels.norm_append(
            qkv_BT3HD=layer.qkv(h_RTC).view(rows, tokens, 3, config.num_heads, -1),
            scale_mul_1H11=layer.scale_mul_1H11,
            k_pages_PNHD=cache.k_pages,
            v_pages_PNHD=cache.v_pages,
            slots_BT=step.slots_BT,
        )
        out_RTHD = kernels.attention(
            q_BTHD=q_RTHD,
            k_pages_PNHD=cache.k_pages,
            v_pages_PNHD=cache.v_pages,
            page_table_BM=step.page_table_BM,
            kv_lens_B=step.kv_lens_B,
            softmax_scale=layer.softmax_scale,
        )
        return layer.proj(out_RTHD.view(rows, tokens, width))

    def _hidden(self, run: _Run, x_RTC: Tensor, scale: int) -> Tensor:
        """Tokens of one scale through its active layers and the head's norm, (R, T, C)."""
        kernels, eps = run.kernels, self.var.config.norm_eps
        active = run.schedule.active_layers(scale)
        _, _, scale1, _, shift1, _ = run.rows_6RC[active[0]]
        h_RTC, _, _ = kernels.adaln(x_BTC=x_RTC, scale_BC=scale1, shift_BC=shift1, eps=eps)
        for index, following in zip(active, (*active[1:], None), strict=True):
            layer = run.weights.layers[index]
            gate1, gate2, _, scale2, _, shift2 = run.rows_6RC[index]
            step = run.cache.open(index, scale)
            y_RTC = self._attention(run, layer, h_RTC, step)
            run.cache.close(index, scale)
            x_RTC, h_RTC, _, _ = kernels.gated_adaln(
                x_BTC=x_RTC, y_BTC=y_RTC, gate_BC=gate1, scale_BC=scale2, shift_BC=shift2, eps=eps
            )
            y_RTC = layer.mlp(h_RTC)
            if following is None:
                next_scale, next_shift = run.head_2RC
            else:
                _, _, next_scale, _, next_shift, _ = run.rows_6RC[following]
            x_RTC, h_RTC, _, _ = kernels.gated_adaln(
                x_BTC=x_RTC,
                y_BTC=y_RTC,
                gate_BC=gate2,
                scale_BC=next_scale,
                shift_BC=next_shift,
                eps=eps,
            )
        return h_RTC

    def _input(self, run: _Run, words_BTE: Tensor | None, cond_RC: Tensor, scale: int) -> Tensor:
        """Residual stream at the start of a scale, (R, T, C) float32."""
        weights = run.weights
        place_1TC = weights.position_1LC[:, self.var.layout.slice(scale)]
        if words_BTE is None:
            return cond_RC.float().unsqueeze(1) + weights.pos_start + place_1TC
        words_BTC = weights.word_embed(words_BTE) + place_1TC
        return words_BTC.repeat(cond_RC.shape[0] // words_BTC.shape[0], 1, 1)

    def _start(
        self, labels_B: Tensor, schedule: DepthSchedule, guidance: bool
    ) -> tuple[_Run, Tensor]:
        kernels, weights = self._kernels(), self._weights()
        device, config = self.device, self.var.config
        labels_R = labels_B.to(device)
        if guidance:
            labels_R = torch.cat((labels_R, torch.full_like(labels_R, config.num_classes)))
        cond_RC = self.var.class_emb(labels_R)
        rows_6RC, head_2RC = weights.modulations(cond_RC)
        plan = CachePlan(self.var.layout, schedule, self.page_size)
        cache = PagedKVCache(
            plan, len(labels_R), config.num_heads, config.head_dim, self.dtype, device
        )
        return _Run(kernels, weights, schedule, cache, rows_6RC, head_2RC), cond_RC

    # --- public ---------------------------------------------------------------------------------

    @torch.no_grad()
    def forced_logits(
        self,
        labels_B: Tensor,
        tokens_BL: Tensor,
        *,
        depth: int | Sequence[int] | None = None,
        bridge: int | None = None,
    ) -> Tensor:
        """Logits of the cached, paged path when it is fed with given tokens.

        The conditional half only; equals ``VAR.forward(labels, vae.teacher_input(tokens))`` up to
        rounding.

        Args:
            labels_B: (B,) int64.  tokens_BL: (B, L) int64.  depth, bridge: as in ``generate``.
        Returns:
            (B, L, V) float32.
        """
        labels_B = check_labels(labels_B, self.var.config.num_classes, "forced_logits")
        layout = self.var.layout
        tokens_BL = check_tokens(
            tokens_BL, (len(labels_B), layout.total), self.var.config.vocab_size
        ).to(self.device)
        run, cond_BC = self._start(labels_B, self.var.schedule(depth, bridge), guidance=False)
        f_hat = self.vae.new_features(len(labels_B))
        logits, following = [], None
        for k in range(layout.num_scales):
            h_BTC = self._hidden(run, self._input(run, following, cond_BC, k), k)
            logits.append(run.weights.head(h_BTC).float())
            f_hat = self.vae.accumulate(f_hat, tokens_BL[:, layout.slice(k)], k)
            if k + 1 < layout.num_scales:
                following = self.vae.next_scale_input(f_hat, k)
        return torch.cat(logits, dim=1)

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
    ) -> Generation:
        """Paint one image per label.

        Args:
            labels: classes in [0, num_classes).
            depth: layers in the flexible zone, as a number or a list; None runs every layer.
            bridge: first scales that run every layer; None is the config's bridge.
            cfg: classifier-free guidance; its weight rises linearly from 0 to cfg over the scales.
            top_k, top_p: filters of ``sample_tokens``; 0 keeps all.
            seed: same seed and image id, same tokens, whatever the batch; None draws a seed.
            image_ids: which image of the seed each label is; None is 0..B-1.
            generator: draw as ``torch.multinomial`` does, like the original code; excludes seed.
                The draws depend on how a request is split, so name ``max_batch`` with it.
            max_batch: images at once; None is as many as free memory holds by the plan.
            on_scale: called as ``on_scale(k, partial)`` after each scale of each part; may return
                a shallower depth for the scales that follow (from ``bridge`` on at the earliest).
        Returns:
            :class:`Generation`.
        Raises:
            ValueError: an argument out of range.  MemoryError: not even one image fits.
        """
        started = self._clock()
        labels_B = check_labels(labels, self.var.config.num_classes)
        sampling = Sampling(cfg, top_k, top_p, seed, generator)
        schedule = self.var.schedule(depth, bridge)
        image_ids_B = check_image_ids(image_ids, len(labels_B), self.device)
        batch = self._batch_size(len(labels_B), schedule, sampling.guided, max_batch)
        parts: list[tuple[Tensor, Tensor, Stats]] = []
        for first in range(0, len(labels_B), batch):
            part = slice(first, first + batch)
            parts.append(
                self._generate_part(
                    labels_B[part],
                    image_ids_B[part],
                    schedule,
                    sampling,
                    on_scale=on_scale,
                    first_flexible=self._bridge(bridge),
                )
            )
        first_stats = parts[0][2]
        stats = Stats(
            seconds=self._clock() - started,
            decode_seconds=sum(stats.decode_seconds for _, _, stats in parts),
            batches=len(parts),
            depths=parts[-1][2].depths,
            dtype=first_stats.dtype,
            packed=first_stats.packed,
            kv_planned_bytes=first_stats.kv_planned_bytes,
            kv_allocated_bytes=first_stats.kv_allocated_bytes,
            kv_peak_bytes=max(stats.kv_peak_bytes for _, _, stats in parts),
            kv_paper_bytes=first_stats.kv_paper_bytes,
        )
        images = torch.cat([images for images, _, _ in parts])
        return Generation(images, torch.cat([tokens for _, tokens, _ in parts]), stats)

    # --- parts of generate ----------------------------------------------------------------------

    def _generate_part(
        self,
        labels_B: Tensor,
        image_ids_B: Tensor,
        schedule: DepthSchedule,
        sampling: Sampling,
        *,
        on_scale: OnScale | None,
        first_flexible: int,
    ) -> tuple[Tensor, Tensor, Stats]:
        started = self._clock()
        layout, config, batch = self.var.layout, self.var.config, len(labels_B)
        run, cond_RC = self._start(labels_B, schedule, guidance=sampling.guided)
        f_hat = self.vae.new_features(batch)
        tokens_BL = torch.empty(batch, layout.total, dtype=torch.int64, device=self.device)
        following = None
        for k in range(layout.num_scales):
            h_RTC = self._hidden(run, self._input(run, following, cond_RC, k), k)
            tokens_BT = self._sample(run, h_RTC, k, sampling, image_ids_B)
            tokens_BL[:, layout.slice(k)] = tokens_BT
            f_hat = self.vae.accumulate(f_hat, tokens_BT, k)
            if k + 1 < layout.num_scales:
                following = self.vae.next_scale_input(f_hat, k)
            if on_scale is not None:
                wanted = on_scale(k, self._partial(run.weights, k, tokens_BL, f_hat))
                if wanted is not None and k + 1 < layout.num_scales:
                    self._switch(run, max(k + 1, first_flexible), wanted)
        decoding = self._clock()
        images = self._decode(run.weights, f_hat)
        ended = self._clock()
        plan, guided = run.cache.plan, sampling.guided
        heads, head_dim = config.num_heads, config.head_dim
        width = torch.empty((), dtype=self.dtype).itemsize
        stats = Stats(
            seconds=ended - started,
            decode_seconds=ended - decoding,
            batches=1,
            depths=run.schedule.depths,
            dtype=dtype_name(self.dtype),
            packed=run.weights.packed,
            kv_planned_bytes=plan.peak_bytes(batch, heads, head_dim, self.dtype, guided),
            kv_allocated_bytes=run.cache.allocated_bytes,
            kv_peak_bytes=run.cache.peak_bytes,
            kv_paper_bytes=plan.paper_bytes(
                batch, heads, head_dim, k_bytes=width, v_bytes=width, guidance=guided
            ),
        )
        return images, tokens_BL, stats

    def _sample(
        self, run: _Run, h_RTC: Tensor, scale: int, sampling: Sampling, image_ids_B: Tensor
    ) -> Tensor:
        layout = self.var.layout
        guidance = sampling.guidance(scale, layout.num_scales)
        if guidance == 0:
            # Unconditional rows would count nothing: their head is not computed.
            logits_BTV = run.weights.head(h_RTC[: len(image_ids_B)])
            logits_2BTV = logits_BTV.repeat(2, 1, 1)
        else:
            logits_2BTV = run.weights.head(h_RTC)
        generator, exponential_RV = sampling.generator, None
        if generator is not None:
            exponential_RV = draw_exponential(logits_2BTV, generator)
        return run.kernels.sample(
            logits_2BTV=logits_2BTV,
            guidance=guidance,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            seed=sampling.seed or 0,
            image_ids_B=image_ids_B,
            position=layout.offsets[scale],
            exponential_RV=exponential_RV,
        )

    def _clock(self) -> float:
        """Seconds; work queued on a GPU counts as done only when it is."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @torch.no_grad()
    def _decode(self, weights: EngineWeights, f_hat: Tensor) -> Tensor:
        """(B, 3, H, W) float32 in [0, 1]; one channel is shown as grey."""
        return weights.decode(f_hat).expand(-1, 3, -1, -1).contiguous()

    def _partial(
        self, weights: EngineWeights, scale: int, tokens_BL: Tensor, f_hat: Tensor
    ) -> PartialResult:
        so_far, features = tokens_BL[:, : self.var.layout.visible(scale)].clone(), f_hat.clone()
        return PartialResult(scale, so_far, lambda: self._decode(weights, features))

    def _switch(self, run: _Run, scale: int, depth: int | Sequence[int]) -> None:
        if scale < self.var.layout.num_scales:
            run.schedule = run.schedule.switched(scale, self.var.layers_of(depth))
            run.cache.switch(run.schedule)

    def _bridge(self, bridge: int | None) -> int:
        return bridge if bridge is not None else (self.var.config.bridge or 0)

    def _batch_size(
        self, count: int, schedule: DepthSchedule, guidance: bool, max_batch: int | None
    ) -> int:
        """Images at once: what was asked for, within what free memory holds."""
        if max_batch is not None and not (isinstance(max_batch, int) and max_batch >= 1):
            raise ValueError(f"generate: max_batch must be an integer >= 1; got {max_batch!r}")
        self._weights()  # cast now: copies must not be counted as free memory
        plan = CachePlan(self.var.layout, schedule, self.page_size)
        one, always = self.image_bytes(plan, guidance), self.decoder_bytes()
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

    def image_bytes(self, plan: CachePlan, guidance: bool = True) -> int:
        """Memory for one more image in a batch: its K/V pages and the largest step's tensors."""
        config, item = self.var.config, torch.empty((), dtype=self.dtype).itemsize
        kv = plan.peak_bytes(1, config.num_heads, config.head_dim, self.dtype, guidance)
        tokens = max(self.var.layout.tokens) * (2 if guidance else 1)
        hidden = round(config.embed_dim * config.mlp_ratio)
        # Residual stream before and after (float32), packed projection, q, k and attention's
        # output, the MLP's two hidden tensors; or the logits, twice in float32.
        layer = tokens * (8 * config.embed_dim + (7 * config.embed_dim + 2 * hidden) * item)
        logits = tokens * config.vocab_size * (item + 8)
        if self._kernels().gathers_pages:
            # Plain torch gathers all visible K and V in float32 and holds every score.
            total, heads = self.var.layout.total, config.num_heads
            rows = 2 if guidance else 1
            layer += 4 * rows * total * 2 * config.embed_dim + 8 * heads * tokens * total
        decoder = 0 if self._weights().packed else self._decoder_image_bytes()
        return kv + max(layer, logits, decoder)

    def decoder_bytes(self) -> int:
        """What decoding takes whatever the batch: packed decoders paint one image at a time."""
        return self._decoder_image_bytes() if self._weights().packed else 0

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
