"""``variant bench``: the engine's speed and memory beside its peers'."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from variant.bench import original_var
from variant.bench.device import peer_settings
from variant.bench.engine_bench import Setting, count_samples, measure, switch_line
from variant.bench.environment import environment
from variant.bench.models import build, is_preset
from variant.bench.peak_memory import Job, peak
from variant.bench.result_file import write_result
from variant.bench.roofline import drift, measure_peaks
from variant.cli.options import Bench
from variant.cli.output import DTYPES, console, mebibytes, table
from variant.engine.planning import depths_of
from variant.errors import UserError
from variant.models.var import VAR

FORMAT = "variant-engine-bench-2"


def bench(command: Bench) -> None:
    """Measure, print, write."""
    _check(command)
    if command.threads is not None:
        torch.set_num_threads(command.threads)
    var, vae = build(command.model, command.device)
    depths = tuple(command.depths) or depths_of(var.config)
    # What is wrong is named before the work.
    for depth in depths:
        var.schedule(depth, command.bridge)
    if command.var_repo is not None:
        original_var.check_clone(command.var_repo)
        original_var.check_sizes(vae.config)
    settings = [
        Setting(
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
    result: dict[str, Any] = {
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
        "switch": [],
        "memory": [],
    }
    dtypes = [DTYPES[dtype] for dtype in command.dtype]
    console().print("measuring the machine's limits")
    start = measure_peaks(command.device, dtypes)
    result["limits"] = {"start": start.to_dict()}
    with _progress(
        sum(count_samples(s, var.config.depth, command.device) for s in settings)
    ) as on_sample:
        for setting in settings:
            found = measure(var, vae, setting, on_sample)
            for part in ("rows", "logits", "decoder", "switch"):
                result[part] += found[part]
            if command.memory:
                result["memory"] += _memory(command, var, setting, result["memory"], on_sample)
            _write(command.json, result)  # a run that is stopped keeps what it finished
    end = measure_peaks(command.device, dtypes)
    result["limits"] |= {"end": end.to_dict(), "drift": drift(start, end)}
    result["complete"] = True
    _write(command.json, result)
    _print(result)
    if command.json is not None:
        console().print(f"wrote {command.json}")


def _write(path: Path | None, result: dict[str, Any]) -> None:
    if path is not None:
        write_result(path, result)


def _check(command: Bench) -> None:
    if command.device == "cuda" and not torch.cuda.is_available():
        raise UserError("bench: --device cuda: torch sees no GPU; use --device cpu")
    for name, values in (
        ("batch", command.batch),
        ("runs", (command.runs,)),
        ("threads", () if command.threads is None else (command.threads,)),
    ):
        if any(value < 1 for value in values):
            raise UserError(f"bench: --{name} must be at least 1; got {min(values)}")
    for name, words in (("batch", command.batch), ("dtype", command.dtype)):
        if not words:
            raise UserError(f"bench: --{name} must name at least one; got none")
    if command.json is not None:
        nearest = command.json.parent
        while not nearest.exists():
            nearest = nearest.parent
        if command.json.is_dir() or not os.access(nearest, os.W_OK):
            raise UserError(f"{command.json}: cannot be written")


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on standard error that counts generations; nothing where nobody watches."""
    if not sys.stderr.isatty():
        yield lambda name: None
        return
    bar = Progress(*Progress.get_default_columns(), console=Console(stderr=True), transient=True)
    with bar:
        task = bar.add_task("measuring", total=total)

        def on_sample(name: str) -> None:
            bar.update(task, advance=1, description=name)

        yield on_sample


def _memory(
    command: Bench,
    var: VAR,
    setting: Setting,
    known: list[dict[str, Any]],
    on_sample: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Peak memory of ours at every depth and of each peer at full depth, a process each.

    Peers do not depend on our dtype: what is known of this batch is not measured again.
    """
    full, dtype = var.config.depth, str(setting.dtype).removeprefix("torch.")
    job = functools.partial(
        Job,
        model=command.model,
        batch=setting.batch,
        dtype=dtype,
        bridge=command.bridge,
        device=command.device,
        threads=torch.get_num_threads(),
        decoder=command.decoder,
        **setting.filters,
    )
    jobs = {f"ours {dtype}": [job(who="ours", depth=depth) for depth in setting.depths]}
    repo = None if command.var_repo is None else str(command.var_repo)
    who = "plain loop" if repo is None else "original"
    for name, autocast in peer_settings(command.device).items():
        jobs[f"{who} {name}"] = [job(who=who, depth=full, autocast=autocast, var_repo=repo)]
    found = []
    seen = {(one["who"], one["batch"]) for one in known}
    for name, each in jobs.items():
        for one in each if (name, setting.batch) not in seen else []:
            on_sample(f"memory of {name}")
            sizes = peak(one)
            found.append({"who": name, "depth": one.depth, "batch": one.batch, **sizes})
    return found


# --- printing -----------------------------------------------------------------------------------


def _machine(result: dict[str, Any]) -> str:
    found = result["environment"]
    if result["device"] == "cuda":
        return f"{found['gpu']}, driver {found['gpu_driver']}"
    return f"{found['cpu']}, {found['isa']}, {found['threads']} threads"


def _print(result: dict[str, Any]) -> None:
    found, out = result["environment"], console()
    out.print(
        f"{_machine(result)}, torch {found['torch']}; "
        f"without the VQ-VAE decoder; medians of runs that take turns"
    )
    settings = dict.fromkeys((row["dtype"], row["batch"]) for row in result["rows"])
    for dtype, batch in settings:
        rows = [r for r in result["rows"] if (r["dtype"], r["batch"]) == (dtype, batch)]
        out.print(_times(result, rows, dtype, batch))
        out.print(_limits(rows, result["limits"]["start"]["copy"]))
        if any(row["kv8"] is not None for row in rows):
            out.print(_kv8(rows))
    for found in result["logits"]:
        out.print(
            f"last scale's logits, {found['what']}: largest difference {found['largest']:.3g}, "
            f"mean {found['mean']:.3g} (their spread is {found['spread']:.3g})"
        )
    for found in result["decoder"]:
        against = "; ".join(
            f"{peer['peer']} {peer['ms']['median']:,.1f} ms, {peer['ratio']:.2f} times"
            for peer in found["against"]
        )
        out.print(
            f"decoder, {found['dtype']}, batch {found['batch']}: "
            f"{found['ms']['median']:,.1f} ms per image ({against})"
        )
    for found in result["switch"]:
        out.print(f"switch {switch_line(found)}")
    if result["memory"]:
        sizes = table("Peak memory of a process that does one generation", "who", "batch",
                      "depth", "peak", "of it with the model loaded")  # fmt: skip
        for one in result["memory"]:
            sizes.add_row(one["who"], str(one["batch"]), str(one["depth"]),
                          mebibytes(one["peak"]), mebibytes(one["loaded"]))  # fmt: skip
        out.print(sizes)
    limits, changes = result["limits"]["start"], result["limits"]["drift"].values()
    rates = ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in limits["gemm"].items())
    out.print(
        f"this machine's GEMM rate: {rates}; copying {limits['copy'] / 1e9:.1f} GB/s; at the end "
        f"{min(changes):.2f} to {max(changes):.2f} of that"
    )


def _times(result: dict[str, Any], rows: list[dict[str, Any]], dtype: str, batch: int) -> Any:
    peers = [peer["peer"] for peer in rows[0]["against"]]
    columns = [column for peer in peers for column in (f"{peer}\nms", "peer /\nours")]
    found = table(
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
            # The original has no depths: its time is that of every layer.
            mark = "*" if peer["full_depth"] else ""
            cells += [f"{peer['ms']['median']:,.1f}{mark}", f"{peer['ratio']:.2f}{mark}"]
        low, high = row["ms"]["quartiles"]
        found.add_row(
            str(row["depth"]),
            f"{row['ms']['median']:,.1f}",
            f"{low:,.1f}..{high:,.1f}",
            *cells,
            mebibytes(row["kv_allocated_bytes"]),
            "equal" if same else f"NOT: {mebibytes(row['kv_planned_bytes'])}",
        )
    if any(peer["full_depth"] for row in rows for peer in row["against"]):
        found.caption = "* the original at its full depth; it has no other"
    return found


def _kv8(rows: list[dict[str, Any]]) -> Any:
    found = table(
        f"8-bit K/V beside exact ones ({rows[0]['dtype']}): ms per image",
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
        found.add_row(
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
    return found


def _limits(rows: list[dict[str, Any]], bandwidth: float) -> Any:
    found = table(
        "Distance to the limit",
        "depth",
        "speed-up over\nown full depth",
        "ceiling by\nlinear work",
        "of it",
        "same GEMMs\nalone, ms",
        "time beyond\nGEMMs",
        "weights\nread, ms",
        "time over\nthat",
        "GFLOP/s",
        "same tokens as\nplain loop",
    )
    said = {True: "yes", False: "NO", None: "-"}
    for row in rows:
        found.add_row(
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
            said[row["same_tokens"]],
        )
    return found
