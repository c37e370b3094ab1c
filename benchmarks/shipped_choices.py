"""Write the block sizes that the package brings (``triton_ops/shipped_configs.json``).

    python -m benchmarks.shipped_choices                          # predicted ones anew
    python -m benchmarks.shipped_choices --run out/gpu/results.json
    python -m benchmarks.shipped_choices --run ~/.cache/variant_kernels/tuning

A run on a GPU times candidates; its result, or the folder of tuning records of any process, turns
predicted choices into measured ones. A measured choice replaces the choice for the same shape and
stays until another run measures that shape. Of records that differ in a detail alone (dtype, scale
lengths) the config with the least mean of time / shortest time is taken, among those timed in all.
Predicted choices come from ``benchmarks/prediction``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.prediction.attention import Kernel, chosen, tiles_of
from benchmarks.prediction.constants import Constants, constants
from benchmarks.results import RUN, read
from variant.errors import UserError
from variant.files import atomic_write
from variant.models.presets import PATCH_NUMS_256, PATCH_NUMS_512
from variant_kernels.triton_ops import block_causal_attention_configs as block_causal
from variant_kernels.triton_ops import paged_attention_configs as paged
from variant_kernels.triton_ops.tuning import SHIPPED, Config

FORMAT = "variant-configs-1"
NOTE = (
    "Written by python -m benchmarks.shipped_choices. Predicted: by the model of benchmarks/"
    "prediction from machine code. A measured entry replaces a predicted one and says on which "
    "device, torch and Triton."
)
FAMILY, PREDICTED = "sm90", "predicted"
Entry = dict[str, Any]

# Heads of all images: of VAR-d30 at batch 64 and 16, the next power of two.
_LAYOUTS = ((PATCH_NUMS_256, 2048), (PATCH_NUMS_512, 512))
_TABLES = {"forward": block_causal.FORWARD, "dq": block_causal.DQ, "dkv": block_causal.DKV}
# Queries rounded up to a power of two: the largest scale of the 256x256 models with so many, and
# its visible keys; 128 sequences of 30 heads.
_SCALES = {16: (16, 30), 32: (25, 55), 64: (64, 155), 128: (100, 255), 256: (256, 680)}
_HEADS, _PAGE_SIZE = 4096, 16


def table_of(kernel: str, same: Sequence[str], sizes: Sequence[int]) -> tuple[Config, ...]:
    """The candidates of a shape on this family; what a choice must be one of."""
    head_dim = int(same[0])
    if kernel == "paged_attention_kernel":
        by_queries = paged.configs_by_queries(FAMILY, head_dim > 64, same[2] == "1")
        candidates = by_queries[min((n for n in by_queries if n >= sizes[0]), default=128)]
        if same[3] == paged.CONSECUTIVE:
            candidates = tuple(map(paged.without_page_numbers, candidates))
        return candidates
    by_width = _TABLES[kernel.removeprefix("block_causal_attention_").removesuffix("_kernel")]
    widths = by_width[FAMILY]
    return widths[min(width for width in widths if width >= head_dim)]


# --- predicted ----------------------------------------------------------------------------------


def _fastest(
    c: Constants,
    candidates: Sequence[Config],
    kernels: Sequence[Kernel],
    tiles: Any,
    heads: int,
) -> Config | None:
    """The candidate with the shortest predicted time; None if the table has none of them."""
    times = [
        (kernel.seconds(c, tiles(kernel), heads), index)
        for index, config in enumerate(candidates)
        for kernel in kernels
        if (kernel.block_q, kernel.block_k, kernel.num_warps, kernel.num_stages)
        == (config.block_q, config.block_k, config.num_warps, config.num_stages)
    ]
    return candidates[min(times)[1]] if times else None


def predicted(c: Constants) -> Iterator[Entry]:
    """Choices for the shapes of VAR-d30, and of heads that are twice as wide."""
    for kind in _TABLES:
        for width in (64, 128):
            for norm in ("qk_norm", "no qk_norm"):
                variant = "qk_norm" if norm == "qk_norm" else ""
                for patch_nums, heads in _LAYOUTS:
                    lengths = tuple(n * n for n in patch_nums)
                    kernel = f"block_causal_attention_{kind}_kernel"
                    same, sizes = [str(width), "2", norm], [sum(lengths), heads]
                    best = _fastest(
                        c,
                        table_of(kernel, same, sizes),
                        chosen(kind, width, variant),
                        lambda one, lengths=lengths: tiles_of(one, lengths),
                        heads,
                    )
                    yield from _entry(kernel, same, sizes, best)
    for width in (64, 128):
        for bytes_of_kv in ("2", "1"):
            for pages in (paged.CONSECUTIVE, paged.SCATTERED):
                variant = ", ".join(
                    (["8 bits"] if bytes_of_kv == "1" else [])
                    + (["consecutive pages, query norm"] if pages == paged.CONSECUTIVE else [])
                )
                for rounded, (queries, keys) in _SCALES.items():
                    kernel, same = "paged_attention_kernel", [str(width), "2", bytes_of_kv, pages]
                    sizes = [rounded, _HEADS, _PAGE_SIZE]
                    best = _fastest(
                        c,
                        table_of(kernel, same, sizes),
                        chosen("paged", width, variant),
                        lambda one, queries=queries, keys=keys: (
                            [(-(-keys // one.block_k), 1)] * -(-queries // one.block_q)
                        ),
                        _HEADS,
                    )
                    yield from _entry(kernel, same, sizes, best)


def _entry(
    kernel: str, same: list[str], sizes: list[int], config: Config | None
) -> Iterator[Entry]:
    if config is not None:
        yield {"kernel": kernel, "family": FAMILY, "source": PREDICTED, "same": same,
               "sizes": sizes, "config": _plain(config)}  # fmt: skip


def _plain(config: Config) -> dict[str, int]:
    return {name: value for name, value in asdict(config).items() if value is not None}


# --- measured -----------------------------------------------------------------------------------


def records(path: Path) -> list[Mapping[str, Any]]:
    """The tuning records of a run on a GPU, or of a folder of the tuner.

    Raises:
        UserError: there is none.
    """
    if path.is_dir():
        found = [json.loads(file.read_text()) for file in sorted(path.glob("*.json"))]
    else:
        result = read(path)
        if result.kind != RUN:
            raise UserError(f"{path}: must be a run on a GPU, or a folder; got {result.kind}")
        found = [one["data"] for one in result.data["results"] if one["kind"] == "tuning"]
    found = [one for one in found if "milliseconds" in one]
    if not found:
        raise UserError(f"{path}: has no tuning record: nothing was timed in that run")
    return found


def measured(found: Sequence[Mapping[str, Any]]) -> list[Entry]:
    """One entry for each shape that was timed.

    Raises:
        UserError: a record is not of these kernels' present candidates.
    """
    by_shape: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for one in found:
        shape = one["kernel"], one["family"], tuple(one["same"]), tuple(one["sizes"])
        by_shape.setdefault(shape, []).append(one)
    entries = []
    for (kernel, family, same, sizes), group in by_shape.items():
        config = _fastest_in_all(group)
        if family == FAMILY and config not in table_of(kernel, same, sizes):
            raise UserError(
                f"{kernel}, {same}, {sizes}: {config} was measured and is no candidate now; "
                "measure again with this checkout"
            )
        sources = {
            f"{one['device']}, torch {one['torch']}, Triton {one['triton']}" for one in group
        }
        entries.append({
            "kernel": kernel, "family": family, "source": f"measured on {min(sources)}",
            "same": list(same), "sizes": list(sizes), "config": _plain(config),
        })  # fmt: skip
    return entries


def _fastest_in_all(group: Sequence[Mapping[str, Any]]) -> Config:
    slowdowns: dict[Config, list[float]] = {}
    for one in group:
        timed = {
            Config(**config): ms
            for config, ms in zip(one["configs"], one["milliseconds"], strict=True)
            if ms is not None
        }
        for config, ms in timed.items():
            slowdowns.setdefault(config, []).append(ms / min(timed.values()))
    everywhere = {c: s for c, s in slowdowns.items() if len(s) == len(group)} or slowdowns
    return min(everywhere, key=lambda config: statistics.mean(everywhere[config]))


# --- the file -----------------------------------------------------------------------------------


def _shape(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    return entry["kernel"], entry["family"], tuple(entry["same"]), tuple(entry["sizes"])


def merged(old: Sequence[Entry], new: Sequence[Entry], guessed: Sequence[Entry]) -> list[Entry]:
    """Measured entries, new ones before old ones, then predicted ones of other shapes."""
    kept = [entry for entry in old if entry["source"] != PREDICTED]
    found: dict[tuple[Any, ...], Entry] = {}
    for entry in (*new, *kept, *guessed):
        found.setdefault(_shape(entry), entry)
    # Of equally near shapes the tuner takes the first one: measured before predicted.
    return sorted(found.values(), key=lambda entry: (entry["source"] == PREDICTED, _shape(entry)))


def text(entries: Sequence[Entry]) -> str:
    """The file, one line for each entry."""
    lines = ",\n  ".join(json.dumps(entry) for entry in entries)
    head = f'{{"format": {json.dumps(FORMAT)},\n "note": {json.dumps(NOTE)},\n'
    return f'{head} "entries": [\n  {lines}\n ]\n}}\n'


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shipped_choices")
    parser.add_argument("--run", type=Path, help="results.json of make gpu, or a tuning folder")
    parser.add_argument("--out", type=Path, default=SHIPPED)
    options = parser.parse_args(arguments)
    try:
        new = [] if options.run is None else measured(records(options.run))
    except UserError as error:
        print(f"benchmarks.shipped_choices: {error}", file=sys.stderr)
        return 1
    old = json.loads(SHIPPED.read_text())["entries"]
    entries = merged(old, new, list(predicted(constants())))
    before = {_shape(entry): entry["config"] for entry in old}
    for entry in entries:
        was = before.get(_shape(entry))
        if entry["config"] != was:
            print(f"{entry['kernel']} {entry['same']} {entry['sizes']}: {was} -> "
                  f"{entry['config']}, {entry['source']}")  # fmt: skip
    with atomic_write(options.out) as temporary:
        temporary.write_text(text(entries))
    print(f"wrote {len(entries)} choices, {len(new)} of them from this run, to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
