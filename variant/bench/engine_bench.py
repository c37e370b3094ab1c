"""The engine beside its peers: whole generations without the VQ-VAE decoder, interleaved.

For one model, dtype and batch one process interleaves every depth of the engine, the same matrix
products alone and every peer. The times are wall times of a user's call.
"""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from variant.bench import device, original_var, torch_baseline
from variant.bench.device import clock, peer_settings
from variant.bench.gemm_baseline import GemmsAlone
from variant.bench.interleaved import Call, Samples, SelfTimed, quartiles, ratios, time_interleaved
from variant.engine.engine import Engine
from variant.engine.generation import Generation, Stats
from variant.evaluation.kv_error import IMAGES as GREEDY_IMAGES
from variant.evaluation.kv_error import greedy_change
from variant.models.flops import attention_flop, ceiling, linear_flop, weight_bytes
from variant.models.var import VAR
from variant.models.vqvae import VQVAE
from variant.torch_modes import modes_of_a_new_process
from variant_kernels import DepthSchedule
from variant_kernels.dispatch.request import dtype_name


@dataclass(frozen=True)
class BenchConfig:
    """The settings of one set of rows."""

    batch: int
    dtype: torch.dtype
    depths: tuple[int, ...]
    bridge: int | None = None
    runs: int = 5
    cfg: float = 1.5
    top_k: int = 900
    top_p: float = 0.96
    var_repo: Path | None = None
    decoder: bool = False
    kv_dtype: str | None = None
    # Whether the plain loop runs at every depth, or at full depth only, as the original does.
    plain_depths: bool = True

    @property
    def filters(self) -> dict[str, Any]:
        """Sampling parameters of every peer."""
        return {"cfg": self.cfg, "top_k": self.top_k, "top_p": self.top_p}


@dataclass
class Timing:
    """Milliseconds per image: median and quartiles over the rounds that timed it."""

    median: float
    quartiles: tuple[float, float]
    rounds: int


@dataclass
class PeerTiming:
    """A peer beside one row of ours. ratio: the peer's time over ours.

    full_depth: the peer runs every layer, because it has no depths.
    """

    peer: str
    ms: Timing
    ratio: float
    ratio_quartiles: tuple[float, float]
    full_depth: bool


@dataclass
class KV8:
    """The engine with 8-bit K/V beside the engine with exact K/V.

    ratio: the time with exact K/V over that with 8 bits.  greedy_changed, first_scale: the share
    of greedy tokens that differ, and the first scale at which one does (None: they are equal).
    """

    ms: Timing
    ratio: float
    ratio_quartiles: tuple[float, float]
    kv_allocated_bytes: int
    kv_planned_bytes: int
    greedy_changed: float
    first_scale: int | None


@dataclass
class Row:
    """One depth at one batch and dtype.

    kv_*: bytes.  speed_up: over our own full depth; ceiling: what it were if linear work, the
    head included, took all the time.  gemms_ms: the same matrix products alone; beyond_gemms: the
    share of the time that is not spent in them.  weight_bytes: of the weights, read once by each
    product.  scale_ms: milliseconds of each scale for the whole batch.  same_tokens: whether the
    plain loop drew the same tokens (float32 only; None without a plain loop).  kv8: with 8-bit
    K/V, if requested.
    """

    depth: int
    batch: int
    dtype: str
    ms: Timing
    against: list[PeerTiming]
    kv_planned_bytes: int
    kv_allocated_bytes: int
    kv_paper_bytes: int
    speed_up: float
    ceiling: float
    gemms_ms: Timing
    beyond_gemms: float
    weight_bytes: int
    flop: int
    achieved_flops: float
    scale_ms: list[float]
    same_tokens: bool | None
    kv8: KV8 | None = None


@dataclass
class Switch:
    """The cost of a change of depth for the next image, milliseconds for the whole batch.

    ms: a generation at depth ``to`` right after one at ``depth``, less the next at ``to``.
    generation_ms: the latter.
    """

    depth: int
    to: int
    batch: int
    dtype: str
    ms: float
    quartiles: tuple[float, float]
    rounds: int
    generation_ms: float


@dataclass
class LogitsDifference:
    """Logits of the last scale for a peer's tokens, against that peer or our float32 engine.

    spread: standard deviation of the logits, for comparison.
    """

    what: str
    largest: float
    mean: float
    spread: float


class EngineComparison:
    """One model in one dtype: the engine, the peers and their shared weights."""

    def __init__(self, var: VAR, vae: VQVAE, setting: BenchConfig) -> None:
        self.var, self.vae, self.setting = var, vae, setting
        self.device = var.head.weight.device.type
        self.engine = Engine(var, vae, dtype=setting.dtype)
        # The original takes labels where its weights are.
        self.labels_B = (
            torch.arange(setting.batch, device=var.head.weight.device) % var.config.num_classes
        )
        self.seed = 0
        self.stats: dict[int, Stats] = {}
        self.kv8_stats: dict[int, Stats] = {}
        self.original = (
            None
            if setting.var_repo is None
            else original_var.load(
                setting.var_repo, var.config, vae.config, (var, vae), self.device
            )
        )

    @property
    def one_peer(self) -> bool:
        """Whether every row stands beside peers at full depth."""
        return self.original is not None or not self.setting.plain_depths

    def schedule(self, depth: int) -> DepthSchedule:
        """Layers by scale; at full depth every layer, whatever the bridge."""
        return self.var.schedule(depth, self.setting.bridge)

    # --- the calls that are interleaved ---------------------------------------------------------

    def ours(self, depth: int) -> SelfTimed:
        """Seconds of one generation."""
        self.seed += 1
        stats = self.stats[depth] = self._generate(depth, seed=self.seed).stats
        return SelfTimed(stats.seconds - stats.decode_seconds)

    def kv8(self, depth: int) -> SelfTimed:
        """Seconds of one generation with 8-bit K/V and the seed of the last exact one."""
        generation = self._generate(depth, seed=self.seed, kv_dtype=self.setting.kv_dtype)
        stats = self.kv8_stats[depth] = generation.stats
        return SelfTimed(stats.seconds - stats.decode_seconds)

    def _generate(self, depth: int, decode: bool = False, **options: Any) -> Generation:
        return self.engine.generate(
            self.labels_B,
            decode=decode,
            depth=depth,
            bridge=self.setting.bridge,
            max_batch=self.setting.batch,
            **self.setting.filters,
            **options,
        )

    def peers(self, depth: int) -> dict[str, Call]:
        """Calls by name. The original has no depths: it is a peer of our full depth only."""
        if self.one_peer and depth != self.var.config.depth:
            return {}
        if self.original is not None:
            return {
                f"original {name}": functools.partial(self._original, on)
                for name, on in peer_settings(self.device).items()
            }
        return {
            f"plain loop {name}, depth {depth}": functools.partial(self._plain, depth, on)
            for name, on in peer_settings(self.device).items()
        }

    def _original(self, autocast: bool, decoder: bool = False) -> SelfTimed:
        assert self.original is not None
        with nullcontext() if decoder else self.original.without_decoder():
            start = clock(self.device)
            self.original.generate(
                self.labels_B, seed=self.seed, autocast=autocast, **self.setting.filters
            )
            return SelfTimed(clock(self.device) - start)

    def _plain(self, depth: int, autocast: bool) -> None:
        with device.autocast(self.device, autocast):
            torch_baseline.generate(
                self.var,
                self.vae,
                self.labels_B,
                self.schedule(depth),
                generator=torch.Generator(self.device).manual_seed(self.seed),
                **self.setting.filters,
            )

    # --- checks and details ---------------------------------------------------------------------

    def same_tokens(self, depth: int) -> bool | None:
        """Whether our engine draws the tokens of the plain loop from the same generator."""
        if self.original is not None or self.setting.dtype != torch.float32:
            return None
        one_B = self.labels_B[:1]
        plain = torch_baseline.generate(
            self.var,
            self.vae,
            one_B,
            self.schedule(depth),
            generator=torch.Generator(self.device).manual_seed(7),
            **self.setting.filters,
        )
        ours = self.engine.generate(
            one_B,
            depth=depth,
            bridge=self.setting.bridge,
            max_batch=1,
            generator=torch.Generator(self.device).manual_seed(7),
            **self.setting.filters,
        )
        return torch.equal(ours.tokens, plain.tokens) and torch_baseline.agree(
            self.var, self.vae, one_B, self.schedule(depth)
        )

    def scale_ms(self, depth: int) -> list[float]:
        """Milliseconds of every scale, medians over a few generations of the whole batch."""
        runs_ms: list[list[float]] = []
        for run in range(1 if self.stats[depth].seconds > 1 else 5):
            marks = [clock(self.device)]
            self._generate(
                depth,
                seed=run,
                on_scale=lambda k, partial, m=marks: m.append(clock(self.device)),
            )
            runs_ms.append([1000 * (b - a) for a, b in itertools.pairwise(marks)])
        return [statistics.median(scale) for scale in zip(*runs_ms, strict=True)]

    def logits(self) -> list[LogitsDifference]:
        """Our logits of the last scale against the original's, for the tokens that it drew."""
        if self.original is None:
            return []
        exact_engine = Engine(self.var, self.vae, dtype=torch.float32)
        last = self.var.layout.slice(self.var.layout.num_scales - 1)
        differences, one_B = [], self.labels_B[:1]
        settings = peer_settings(self.device)
        for setting, autocast in settings.items():
            tokens_BL, theirs_BTV = self.original.watched(
                one_B, seed=3, autocast=autocast, **self.setting.filters
            )
            exact_BTV = exact_engine.forced_logits(one_B, tokens_BL)[:, last]
            if autocast:
                what = f"original {setting} against ours float32"
                differences.append(_difference(what, theirs_BTV, exact_BTV))
            if not autocast or len(settings) == 1:
                ours_BTV = self.engine.forced_logits(one_B, tokens_BL)[:, last]
                what, against_BTV = (
                    ("ours float32", exact_BTV) if autocast else (f"original {setting}", theirs_BTV)
                )
                what = f"ours {dtype_name(self.setting.dtype)} against {what}"
                differences.append(_difference(what, ours_BTV, against_BTV))
        return differences

    def decoder(self, on_sample: Callable[[str], None]) -> dict[str, Any]:
        """The VQ-VAE's decoder alone, for the whole batch."""
        layout = self.var.layout
        tokens_BL = torch.randint(
            self.var.config.vocab_size, (self.setting.batch, layout.total),
            generator=torch.Generator().manual_seed(1), device="cpu",
        ).to(self.device)  # fmt: skip
        f_hat = self.vae.new_features(self.setting.batch)
        for k in range(layout.num_scales):
            f_hat = self.vae.accumulate(f_hat, tokens_BL[:, layout.slice(k)], k)
        calls: dict[str, Call] = {"ours": lambda: self.engine._weights().decode(f_hat)}
        for setting, autocast in peer_settings(self.device).items():
            if self.original is not None:
                calls[f"original {setting}"] = functools.partial(
                    self.original.decode, f_hat, autocast=autocast
                )
            else:
                calls[f"plain modules {setting}"] = functools.partial(
                    self._plain_decode, f_hat, autocast
                )
        samples = time_interleaved(
            calls, rounds=self.setting.runs, device=self.device, on_sample=on_sample
        )
        ours = samples.pop("ours")
        return {
            "batch": self.setting.batch,
            "dtype": dtype_name(self.setting.dtype),
            "ms": asdict(self._timing(ours)),
            "against": [
                asdict(self._against(name, theirs, ours, full_depth=False))
                for name, theirs in samples.items()
            ],
        }

    @torch.inference_mode()
    def _plain_decode(self, f_hat: Tensor, autocast: bool) -> Tensor:
        with device.autocast(self.device, autocast):
            return self.vae.decode_features(f_hat)

    def switch(self) -> list[Switch]:
        """From full depth to the shallowest, both run before; empty without a shallower depth."""
        full, shallow = self.var.config.depth, min(self.setting.depths)
        if shallow == full:
            return []
        apart, second = [], []
        for _ in range(self.setting.runs):
            self.ours(full)
            first, again = 1000 * self.ours(shallow), 1000 * self.ours(shallow)
            apart.append(first - again)
            second.append(again)
        return [
            Switch(
                depth=full,
                to=shallow,
                batch=self.setting.batch,
                dtype=dtype_name(self.setting.dtype),
                ms=statistics.median(apart),
                quartiles=quartiles(apart),
                rounds=len(apart),
                generation_ms=statistics.median(second),
            )
        ]

    # --- the whole ------------------------------------------------------------------------------

    def run(self, on_sample: Callable[[str], None]) -> list[Row]:
        """Time everything interleaved, then measure the details of each row."""
        setting, full = self.setting, self.var.config.depth
        depths = sorted({full, *setting.depths}, reverse=True)
        gemms = GemmsAlone(self.var, setting.dtype, setting.batch)
        calls: dict[str, Call] = {}
        peers_of: dict[int, list[str]] = {}
        for depth in depths:
            calls[f"ours, depth {depth}"] = functools.partial(self.ours, depth)
            calls[f"gemms, depth {depth}"] = functools.partial(gemms.run, self.schedule(depth))
            if setting.kv_dtype is not None and depth in setting.depths:
                calls[f"8-bit K/V, depth {depth}"] = functools.partial(self.kv8, depth)
            peers = self.peers(depth)
            peers_of[depth] = list(peers) or peers_of[full]
            calls |= peers
        samples = time_interleaved(
            calls, rounds=setting.runs, min_seconds=0.02, device=self.device, on_sample=on_sample
        )
        return [
            self._row(depth, samples, peers_of[depth])
            for depth in depths
            if depth in setting.depths
        ]

    def _row(self, depth: int, samples: Mapping[str, Samples], peers: list[str]) -> Row:
        ours, gemms = samples[f"ours, depth {depth}"], samples[f"gemms, depth {depth}"]
        full = samples[f"ours, depth {self.var.config.depth}"]
        config, schedule, batch = self.var.config, self.schedule(depth), self.setting.batch
        flop = linear_flop(config, schedule, batch) + attention_flop(config, schedule, batch)
        stats = self.stats[depth]
        shallow = depth != config.depth
        return Row(
            depth=depth,
            batch=batch,
            dtype=dtype_name(self.setting.dtype),
            ms=self._timing(ours),
            against=[
                self._against(
                    name, samples[name], ours,
                    full_depth=shallow and self.one_peer,
                )
                for name in peers
            ],
            kv_planned_bytes=stats.kv_planned_bytes,
            kv_allocated_bytes=stats.kv_allocated_bytes,
            kv_paper_bytes=stats.kv_paper_bytes,
            speed_up=statistics.median(ratios(full, ours)),
            ceiling=ceiling(config, schedule),
            gemms_ms=self._timing(gemms),
            beyond_gemms=1 - statistics.median(ratios(gemms, ours)),
            weight_bytes=weight_bytes(config, schedule, self.setting.dtype.itemsize),
            flop=flop,
            achieved_flops=flop / ours.median,
            scale_ms=self.scale_ms(depth),
            same_tokens=self.same_tokens(depth),
            kv8=self._kv8(depth, samples.get(f"8-bit K/V, depth {depth}"), ours),
        )  # fmt: skip

    def _kv8(self, depth: int, samples: Samples | None, exact: Samples) -> KV8 | None:
        if samples is None:
            return None
        round_ratios, stats = ratios(exact, samples), self.kv8_stats[depth]
        changed, _, first = greedy_change(
            self.engine, self.labels_B[:GREEDY_IMAGES], depth=depth, bridge=self.setting.bridge
        )
        return KV8(
            ms=self._timing(samples),
            ratio=statistics.median(round_ratios),
            ratio_quartiles=quartiles(round_ratios),
            kv_allocated_bytes=stats.kv_allocated_bytes,
            kv_planned_bytes=stats.kv_planned_bytes,
            greedy_changed=changed,
            first_scale=first,
        )

    def _timing(self, samples: Samples) -> Timing:
        each = [1000 * seconds / self.setting.batch for seconds in samples.seconds]
        return Timing(statistics.median(each), quartiles(each), len(each))

    def _against(
        self, name: str, theirs: Samples, ours: Samples, *, full_depth: bool
    ) -> PeerTiming:
        round_ratios = ratios(theirs, ours)
        return PeerTiming(
            peer=name.split(", depth")[0],
            ms=self._timing(theirs),
            ratio=statistics.median(round_ratios),
            ratio_quartiles=quartiles(round_ratios),
            full_depth=full_depth,
        )


def images(comparison: EngineComparison, on_sample: Callable[[str], None]) -> list[dict[str, Any]]:
    """Whole generations with the decoder: each depth, beside the original at full depth."""
    setting, full = comparison.setting, comparison.var.config.depth

    def ours(depth: int) -> SelfTimed:
        comparison.seed += 1
        stats = comparison._generate(depth, decode=True, seed=comparison.seed).stats
        return SelfTimed(stats.seconds)

    calls: dict[str, Call] = {
        f"ours, depth {depth}": functools.partial(ours, depth) for depth in setting.depths
    }
    originals = peer_settings(comparison.device) if comparison.original is not None else {}
    for name, autocast in originals.items():
        calls[f"original {name}"] = functools.partial(comparison._original, autocast, decoder=True)
    samples = time_interleaved(
        calls, rounds=setting.runs, min_seconds=0.02, device=comparison.device, on_sample=on_sample
    )
    rows = []
    for depth in setting.depths:
        own, shallow = samples[f"ours, depth {depth}"], depth != full
        against = [
            asdict(comparison._against(name, samples[name], own, full_depth=shallow))
            for name in calls
            if name.startswith("original")
        ]
        rows.append(
            {
                "depth": depth,
                "batch": setting.batch,
                "dtype": dtype_name(setting.dtype),
                "ms": asdict(comparison._timing(own)),
                "against": against,
            }
        )
    return rows


def _difference(what: str, ours: Tensor, theirs: Tensor) -> LogitsDifference:
    apart = (ours.double() - theirs.double()).abs()
    return LogitsDifference(what, float(apart.max()), float(apart.mean()), float(theirs.std()))


def count_samples(setting: BenchConfig, full_depth: int, device: str = "cpu") -> int:
    """Number of samples that :meth:`EngineComparison.run` takes, for a progress bar."""
    depths = {full_depth, *setting.depths}
    peers = len(peer_settings(device)) * (1 if setting.var_repo is not None else len(depths))
    eight = 0 if setting.kv_dtype is None else len(setting.depths)
    return (2 * len(depths) + peers + eight) * (setting.runs + 1)


@modes_of_a_new_process()
def measure(
    var: VAR, vae: VQVAE, setting: BenchConfig, on_sample: Callable[[str], None] = lambda name: None
) -> dict[str, Any]:
    """Rows, logits, the decoder, images and the switch of depths of one setting, as plain values.

    Raises:
        UserError: the original code does not fit this model.
    """
    comparison = EngineComparison(var, vae, replace(setting, depths=tuple(setting.depths)))
    with torch.inference_mode():
        rows = comparison.run(on_sample)
        return {
            "rows": [asdict(row) for row in rows],
            "logits": [
                {**asdict(difference), "batch": 1, "dtype": dtype_name(setting.dtype)}
                for difference in comparison.logits()
            ],
            "decoder": [comparison.decoder(on_sample)] if setting.decoder else [],
            "images": images(comparison, on_sample) if setting.decoder else [],
            "switch": [asdict(switch) for switch in comparison.switch()],
        }


def switch_line(switch: Mapping[str, Any]) -> str:
    """A :class:`Switch` as text."""
    low, high = switch["quartiles"]
    return (
        f"from depth {switch['depth']} to {switch['to']}, {switch['dtype']}, "
        f"batch {switch['batch']}: "
        f"{switch['ms']:+z.2f} ms ({low:+z.2f} to {high:+z.2f}) of {switch['generation_ms']:,.1f}"
    )
