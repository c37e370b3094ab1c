"""Seconds by name: what the model predicts, and the same names from a run on a GPU.

Names: ``generation 64 30`` (batch, depth; without the decoder), ``images 64 30`` (with it),
``gemms 64 30`` (its products alone), ``original 64``; ``attention 680 forward triton`` (length,
direction, implementation), ``paged triton``, ``sampling triton``; ``training 30``. Measured alone:
``switch 64`` (a change of depth), and bytes, ``kv allocated 64`` and ``kv planned 64``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.prediction.attention import block_causal_seconds, paged_seconds, visible_pairs
from benchmarks.prediction.constants import Constants
from benchmarks.prediction.generation import generation
from benchmarks.prediction.peers import (
    TORCH_ATTENTION_FLOPS,
    flash_seconds,
    flex_seconds,
    original_seconds,
)
from benchmarks.prediction.sampling import sampling_seconds, torch_calls_seconds
from benchmarks.prediction.training import original_training_seconds, training_seconds
from variant.models.presets import PATCH_NUMS_256, PATCH_NUMS_512

Times = dict[str, float]

HEADS, HEAD_DIM = 30, 64
DEPTHS, BATCHES = (30, 16, 8, 4, 2), (1, 64)
FULL = DEPTHS[0]
TRAINING_DEPTHS, TRAINING_BATCH = (30, 16), 16
# Length: layout and batch of its benchmark.
ATTENTION = {"2240": (PATCH_NUMS_512, 16), "680": (PATCH_NUMS_256, 64)}
DIRECTIONS = ("forward", "forward+backward")
# Names of peers in the benchmarks' results.
TRITON, FLEX, FLASH, TORCH = "triton", "flex-compiled", "flex-flash", "sdpa"
FLASHINFER = "flashinfer-planned"
TORCH_CALLS, ORIGINAL_TRAINING = "torch-calls", "original, dense mask"
ORIGINAL = "original bfloat16 autocast"
PAGED_CASE = "layout256-scale9-rows128-heads30-bfloat16"
SAMPLING_CASE = "batch64-tokens256-bfloat16-seed"
# Rows of sampling, and queries, keys and heads of paged attention, at the last scale of batch 64.
SAMPLED, PAGED = 64 * 256, (256, 680, 128 * HEADS)
PAGED_FLOP = 4 * HEAD_DIM * PAGED[0] * PAGED[1] * PAGED[2]


def attention_flop(length: str, direction: str) -> float:
    """FLOP over visible pairs of a benchmark: two products forward, five backward."""
    patch_nums, batch = ATTENTION[length]
    products = {"forward": 2, "backward": 5, "forward+backward": 7}[direction]
    pairs = visible_pairs([n * n for n in patch_nums])
    return products * 2 * HEAD_DIM * pairs * batch * HEADS


def predicted_attention(c: Constants) -> Times:
    """Our attention kernels alone: what ``overlap`` and ``program_cycles`` decide."""
    found = {}
    for length, (patch_nums, batch) in ATTENTION.items():
        lengths = tuple(n * n for n in patch_nums)
        forward, dq, dkv = (
            block_causal_seconds(c, kind, lengths, HEAD_DIM, batch * HEADS)
            for kind in ("forward", "dq", "dkv")
        )
        found[f"attention {length} forward {TRITON}"] = forward
        found[f"attention {length} forward+backward {TRITON}"] = forward + dq + dkv
    # The benchmark looks every token up in the table, and q comes normalised.
    queries, keys, heads = PAGED
    found[f"paged {TRITON}"] = paged_seconds(c, queries, keys, HEAD_DIM, heads, variant="")
    return found


def predicted(c: Constants) -> Times:
    """Seconds of everything."""
    found = predicted_attention(c)
    for length, (patch_nums, batch) in ATTENTION.items():
        for peer, seconds in ((FLEX, flex_seconds), (FLASH, flash_seconds)):
            forward = seconds(c, "forward", patch_nums, batch * HEADS)
            backward = seconds(c, "backward", patch_nums, batch * HEADS)
            found[f"attention {length} forward {peer}"] = forward
            found[f"attention {length} forward+backward {peer}"] = forward + backward
    found[f"paged {TORCH}"] = PAGED_FLOP / TORCH_ATTENTION_FLOPS
    found[f"sampling {TRITON}"] = sampling_seconds(c, SAMPLED)
    found[f"sampling {TORCH_CALLS}"] = torch_calls_seconds(c, SAMPLED)
    for batch in BATCHES:
        for depth in DEPTHS:
            part = generation(c, batch, depth)
            found[f"generation {batch} {depth}"] = part.tokens
            found[f"gemms {batch} {depth}"] = part.gemms
            found[f"images {batch} {depth}"] = part.images
    found["original 64"] = original_seconds(c, 64)
    for depth in TRAINING_DEPTHS:
        found[f"training {depth}"] = training_seconds(c, TRAINING_BATCH, depth)
    found["training original"] = original_training_seconds(c, TRAINING_BATCH)
    return found


# --- a run on a GPU -----------------------------------------------------------------------------


def _results(run: Mapping[str, Any], kind: str) -> Iterator[Mapping[str, Any]]:
    return (result["data"] for result in run["results"] if result["kind"] == kind)


def measured(run: Mapping[str, Any]) -> Times:
    """What a run has of these names; medians, a later result replaces an earlier one."""
    found: Times = {}
    for part in _results(run, "engine"):
        for row in part.get("rows", []):
            batch, depth = row["batch"], row["depth"]
            # Of one image, in ms.
            found[f"generation {batch} {depth}"] = batch * row["ms"]["median"] / 1e3
            found[f"gemms {batch} {depth}"] = batch * row["gemms_ms"]["median"] / 1e3
            if depth == FULL:
                for bytes_ in ("allocated", "planned"):
                    found[f"kv {bytes_} {batch}"] = row[f"kv_{bytes_}_bytes"]
            for peer in row.get("against", []):
                if peer["peer"] == ORIGINAL and depth == FULL:
                    found[f"original {batch}"] = batch * peer["ms"]["median"] / 1e3
        for image in part.get("images", []):
            name = f"images {image['batch']} {image['depth']}"
            found[name] = image["batch"] * image["ms"]["median"] / 1e3
        for switch in part.get("switch", []):
            found[f"switch {switch['batch']}"] = switch["ms"] / 1e3
    for kernel in _results(run, "kernel"):
        stem = _kernel_name(kernel["case"])
        for peer, timing in kernel["implementations"].items() if stem else ():
            found[f"{stem} {peer}"] = timing["median"]
    for result in _results(run, "training"):
        if result.get("batch", TRAINING_BATCH) != TRAINING_BATCH:
            continue
        for step in result["steps"]:
            name = step["implementation"].removeprefix("depth ")
            name = "original" if name == ORIGINAL_TRAINING else name
            found[f"training {name}"] = step["median"]
    return found


def _kernel_name(case: str) -> str | None:
    for length, (_, batch) in ATTENTION.items():
        for direction in DIRECTIONS:
            stem = f"L{length}-batch{batch}-heads{HEADS}-head_dim{HEAD_DIM}-bfloat16"
            if case == f"{stem}-{direction}":
                return f"attention {length} {direction}"
    return {PAGED_CASE: "paged", SAMPLING_CASE: "sampling"}.get(case)
