"""Engine against the plain-torch loop: same weights, same draws, same tokens; time and K/V bytes.

    python -m benchmarks.bench_engine --model digits --batch 10 --runs 7
    python -m benchmarks.bench_engine --model var-d16 --batch 1 --runs 3

Presets have random weights. Times alternate in one process, without the VQ-VAE decoder; medians
and their ratio are printed and, with --json, written with machine and commit.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro

from benchmarks import plain_loop
from variant import VAR, VQVAE, Engine, VARiant
from variant.checkpoint import replacing
from variant.planning import depths_of
from variant.presets import VAR_PRESETS, vqvae_of
from variant_kernels import DepthSchedule


@dataclass
class Options:
    """What to measure."""

    model: str = "digits"
    """Model folder, "digits", or a preset with random weights."""
    batch: int = 10
    """Images at once."""
    runs: int = 7
    """Alternating runs of each."""
    depths: tuple[int, ...] = ()
    """Depths; default: all of the model's."""
    json: Path | None = None
    """Where to write the results."""


@dataclass
class Row:
    """Medians in milliseconds per image, spread (largest over smallest), K/V in bytes."""

    depth: int
    engine_ms: float
    plain_ms: float
    ratio: float
    engine_spread: float
    plain_spread: float
    engine_kv_bytes: int
    plain_kv_bytes: int
    same_tokens: bool


def build(name: str) -> tuple[VAR, VQVAE]:
    """A model by name; presets get random weights whose logits differ from token to token."""
    if name not in VAR_PRESETS:
        model = VARiant.from_pretrained(name)
        return model.var, model.vae
    torch.manual_seed(0)
    config = VAR_PRESETS[name]
    var, vae = VAR(config).eval(), VQVAE(vqvae_of(config)).eval()
    with torch.no_grad():
        var.head.weight.mul_(100)
    return var, vae


def schedule_of(var: VAR, depth: int) -> DepthSchedule:
    """The model's own schedule of a depth."""
    return var.schedule(depth if depth != var.config.depth else None)


def measure(var: VAR, vae: VQVAE, depth: int, batch: int, runs: int) -> Row:
    """Alternate both, compare their tokens, take medians."""
    engine = Engine(var, vae)
    labels = torch.arange(batch) % var.config.num_classes
    schedule = schedule_of(var, depth)
    times: dict[str, list[float]] = {"engine": [], "plain": []}
    same = plain_loop.agree(var, vae, labels[:1], schedule)
    kv_engine = kv_plain = 0
    for run in range(runs + 1):
        seed = run
        ours = engine.generate(
            labels, depth=depth, top_p=0.96, generator=torch.Generator().manual_seed(seed)
        )
        engine_seconds = ours.stats.seconds - ours.stats.decode_seconds
        start = time.perf_counter()
        plain = plain_loop.generate(
            var, vae, labels, schedule, top_p=0.96, generator=torch.Generator().manual_seed(seed)
        )
        plain_seconds = time.perf_counter() - start
        same = same and torch.equal(ours.tokens, plain.tokens)
        kv_engine, kv_plain = ours.stats.kv_allocated_bytes, plain.kv_bytes
        if run:  # the first run warms both up
            times["engine"].append(1000 * engine_seconds / batch)
            times["plain"].append(1000 * plain_seconds / batch)
    ratios = [p / e for p, e in zip(times["plain"], times["engine"], strict=True)]
    return Row(
        depth=depth,
        engine_ms=statistics.median(times["engine"]),
        plain_ms=statistics.median(times["plain"]),
        ratio=statistics.median(ratios),
        engine_spread=max(times["engine"]) / min(times["engine"]),
        plain_spread=max(times["plain"]) / min(times["plain"]),
        engine_kv_bytes=kv_engine,
        plain_kv_bytes=kv_plain,
        same_tokens=same,
    )


def environment() -> dict[str, object]:
    """Machine, versions and commit."""
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit,
        "command": " ".join(["python -m benchmarks.bench_engine", *sys.argv[1:]]),
    }


def main() -> None:
    """Measure, print, write."""
    options = tyro.cli(Options)
    var, vae = build(options.model)
    print(f"{options.model}, batch {options.batch}, float32, {torch.get_num_threads()} threads")
    print("depth  engine ms  plain ms  plain/engine  engine KiB  plain KiB  same tokens")
    rows = []
    for depth in options.depths or depths_of(var.config):
        row = measure(var, vae, depth, options.batch, options.runs)
        rows.append(row)
        print(
            f"{row.depth:5d}  {row.engine_ms:9.2f}  {row.plain_ms:8.2f}  {row.ratio:12.2f}  "
            f"{row.engine_kv_bytes / 1024:10.0f}  {row.plain_kv_bytes / 1024:9.0f}  "
            f"{'yes' if row.same_tokens else 'NO'}",
            flush=True,
        )
    if options.json is not None:
        result = {
            "suite": "engine against plain torch",
            "model": options.model,
            "batch": options.batch,
            "dtype": "float32",
            "environment": environment(),
            "rows": [asdict(row) for row in rows],
        }
        with replacing(options.json) as path:
            path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
