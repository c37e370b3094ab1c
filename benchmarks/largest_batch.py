"""The largest batch that fits into a given GPU memory, ours at each depth and the original's.

    python -m benchmarks.largest_batch --json FILE [--model var-d30] [--gib 48] [--var-repo PATH]

Memory is linear in the batch: the peaks of two small batches predict the largest one. That batch is
then run with torch's allocator limited to the given memory, and smaller ones until one fits. Our
weights are in 16 bits; the original's are in float32 under autocast, as in its demo. Without
``--var-repo`` the plain-torch loop takes the place of the original.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import LARGEST
from variant.bench import torch_baseline
from variant.bench.device import autocast, autocast_name
from variant.bench.environment import environment
from variant.bench.models import build, configs
from variant.bench.result_file import write_result
from variant.engine.engine import Engine
from variant.engine.planning import depths_of
from variant.errors import UserError

FILTERS = {"cfg": 1.5, "top_k": 900, "top_p": 0.96}
# After a batch that does not fit, this fraction of it is tried.
STEP = 0.96
TRIES = 8

# Runs one generation of a batch; returns K/V bytes (planned, allocated), or None if unknown.
Generate = Callable[[int], tuple[int, int] | None]


@dataclass
class Row:
    """One implementation at one depth.

    peaks: bytes by batch, weights included.  image_bytes: growth per image.  by_line: the largest
    batch by the line through the peaks.  largest: the largest batch that ran within the limit; 0 if
    none of those tried did.  kv_*: bytes at the largest batch.
    """

    who: str
    depth: int
    peaks: dict[int, int]
    image_bytes: float
    by_line: int
    largest: int
    kv_planned_bytes: int | None = None
    kv_allocated_bytes: int | None = None


class GPU:
    """The memory of the device; tests replace it."""

    def peak(self, generate: Generate, batch: int) -> int:
        """Peak of the allocated bytes during one generation, weights included."""
        self.release()
        torch.cuda.reset_peak_memory_stats()
        generate(batch)
        return torch.cuda.max_memory_allocated()

    @contextmanager
    def limited_to(self, limit: int) -> Iterator[None]:
        """Limit torch's allocator to ``limit`` bytes."""
        self.release()
        total = torch.cuda.get_device_properties().total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)

    def release(self) -> None:
        """Free unreferenced tensors and the allocator's cache."""
        gc.collect()
        torch.cuda.empty_cache()


def find(who: str, depth: int, generate: Generate, limit: int, small: list[int], gpu: GPU) -> Row:
    """Predict the largest batch from two small ones, then find the largest that runs.

    Raises:
        UserError: memory does not grow with the batch.
    """
    first, second = small
    peaks = {batch: gpu.peak(generate, batch) for batch in small}
    image = (peaks[second] - peaks[first]) / (second - first)
    if image <= 0:
        raise UserError(f"{who}, depth {depth}: {second} images take no more than {first}: {peaks}")
    by_line = max(0, int((limit - peaks[first]) / image + first))
    row = Row(who, depth, peaks, image, by_line, largest=0)
    batch = by_line
    with gpu.limited_to(limit):
        for _ in range(TRIES):
            if batch < 1:
                break
            fits, kv = _try(generate, batch)
            if fits:
                row.largest = batch
                row.kv_planned_bytes, row.kv_allocated_bytes = kv or (None, None)
                break
            # The tensors of the failed generation are unreferenced here.
            gpu.release()
            batch = min(batch - 1, int(batch * STEP))
    return row


def _try(generate: Generate, batch: int) -> tuple[bool, tuple[int, int] | None]:
    try:
        return True, generate(batch)
    except (torch.cuda.OutOfMemoryError, MemoryError):
        return False, None


def ours(options: argparse.Namespace, depth: int, models: Any) -> Generate:
    """Our generation, by a new engine for each batch: an engine keeps graphs of earlier batches."""
    var, vae = models

    def generate(batch: int) -> tuple[int, int]:
        labels_B = torch.arange(batch, device=options.device) % var.config.num_classes
        stats = (
            Engine(var, vae, dtype=getattr(torch, options.dtype))
            .generate(
                labels_B, depth=depth, bridge=options.bridge, seed=0, max_batch=batch,
                decode=False, **FILTERS,
            )
            .stats
        )  # fmt: skip
        return stats.kv_planned_bytes, stats.kv_allocated_bytes

    return generate


def peer(options: argparse.Namespace) -> tuple[str, Generate]:
    """The original at full depth, or the plain loop: float32 weights, 16-bit autocast.

    Nothing is timed, so a processor that emulates 16-bit products has this peer too.
    """
    setting = autocast_name(options.device)
    config, vae_config = configs(options.model)
    if options.var_repo is not None:
        from variant.bench import original_var

        theirs = original_var.load(options.var_repo, config, vae_config, device=options.device)

        def generate(batch: int) -> None:
            labels_B = torch.arange(batch, device=options.device) % config.num_classes
            with theirs.without_decoder():
                theirs.generate(labels_B, seed=0, autocast=True, **FILTERS)

        return f"original {setting}", generate

    var, vae = build(options.model, options.device)

    def generate_plainly(batch: int) -> None:
        labels_B = torch.arange(batch, device=options.device) % config.num_classes
        with autocast(options.device, True):
            torch_baseline.generate(
                var, vae, labels_B, var.schedule(None, options.bridge),
                generator=torch.Generator(options.device).manual_seed(0), **FILTERS,
            )  # fmt: skip

    return f"plain loop {setting}", generate_plainly


def measure(options: argparse.Namespace, gpu: GPU) -> dict[str, Any]:
    """All rows; written after each.

    Raises:
        UserError: a depth or a bridge that the model cannot have, or no clone at --var-repo.
    """
    limit = int(options.gib * 2**30)
    result: dict[str, Any] = {
        "format": LARGEST,
        "complete": False,
        "environment": environment(),
        "model": options.model,
        "dtype": options.dtype,
        "bridge": options.bridge,
        "limit_bytes": limit,
        "rows": [],
    }

    def add(row: Row) -> None:
        result["rows"].append(asdict(row))
        write_result(options.json, result)
        print(line(row, options.gib), flush=True)

    var, vae = build(options.model, options.device)
    models = var.to(getattr(torch, options.dtype)), vae
    depths = options.depths or depths_of(var.config)
    try:
        for depth in depths:
            var.schedule(depth, options.bridge)
    except ValueError as error:
        raise UserError(f"--depths {depth}: {error}") from error
    for depth in depths:
        generate = ours(options, depth, models)
        add(find(f"ours {options.dtype}", depth, generate, limit, options.small, gpu))
    full = var.config.depth
    del var, vae, models, generate
    name, generate = peer(options)
    add(find(name, full, generate, limit, options.small, gpu))
    result["complete"] = True
    write_result(options.json, result)
    return result


def line(row: Row, gib: float) -> str:
    """The printed line of a row."""
    kv = (
        "" if row.kv_allocated_bytes is None else f", K/V {row.kv_allocated_bytes / 2**20:,.0f} MiB"
    )
    same = row.kv_allocated_bytes == row.kv_planned_bytes
    return (
        f"{row.who:24} depth {row.depth:3}   {row.image_bytes / 2**20:8.1f} MiB an image   "
        f"largest batch in {gib:g} GiB: {row.largest} (by the line {row.by_line}){kv}"
        f"{'' if same else ' NOT THE PLAN'}"
    )


def main(arguments: list[str] | None = None, gpu: GPU | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.largest_batch")
    parser.add_argument("--model", default="var-d30")
    parser.add_argument("--depths", type=int, nargs="+", default=[30, 16, 8, 4, 2])
    parser.add_argument("--bridge", type=int, default=6)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--gib", type=float, default=48.0, help="limit; the paper's GPU has 48")
    parser.add_argument(
        "--small", type=int, nargs=2, default=[4, 12], help="batches that predict it"
    )
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--var-repo", type=Path)
    options = parser.parse_args(arguments)
    if not 1 <= options.small[0] < options.small[1]:
        parser.error(f"--small must name two batches, the smaller first; got {options.small}")
    if gpu is None and not (options.device == "cuda" and torch.cuda.is_available()):
        print("benchmarks.largest_batch: needs a GPU: torch finds none", file=sys.stderr)
        return 1
    try:
        measure(options, gpu or GPU())
    except UserError as error:
        print(f"benchmarks.largest_batch: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
