"""Predicted times on an H200 of the cases that have a target; nothing here is a measurement.

    python -m benchmarks.predict                     # the table of predictions
    python -m benchmarks.predict --fit results.json  # the model's constants from a run on a GPU

Attention: the committed machine code of the kernels (``tests/machine_code/expected``) gives the
instructions I that each program issues for a tile, the block sizes give the multiply-adds T of its
products, both in cycles of a processor. These loops hardly overlap the two: a tile takes
(T + I) / overlap. The tiles of the real layouts are spread over the processors in rounds.
Products with weights and memory-bound kernels: a roofline. The constants are in ``constants.json``;
``source`` says where they come from.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.results import RUN, Result, read
from variant.engine.planning import schedule_of
from variant.errors import UserError
from variant.files import atomic_write
from variant.models.flops import ceiling, linears
from variant.models.presets import PAPER_BRIDGE, PATCH_NUMS_256, PATCH_NUMS_512, VAR_PRESETS
from variant_kernels.plans.attention_tiles import Cuts, cut_keys, cut_queries

ROOT = Path(__file__).parents[1]
CONSTANTS = Path(__file__).with_name("constants.json")
# Of the Triton release in torch 2.11, which runs on GPUs.
MACHINE_CODE = ROOT / "tests" / "machine_code" / "expected" / "triton-3.6.0.json"

PROCESSORS, ISSUE_SLOTS, LANES = 132, 4, 32
# Dense bfloat16 multiply-adds of one processor in a cycle: 2 x 2048 x 132 x 1.83 GHz = 989 TFLOP/s,
# NVIDIA's data sheet.
FMA = 2048
# mma.sync (HMMA) instead of wgmma: about five eighths of the rate.
HMMA_SHARE = 0.62
MODEL, DTYPE_BYTES = "var-d30", 2
# Products of a tile of queries and a tile of keys.
PRODUCTS = {"forward": 2, "dq": 3, "dkv": 4, "paged": 2}


@dataclass(frozen=True)
class Constants:
    """What the model cannot count. source: where the values come from.

    clock_hz: of a processor.  overlap: 1 if a loop's issue and products take turns; above 1 they
    overlap.  program_cycles: beginning and end of a program.  exposed_cycles: latency of a loop
    that waits for what it has just asked for, shared by the programs of a processor.  matrix_flops,
    copy_bytes: rates of a large product and a large copy.  gemm_share, row_share: shares of the
    copy rate that products of few rows and memory-bound kernels reach.  kernel_seconds,
    row_seconds: the least time of a product or attention, and of a memory-bound kernel, in a graph.
    scale_seconds: work of a scale besides the layers.  host_seconds: of a generation, besides its
    graph.  decoder_seconds, decoder_image_seconds: of the VQ-VAE's decoder, and of each image.
    """

    source: str
    clock_hz: float
    overlap: float
    program_cycles: float
    exposed_cycles: float
    matrix_flops: float
    copy_bytes: float
    gemm_share: float
    row_share: float
    kernel_seconds: float
    row_seconds: float
    scale_seconds: float
    host_seconds: float
    decoder_seconds: float
    decoder_image_seconds: float


def constants(path: Path = CONSTANTS) -> Constants:
    """The committed constants."""
    return Constants(**json.loads(path.read_text()))


# --- attention ----------------------------------------------------------------------------------

_KEY = re.compile(
    r"(?:block_causal_)?(?P<attention>attention_(?:forward|dq|dkv)|paged_attention)/"
    r"D (?P<width>\d+), (?P<q>\d+) x (?P<k>\d+)(?P<more>.*), (?P<warps>\d+) warps"
)


# Variants that count: consecutive pages are those of the engine's own cache.
_PLAIN = ("", ", consecutive pages")


@dataclass(frozen=True)
class Kernel:
    """One attention kernel with its block sizes, from its machine code.

    kind: a key of PRODUCTS.  full, masked: instructions of one tile without and with a mask.
    programs: at once on a processor.  ahead: whether its loop loads ahead.  wgmma: whether its
    products are wgmma.
    """

    key: str
    kind: str
    width: int
    block_q: int
    block_k: int
    num_warps: int
    full: int
    masked: int
    programs: int
    ahead: bool
    wgmma: bool

    def tile_cycles(self, c: Constants, *, masked: bool) -> float:
        """Cycles of one processor for one pair of tiles."""
        products = PRODUCTS[self.kind] * self.block_q * self.block_k * self.width / FMA
        issue = (self.masked if masked else self.full) * self.num_warps / ISSUE_SLOTS
        exposed = 0.0 if self.ahead else c.exposed_cycles / self.programs
        return (products / (1 if self.wgmma else HMMA_SHARE) + issue) / c.overlap + exposed

    def seconds(self, c: Constants, tiles: Iterable[tuple[int, int]], copies: int) -> float:
        """Seconds of a launch: ``copies`` (heads of all images) of tiles with (pairs, masked)."""
        each = [
            c.program_cycles
            + (pairs - masked) * self.tile_cycles(c, masked=False)
            + masked * self.tile_cycles(c, masked=True)
            for pairs, masked in tiles
        ]
        return rounds(each, copies, self.programs) / c.clock_hz


# Rounds that are followed program by program; before them all processors are always busy.
FOLLOWED_ROUNDS = 6


def rounds(cycles: Sequence[float], copies: int, resident: int) -> float:
    """Cycles until the last program ends; programs start in order where one has ended.

    Args:
        cycles: of each program of a head, if it has a processor of its own.
        resident: programs that share a processor.
    """
    total = len(cycles) * copies
    sharing = min(resident, -(-total // PROCESSORS))
    slots = min(total, PROCESSORS * sharing)
    followed = min(copies, -(-FOLLOWED_ROUNDS * slots // len(cycles)))
    ends = [(copies - followed) * sum(cycles) * sharing / slots] * slots
    for _ in range(followed):
        for one in cycles:
            heapq.heapreplace(ends, ends[0] + one * sharing)
    return max(ends)


@cache
def kernels(path: Path = MACHINE_CODE) -> tuple[Kernel, ...]:
    """The attention kernels without qk_norm and with 16-bit pages."""
    found = []
    for key, figures in json.loads(path.read_text())["cases"].items():
        match = _KEY.match(key)
        if match is None or not figures["loops"] or match["more"] not in _PLAIN:
            continue
        counts = sorted(loop["instructions"] for loop in figures["loops"])
        found.append(
            Kernel(
                key,
                match["attention"].removeprefix("attention_").removesuffix("_attention"),
                *(int(match[name]) for name in ("width", "q", "k", "warps")),
                full=counts[0],
                masked=counts[-1],
                programs=figures["programs"],
                ahead=0 not in figures["waits"],
                wgmma=all(loop.get("HGMMA") for loop in figures["loops"]),
            )
        )
    return tuple(found)


def _pairs(cuts: Cuts) -> list[tuple[int, int]]:
    # A tile of keys has a bounds check at its last tile of queries: masked, too.
    return [(tile.pairs, tile.masked) for tile in cuts.tiles]


def block_causal_seconds(
    c: Constants, kind: str, lengths: tuple[int, ...], width: int, heads: int
) -> float:
    """Seconds of the fastest block sizes. kind: forward, dq or dkv.  heads: of all images."""
    cut = cut_keys if kind == "dkv" else cut_queries
    return min(
        kernel.seconds(c, _pairs(cut(lengths, kernel.block_q, kernel.block_k)), heads)
        for kernel in kernels()
        if (kernel.kind, kernel.width) == (kind, width)
    )


def block_causal_flops(
    c: Constants, direction: str, patch_nums: Sequence[int], width: int, heads: int
) -> float:
    """FLOP/s over visible pairs: two products forward, five backward."""
    lengths = tuple(n * n for n in patch_nums)
    pairs = sum(length * sum(lengths[: i + 1]) for i, length in enumerate(lengths))
    kinds = ("forward",) if direction == "forward" else ("dq", "dkv")
    seconds = sum(block_causal_seconds(c, kind, lengths, width, heads) for kind in kinds)
    return (2 if direction == "forward" else 5) * 2 * width * pairs * heads / seconds


@cache
def paged_seconds(c: Constants, queries: int, keys: int, width: int, heads: int) -> float:
    """Seconds of paged attention with the fastest block sizes; keys split where that is faster."""
    times = []
    for kernel in kernels():
        if (kernel.kind, kernel.width) != ("paged", width):
            continue
        if kernel.block_q > max(16, 1 << (queries - 1).bit_length()):
            continue
        pairs, tiles = -(-keys // kernel.block_k), -(-queries // kernel.block_q)
        for splits in range(1, min(4, pairs) + 1):
            part = -(-pairs // splits)
            seconds = kernel.seconds(c, [(part, 1)] * tiles * splits, heads)
            if splits > 1:
                moved = 2 * splits * queries * width * heads * 4
                seconds += c.row_seconds + moved / c.copy_bytes
            times.append(seconds)
    return c.kernel_seconds + min(times)


# --- products and memory-bound kernels ----------------------------------------------------------


def gemm_seconds(c: Constants, rows: int, inputs: int, outputs: int) -> float:
    """A product with weights in 16 bits: the best of cuBLAS's usual tiles and splits."""
    moved = DTYPE_BYTES * (inputs * outputs + rows * (inputs + outputs))
    memory = moved / (c.gemm_share * c.copy_bytes)
    each = c.matrix_flops / PROCESSORS
    compute = math.inf
    for height in (64, 128, 256):
        for width in (64, 128, 256):
            for split in (1, 2, 4, 8):
                tiles = -(-rows // height) * -(-outputs // width) * split
                # Small tiles read their inputs more often from shared memory.
                share = min(1.0, height * width / (height + width) / 64)
                one = 2 * height * width * -(-inputs // split) / (each * share)
                partial = 0 if split == 1 else 8 * split * rows * outputs / c.copy_bytes
                # Full rounds, and a last one that is as long as the others.
                compute = min(compute, -(-tiles // PROCESSORS) * one + partial)
    return c.kernel_seconds + max(memory, compute)


def row_seconds(c: Constants, moved: float) -> float:
    """A kernel that is bound by memory and reads and writes ``moved`` bytes."""
    return max(c.row_seconds, moved / (c.row_share * c.copy_bytes))


@dataclass(frozen=True)
class Generation:
    """Predicted seconds of one generation, by part."""

    gemms: float
    attention: float
    rows: float
    rest: float
    decoder: float

    @property
    def tokens(self) -> float:
        """Without the decoder."""
        return self.gemms + self.attention + self.rows + self.rest

    @property
    def images(self) -> float:
        """With the decoder."""
        return self.tokens + self.decoder


def generation(c: Constants, batch: int, depth: int) -> Generation:
    """A generation of VAR-d30 with guidance, in bfloat16, at the paper's bridge."""
    config = VAR_PRESETS[MODEL]
    schedule = schedule_of(config, depth, PAPER_BRIDGE)
    products = linears(config, schedule, batch)
    gemms = sum(gemm_seconds(c, x.rows, x.inputs, x.outputs) for x in products)
    attention = rows = 0.0
    for scale, tokens in enumerate(config.layout.tokens):
        layers = len(schedule.active_layers(scale))
        visible, sequences = config.layout.visible(scale), 2 * batch
        heads = sequences * config.num_heads
        attention += layers * paged_seconds(c, tokens, visible, config.head_dim, heads)
        # A float32 stream is read and written, y read and h written; q, k, v read and written.
        elements = sequences * tokens * config.embed_dim
        rows += layers * (2 * row_seconds(c, 12 * elements) + row_seconds(c, 12 * elements))
        rows += row_seconds(c, DTYPE_BYTES * sequences * tokens * config.vocab_size)
    rest = c.host_seconds + c.scale_seconds * config.layout.num_scales
    decoder = c.decoder_seconds + batch * c.decoder_image_seconds
    return Generation(gemms, attention, rows, rest, decoder)


def linear_ratio_share(c: Constants, batch: int, depth: int) -> float:
    """Speed-up over full depth as a share of the ratio of the linear work."""
    config = VAR_PRESETS[MODEL]
    speed_up = generation(c, batch, config.depth).tokens / generation(c, batch, depth).tokens
    return speed_up / ceiling(config, schedule_of(config, depth, PAPER_BRIDGE))


# --- the table ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One line of the table: a quantity with a target.

    target: as text.  predicted: the value.  unit: of predicted and measured.  measured: the value
    of a run; None where there is none.  digits: behind the point.
    """

    name: str
    target: str
    predicted: float
    unit: str
    digits: int = 0
    measured: float | None = None

    def cells(self) -> list[str]:
        """Name, target, predicted, measured."""
        return [self.name, self.target, self._text(self.predicted), self._text(self.measured)]

    def _text(self, value: float | None) -> str:
        return "not yet measured" if value is None else f"{value:,.{self.digits}f} {self.unit}"


def cases(c: Constants, run: Mapping[str, Any] | None = None) -> list[Case]:
    """The targets with their predictions and, from a run on a GPU, what was measured."""
    found = _engine_cases(c) + _attention_cases(c)
    values = {} if run is None else measured(run)
    return [replace(case, measured=values.get(case.name)) for case in found]


def _engine_cases(c: Constants) -> list[Case]:
    one, many = generation(c, 1, 30), generation(c, 64, 30)
    return [
        Case("batch 1, full depth", "at most 13 ms", 1e3 * one.tokens, "ms", 1),
        Case("batch 1, full depth, with the decoder", "at most 16 ms", 1e3 * one.images, "ms", 1),
        Case(
            "batch 64, full depth, over its products alone",
            "at most 1.25 times",
            many.tokens / many.gemms,
            "times",
            2,
        ),
        Case("batch 64, full depth", "", 1e3 * many.tokens, "ms"),
        Case("batch 64, full depth, with the decoder", "", 1e3 * many.images, "ms"),
        *(
            Case(
                f"batch 64, depth {depth}, of the linear-work ratio",
                "at least 90 %",
                100 * linear_ratio_share(c, 64, depth),
                "%",
            )
            for depth in (16, 8, 4, 2)
        ),
    ]


_ATTENTION_TARGETS = (
    ("2240", PATCH_NUMS_512, 16, "forward", 340),
    ("2240", PATCH_NUMS_512, 16, "backward", 300),
    ("680", PATCH_NUMS_256, 64, "forward", 300),
    ("680", PATCH_NUMS_256, 64, "backward", 260),
)


def _attention_name(length: str, direction: str) -> str:
    return f"block-causal attention, D 64, L {length}, {direction}"


PAGED = "paged attention, last scale, batch 64"


def _attention_cases(c: Constants) -> list[Case]:
    found = [
        Case(
            _attention_name(length, direction),
            f"at least {target} TFLOP/s",
            block_causal_flops(c, direction, patch_nums, 64, batch * 30) / 1e12,
            "TFLOP/s",
        )
        for length, patch_nums, batch, direction, target in _ATTENTION_TARGETS
    ]
    flop = 4 * 64 * 256 * 680 * 128 * 30
    seconds = paged_seconds(c, 256, 680, 64, 128 * 30)
    target = "faster than torch on contiguous K and V, and than FlashInfer"
    return [*found, Case(PAGED, target, flop / seconds / 1e12, "TFLOP/s")]


# --- a run on a GPU -----------------------------------------------------------------------------


def _results(run: Mapping[str, Any], kind: str) -> list[Mapping[str, Any]]:
    return [result["data"] for result in run["results"] if result["kind"] == kind]


def _ours(kernel: Mapping[str, Any]) -> float | None:
    """Seconds of the Triton kernel in a kernel case."""
    timing = kernel["implementations"].get("triton")
    return None if timing is None else timing["median"]


def _rows(run: Mapping[str, Any]) -> dict[tuple[int, int], Mapping[str, Any]]:
    """The last row of each (batch, depth)."""
    parts = [part for part in _results(run, "engine") if "rows" in part]
    return {(row["batch"], row["depth"]): row for part in parts for row in part["rows"]}


def _attention_seconds(run: Mapping[str, Any]) -> dict[str, float]:
    """Seconds by name of a case of the table; the backward pass is the whole less the forward."""
    times = {kernel["case"]: _ours(kernel) for kernel in _results(run, "kernel")}
    found = {}
    for length, _, batch, direction, _ in _ATTENTION_TARGETS:
        stem = f"L{length}-batch{batch}-heads30-head_dim64-bfloat16"
        forward, both = times.get(f"{stem}-forward"), times.get(f"{stem}-forward+backward")
        name = _attention_name(length, direction)
        if direction == "forward" and forward is not None:
            found[name] = forward
        elif direction == "backward" and forward is not None and both is not None:
            found[name] = both - forward
    paged = times.get("layout256-scale9-rows128-heads30-bfloat16")
    return {**found, **({} if paged is None else {PAGED: paged})}


def measured(run: Mapping[str, Any]) -> dict[str, float]:
    """The measured value of each case of the table that a run has."""
    found = {}
    rows = _rows(run)
    for (batch, depth), row in rows.items():
        if depth != 30:
            share = row["speed_up"] / row["ceiling"]
            found[f"batch {batch}, depth {depth}, of the linear-work ratio"] = 100 * share
            continue
        found[f"batch {batch}, full depth"] = batch * row["ms"]["median"]
        over = row["ms"]["median"] / row["gemms_ms"]["median"]
        found[f"batch {batch}, full depth, over its products alone"] = over
    for part in _results(run, "engine"):
        for image in part.get("images", []):
            if image["depth"] == 30:
                name = f"batch {image['batch']}, full depth, with the decoder"
                found[name] = image["batch"] * image["ms"]["median"]
    for name, seconds in _attention_seconds(run).items():
        found[name] = _attention_flop(name) / seconds / 1e12
    return found


def _attention_flop(name: str) -> float:
    for length, patch_nums, batch, direction, _ in _ATTENTION_TARGETS:
        if name == _attention_name(length, direction):
            lengths = [n * n for n in patch_nums]
            pairs = sum(n * sum(lengths[: i + 1]) for i, n in enumerate(lengths))
            return (4 if direction == "forward" else 10) * 64 * pairs * batch * 30
    return 4 * 64 * 256 * 680 * 128 * 30


def _trials(c: Constants, overlaps: Iterable[float], cycles: Iterable[float]) -> list[Constants]:
    return [
        replace(c, overlap=round(overlap, 3), program_cycles=max(0.0, float(one)))
        for overlap in overlaps
        for one in cycles
    ]


def fit(c: Constants, run: Mapping[str, Any], source: str) -> Constants:
    """The constants that a run on a GPU determines, the others unchanged.

    The rates are the run's own; ``overlap`` and ``program_cycles`` have the least squared error of
    the logarithms of the attention cases; the shares and the rest follow from the generations.
    """
    limits = run.get("limits", {}).get("start")
    if limits is not None:
        c = replace(c, matrix_flops=limits["gemm"]["bfloat16"], copy_bytes=limits["copy"])
    times = _attention_seconds(run)
    if times:

        def error(trial: Constants) -> float:
            by_name = {case.name: case.predicted for case in _attention_cases(trial)}
            return sum(
                math.log(by_name[name] * 1e12 * seconds / _attention_flop(name)) ** 2
                for name, seconds in times.items()
            )

        cycles = c.program_cycles
        steps = (0, 500, 1000, 1500, 2000, 2500, 3000, 3500, 4000) if len(times) > 1 else (cycles,)
        c = min(_trials(c, [0.1 * n for n in range(5, 16)], steps), key=error)
        steps = [c.program_cycles + n for n in range(-375, 376, 125)] if len(times) > 1 else steps
        c = min(_trials(c, [c.overlap + 0.01 * n for n in range(-9, 10)], steps), key=error)
    rows = _rows(run)
    if (64, 30) in rows:
        row = rows[64, 30]
        gemms = 64 * row["gemms_ms"]["median"] / 1e3
        c = replace(c, matrix_flops=c.matrix_flops * generation(c, 64, 30).gemms / gemms)
        part = generation(c, 64, 30)
        left = 64 * row["ms"]["median"] / 1e3 - part.gemms - part.attention - part.rest
        if left > 0:
            c = replace(c, row_share=c.row_share * part.rows / left)
    if (1, 30) in rows:
        row = rows[1, 30]
        gemms, tokens = (row[name]["median"] / 1e3 for name in ("gemms_ms", "ms"))
        # Not all kernels are bound by what is fitted, so that one step is not enough.
        for _ in range(8):
            c = replace(c, gemm_share=c.gemm_share * generation(c, 1, 30).gemms / gemms)
            part = generation(c, 1, 30)
            left = tokens - part.gemms - part.attention - part.rest
            if left > 0:
                c = replace(c, row_seconds=c.row_seconds * left / part.rows)
    return replace(c, source=source)


def text(found: Sequence[Case]) -> str:
    """The table for a terminal."""
    lines = [("what", "target", "predicted", "measured"), *(tuple(x.cells()) for x in found)]
    widths = [max(len(line[i]) for line in lines) for i in range(4)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def run_of(results: Iterable[Result]) -> Result | None:
    """The run on a GPU among some results, if there is one."""
    return next((result for result in results if result.kind == RUN), None)


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.predict", description=__doc__)
    parser.add_argument("--run", type=Path, help="show this run's measurements beside them")
    parser.add_argument("--fit", type=Path, metavar="RUN", help="fit the constants to this run")
    parser.add_argument("--out", type=Path, default=CONSTANTS, help="where --fit writes")
    options = parser.parse_args(arguments)
    try:
        c, run, path = constants(), None, options.fit or options.run
        if path is not None:
            result = read(path)
            if result.kind != RUN:
                raise UserError(f"{path}: must be a run on a GPU; got {result.kind}")
            run = result.data
        if options.fit is not None:
            c = fit(c, run or {}, f"fitted to {options.fit.name}")
            with atomic_write(options.out) as temporary:
                temporary.write_text(json.dumps(asdict(c), indent=1) + "\n")
    except UserError as error:
        print(f"benchmarks.predict: {error}", file=sys.stderr)
        return 1
    print(f"Predicted for one H200; {c.source}.\n\n{text(cases(c, run))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
