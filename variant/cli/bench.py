"""``variant bench``: the engine's speed and memory beside its peers'."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from variant.bench import original_var
from variant.bench.device import peer_settings
from variant.bench.engine_bench import BenchConfig, count_samples, measure, switch_line
from variant.bench.environment import environment
from variant.bench.models import build
from variant.bench.peak_memory import Job, peak
from variant.bench.roofline import drift, measure_peaks
from variant.checkpoints.named_configs import configs_of, is_preset
from variant.cli.dtypes import DTYPES
from variant.cli.options import Bench
from variant.cli.output import (
    STANDARD_OUTPUT,
    check_json,
    console,
    mebibytes,
    table,
    write_json,
)
from variant.cli.progress import progress
from variant.engine.generation import Sampling
from variant.engine.memory import free_bytes
from variant.engine.planning import depths_of, plan_row
from variant.errors import UserError
from variant.models.config import VARConfig
from variant.models.var import VAR
from variant.models.vqvae import VQVAE
from variant_kernels.arguments import integer
from variant_kernels.dispatch.request import dtype_name
from variant_kernels.tuning_switch import timing_allowed
from variant_kernels.wording import counted

FORMAT = "variant-engine-bench-2"
MAX_BATCH, MAX_RUNS, MAX_THREADS = 2**16, 10**6, 1024


def bench(command: Bench) -> None:
    """Measure the engine and its peers, print tables, write a result file."""
    _check(command)
    if command.threads is not None:
        torch.set_num_threads(command.threads)
    configs = _configs(command)
    var, vae = build(command.model, command.device)
    result = _empty_result(command, var)
    with timing_allowed():
        _measure(command, var, vae, configs, result)
    write_json(command.json, result)
    out = console(command.json)
    _print(out, result)
    if command.json is not None:
        out.print(f"wrote {command.json}")


def _configs(command: Bench) -> list[BenchConfig]:
    """One configuration for each dtype and batch; wrong depths or clones raise before the work."""
    var_config, vae_config = configs_of(command.model)
    depths = tuple(command.depths) or depths_of(var_config)
    with torch.device("meta"):  # the schedule needs no weights
        var = VAR(var_config)
    for depth in depths:
        var.schedule(depth, command.bridge)
    _check_memory(command, var_config, depths)
    if command.var_repo is not None:
        original_var.check_clone(command.var_repo)
        original_var.check_sizes(vae_config)
    return [
        BenchConfig(
            batch=batch,
            dtype=DTYPES[dtype],
            depths=depths,
            bridge=command.bridge,
            runs=command.runs,
            cfg=command.cfg,
            top_k=command.top_k,
            top_p=command.top_p,
            var_repo=command.var_repo,
            decoder=command.decoder,
            kv_dtype=command.kv_dtype,
        )
        for dtype in command.dtype
        for batch in command.batch
    ]


def _empty_result(command: Bench, var: VAR) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "complete": False,
        "model": command.model,
        "device": command.device,
        "weights": "random" if is_preset(command.model) else "trained",
        "bridge": command.bridge if command.bridge is not None else var.config.bridge,
        "sampling": {"cfg": command.cfg, "top_k": command.top_k, "top_p": command.top_p},
        "environment": environment(["variant", *sys.argv[1:]]),
        "rows": [],
        "logits": [],
        "decoder": [],
        "images": [],
        "switch": [],
        "memory": [],
    }


def _measure(
    command: Bench, var: VAR, vae: VQVAE, configs: list[BenchConfig], result: dict[str, Any]
) -> None:
    """Fill ``result``; the file is written after each configuration, so Ctrl-C keeps those."""
    dtypes = [DTYPES[dtype] for dtype in command.dtype]
    print_line = console(command.json, stderr=True).print
    print_line(f"measuring the machine's peak rates: copying, {', '.join(command.dtype)} products")
    start = measure_peaks(command.device, dtypes)
    result["limits"] = {"start": start.to_dict()}
    total = sum(count_samples(c, var.config.depth, command.device) for c in configs)
    print_line(f"{counted(total, 'sample')} of generations")
    with progress("bench", "measuring", total, command.json) as advance:
        on_sample = functools.partial(advance, 1)
        for config in configs:
            measured = measure(var, vae, config, on_sample)
            for part in ("rows", "logits", "decoder", "images", "switch"):
                result[part] += measured[part]
            if command.memory:
                result["memory"] += _memory(command, var, config, result["memory"], on_sample)
            _save(command, result)
    end = measure_peaks(command.device, dtypes)
    result["limits"] |= {"end": end.to_dict(), "drift": drift(start, end)}
    result["complete"] = True


def _check(command: Bench) -> None:
    """Everything that can be refused without a model, before the first measurement.

    Raises:
        UserError, ValueError: an option that cannot be used.
    """
    for name, words in (("batch", command.batch), ("dtype", command.dtype)):
        if not words:
            raise UserError(f"bench: --{name} must name at least one; got none")
    for batch in command.batch:
        integer("bench", "--batch", batch, 1, MAX_BATCH)
    integer("bench", "--runs", command.runs, 1, MAX_RUNS)
    if command.threads is not None:
        integer("bench", "--threads", command.threads, 1, MAX_THREADS)
    Sampling(command.cfg, command.top_k, command.top_p, seed=0)
    check_json("bench", command.json)
    if command.device == "cuda" and not torch.cuda.is_available():
        raise UserError("bench: --device cuda: torch finds no GPU; use --device cpu")


def _check_memory(command: Bench, var: VARConfig, depths: Sequence[int]) -> None:
    """The K/V cache of the largest batch alone must fit.

    Raises:
        UserError: it does not.
    """
    bridge = command.bridge if command.bridge is not None else var.bridge or 0
    batch, free = max(command.batch), free_bytes(torch.device(command.device))
    needed = max(
        plan_row(var, depth, bridge, batch, dtype, guidance=command.cfg > 0).exact
        for depth in {var.depth, *depths}
        for dtype in command.dtype
    )
    if needed > free:
        raise UserError(
            f"bench: --batch {batch} needs {mebibytes(needed)} for K and V; "
            f"{mebibytes(free)} are free; use a smaller batch"
        )


def _save(command: Bench, result: dict[str, Any]) -> None:
    """Write what is measured so far, if it goes to a file."""
    if command.json != STANDARD_OUTPUT:
        write_json(command.json, result)


def _memory(
    command: Bench,
    var: VAR,
    config: BenchConfig,
    earlier: list[dict[str, Any]],
    on_sample: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Peak memory of ours at every depth and of each peer at full depth, in one process each.

    Args:
        earlier: results of the configurations before. Peers do not depend on our dtype: they are
            measured once for each batch.
    """
    full, dtype = var.config.depth, dtype_name(config.dtype)
    job = functools.partial(
        Job,
        model=command.model,
        batch=config.batch,
        dtype=dtype,
        bridge=command.bridge,
        device=command.device,
        threads=torch.get_num_threads(),
        decoder=command.decoder,
        **config.filters,
    )
    jobs = {f"ours {dtype}": [job(who="ours", depth=depth) for depth in config.depths]}
    repo = None if command.var_repo is None else str(command.var_repo)
    who = "plain loop" if repo is None else "original"
    for name, autocast in peer_settings(command.device).items():
        jobs[f"{who} {name}"] = [job(who=who, depth=full, autocast=autocast, var_repo=repo)]
    measured = []
    finished = {(one["who"], one["batch"]) for one in earlier}
    for name, each in jobs.items():
        for one in each if (name, config.batch) not in finished else []:
            on_sample(f"memory of {name}")
            sizes = peak(one)
            measured.append({"who": name, "depth": one.depth, "batch": one.batch, **sizes})
    return measured


# --- printing -----------------------------------------------------------------------------------


def _machine(result: dict[str, Any]) -> str:
    machine = result["environment"]
    if result["device"] == "cuda":
        return f"{machine['gpu']}, driver {machine['gpu_driver']}"
    return f"{machine['cpu']}, {machine['isa']}, {counted(machine['threads'], 'thread')}"


def _print(out: Console, result: dict[str, Any]) -> None:
    out.print(
        f"{_machine(result)}, torch {result['environment']['torch']}; "
        "without the VQ-VAE decoder; medians of interleaved runs"
    )
    for dtype, batch in dict.fromkeys((row["dtype"], row["batch"]) for row in result["rows"]):
        rows = [r for r in result["rows"] if (r["dtype"], r["batch"]) == (dtype, batch)]
        out.print(_times(result, rows, dtype, batch))
        out.print(_limits(rows, result["limits"]["start"]["copy"]))
        if any(row["kv8"] is not None for row in rows):
            out.print(_kv8(rows))
    for difference in result["logits"]:
        out.print(
            f"last scale's logits, {difference['what']}: largest difference "
            f"{difference['largest']:.3g}, mean {difference['mean']:.3g} (standard deviation of "
            f"the logits {difference['spread']:.3g})"
        )
    for decoder in result["decoder"]:
        peers = "; ".join(
            f"{peer['peer']} {peer['ms']['median']:,.1f} ms, {peer['ratio']:.2f} times"
            for peer in decoder["against"]
        )
        out.print(
            f"decoder, {decoder['dtype']}, batch {decoder['batch']}: "
            f"{decoder['ms']['median']:,.1f} ms per image ({peers})"
        )
    for image in result["images"]:
        peers = "; ".join(
            f"{peer['peer']} {peer['ms']['median']:,.1f} ms, {peer['ratio']:.2f} times"
            for peer in image["against"]
        )
        out.print(
            f"with the decoder, {image['dtype']}, batch {image['batch']}, depth "
            f"{image['depth']}: {image['ms']['median']:,.1f} ms per image"
            + (f" ({peers})" if peers else "")
        )
    for switch in result["switch"]:
        out.print(f"switch {switch_line(switch)}")
    if result["memory"]:
        out.print(_memory_table(result["memory"]))
    peaks, changes = result["limits"]["start"], result["limits"]["drift"].values()
    rates = ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in peaks["gemm"].items())
    out.print(
        f"this machine's GEMM rate: {rates}; copying {peaks['copy'] / 1e9:.1f} GB/s; at the end "
        f"{min(changes):.2f} to {max(changes):.2f} of that"
    )


def _memory_table(memory: list[dict[str, Any]]) -> Table:
    sizes = table(
        "Peak memory of a process that runs one generation",
        "implementation",
        "batch",
        "depth",
        "peak",
        "with the model loaded",
    )
    for job in memory:
        sizes.add_row(
            job["who"],
            str(job["batch"]),
            str(job["depth"]),
            mebibytes(job["peak"]),
            mebibytes(job["loaded"]),
        )
    return sizes


def _times(result: dict[str, Any], rows: list[dict[str, Any]], dtype: str, batch: int) -> Table:
    peers = [peer["peer"] for peer in rows[0]["against"]]
    columns = [column for peer in peers for column in (f"{peer}\nms", "peer /\nours")]
    times = table(
        f"{result['model']} ({result['weights']} weights), batch {batch}, {dtype}: ms per image",
        "depth",
        "ours\nms",
        "quartiles",
        *columns,
        "K/V allocated",
        "plan",
    )
    for row in rows:
        same = row["kv_allocated_bytes"] == row["kv_planned_bytes"]
        cells = []
        for peer in row["against"]:
            # The original has no depths: it runs every layer.
            mark = "*" if peer["full_depth"] else ""
            cells += [f"{peer['ms']['median']:,.1f}{mark}", f"{peer['ratio']:.2f}{mark}"]
        low, high = row["ms"]["quartiles"]
        times.add_row(
            str(row["depth"]),
            f"{row['ms']['median']:,.1f}",
            f"{low:,.1f}..{high:,.1f}",
            *cells,
            mebibytes(row["kv_allocated_bytes"]),
            "equal" if same else f"NOT: {mebibytes(row['kv_planned_bytes'])}",
        )
    if any(peer["full_depth"] for row in rows for peer in row["against"]):
        times.caption = "* the original at its full depth, the only one that it has"
    return times


def _kv8(rows: list[dict[str, Any]]) -> Table:
    kv8_table = table(
        f"8-bit K/V beside exact K/V ({rows[0]['dtype']}): ms per image",
        "depth",
        "exact\nms",
        "8-bit\nms",
        "exact /\n8-bit",
        "exact K/V",
        "8-bit K/V\nand scales",
        "of it",
        "greedy tokens\nthat change",
        "from scale",
    )
    for row in rows:
        kv8 = row["kv8"]
        if kv8 is None:
            continue
        kv8_table.add_row(
            str(row["depth"]),
            f"{row['ms']['median']:,.1f}",
            f"{kv8['ms']['median']:,.1f}",
            f"{kv8['ratio']:.2f}",
            mebibytes(row["kv_allocated_bytes"]),
            mebibytes(kv8["kv_allocated_bytes"]),
            f"{kv8['kv_allocated_bytes'] / row['kv_allocated_bytes']:.1%}",
            f"{kv8['greedy_changed']:.1%}",
            "-" if kv8["first_scale"] is None else str(kv8["first_scale"]),
        )
    return kv8_table


def _limits(rows: list[dict[str, Any]], bandwidth: float) -> Table:
    distances = table(
        "Distance to the limit",
        "depth",
        "speed-up over\nown full depth",
        "by linear\nwork alone",
        "of it",
        "same GEMMs\nalone, ms",
        "time beyond\nGEMMs",
        "weights\nread, ms",
        "time over\nthat",
        "GFLOP/s",
        "same tokens as\nplain loop",
    )
    answers = {True: "yes", False: "NO", None: "-"}
    for row in rows:
        distances.add_row(
            str(row["depth"]),
            f"{row['speed_up']:.2f}",
            f"{row['ceiling']:.2f}",
            f"{row['speed_up'] / row['ceiling']:.0%}",
            f"{row['gemms_ms']['median']:,.1f}",
            f"{row['beyond_gemms']:.0%}",
            # For the whole batch; the other times are of one image.
            f"{1000 * row['weight_bytes'] / bandwidth:,.1f}",
            f"{row['ms']['median'] * row['batch'] * bandwidth / row['weight_bytes'] / 1000:.2f}",
            f"{row['achieved_flops'] / 1e9:,.0f}",
            answers[row["same_tokens"]],
        )
    return distances
