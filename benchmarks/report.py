"""Result files to one Markdown page with pictures.

    python -m benchmarks.report RESULT.json ... --out FOLDER

Takes results of ``pytest benchmarks --benchmark-json`` and of ``variant bench --json``.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from benchmarks.plots import draw, groups
from benchmarks.reading import (
    DROPIN,
    ENGINE,
    KERNELS,
    KV8,
    LARGEST,
    TRAINING,
    Result,
    read_all,
)
from variant.bench.engine_bench import switch_line
from variant.errors import UserError
from variant.files import atomic_write

PAGE = "report.md"


@dataclass
class Options:
    """One Markdown page and its pictures from result files.

    Example: python -m benchmarks.report benchmarks/results/*.json --out out/report
    """

    results: tyro.conf.Positional[tuple[Path, ...]]
    """Result files of any kind, or folders of them."""
    out: Path = Path("out/report")
    """Folder for report.md and the pictures."""


def page(results: list[Result], folder: Path) -> str:
    """Draw the pictures into ``folder`` and return the page that shows them."""
    lines = ["# Benchmarks", ""]
    for result in results:
        lines += [f"## {result.name}", "", *_environment(result), ""]
        lines += PARTS[result.kind](result.data)
        if result.kind in PICTURES:
            for caption, file in draw(result.data, PICTURES[result.kind], folder, result.name):
                lines += [f"![{caption}]({file.name})", ""]
    return "\n".join(lines)


def table(columns: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table and an empty line."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size or unit == "us":
            value = seconds / size
            return f"{value:.{max(0, 2 - len(str(int(value))) + 1)}f} {unit}"
    raise AssertionError


# --- parts of the page --------------------------------------------------------------------------


def _environment(result: Result) -> list[str]:
    found = result.environment
    caches = ", ".join(f"{name} {size}" for name, size in found["caches"].items())
    commit = (found["commit"] or "unknown")[:12] + (" with changes" if found["dirty"] else "")
    lines = [
        f"{found['cpu']}, {found['isa']}, {found['threads']} of {found['cores']} cores, {caches}, "
        f"{found['memory_bytes'] / 2**30:.0f} GiB; {found['system']}, Python {found['python']}, "
        f"torch {found['torch']}"
        + (f"; {found['gpu']}, driver {found['gpu_driver']}" if found["gpu"] else "")
        + f". Commit {commit}, {found['date'][:10]}.",
        "",
        f"`{found['command']}`",
        "",
    ]
    limits = result.data.get("limits", {})
    for device, one in {"": limits}.items() if result.kind == ENGINE else limits.items():
        start, drift = one["start"], one.get("drift")
        rates = ", ".join(
            f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in start["gemm"].items()
        )
        where = f" on {device}" if device else ""
        lines.append(
            f"Measured limits{where}: GEMM {rates}; copying {start['copy'] / 1e9:.1f} GB/s"
            + (
                f"; at the end {min(drift.values()):.2f} to {max(drift.values()):.2f} of that."
                if drift
                else "; the run was stopped before its end."
            )
        )  # fmt: skip
    return lines


def _engine(data: dict[str, Any]) -> list[str]:
    sampling = data["sampling"]
    lines = [
        f"Whole generations of {data['model']} ({data['weights']} weights, bridge "
        f"{data['bridge']}, cfg {sampling['cfg']}, top_k {sampling['top_k']}, top_p "
        f"{sampling['top_p']}) without the VQ-VAE decoder; medians of runs that take turns. "
        "An asterisk: the original runs every layer, it has no other depth.",
        "",
    ]
    for (dtype, batch), rows in groups(data["rows"]).items():
        peers = [peer["peer"] for peer in rows[0]["against"]]
        columns = ["depth", "ours, ms per image", "quartiles"]
        columns += [f"{peer}, ms (times ours)" for peer in peers]
        columns += ["K/V allocated (plan)", "speed-up (ceiling)", "beyond the GEMMs"]
        cells = []
        for row in rows:
            low, high = row["ms"]["quartiles"]
            equal = row["kv_allocated_bytes"] == row["kv_planned_bytes"]
            planned = "equal" if equal else f"NOT {row['kv_planned_bytes'] / 2**20:,.1f}"
            cells.append([
                str(row["depth"]),
                f"{row['ms']['median']:,.1f}",
                f"{low:,.1f} to {high:,.1f}",
                *(
                    f"{peer['ms']['median']:,.1f} ({peer['ratio']:.2f})"
                    + ("\\*" if peer["full_depth"] else "")
                    for peer in row["against"]
                ),
                f"{row['kv_allocated_bytes'] / 2**20:,.1f} MiB ({planned})",
                f"{row['speed_up']:.2f} ({row['ceiling']:.2f})",
                f"{row['beyond_gemms']:.0%}",
            ])  # fmt: skip
        lines += [f"### {dtype}, batch {batch}", "", *table(columns, cells)]
        lines += _weights_read(rows, data["limits"]["start"]["copy"])
        for row in rows:
            # Earlier files have no such row.
            if (kv8 := row.get("kv8")) is not None:
                lines += [
                    f"Depth {row['depth']} with 8-bit K/V: {kv8['ms']['median']:,.1f} ms per image "
                    f"(exact takes {kv8['ratio']:.2f} times as long), "
                    f"{kv8['kv_allocated_bytes'] / 2**20:,.1f} MiB; greedy tokens that change: "
                    f"{kv8['greedy_changed']:.1%}.",
                    "",
                ]
    for found in data["decoder"]:
        against = ", ".join(
            f"{peer['peer']} {peer['ms']['median']:,.1f} ms ({peer['ratio']:.2f} times)"
            for peer in found["against"]
        )
        lines += [
            f"Decoder, {found['dtype']}, batch {found['batch']}: {found['ms']['median']:,.1f} ms "
            f"per image; {against}.",
            "",
        ]
    for found in data["logits"]:
        lines += [
            f"Logits of the last scale, {found['what']}: largest difference "
            f"{found['largest']:.3g}, mean {found['mean']:.3g}; their spread is "
            f"{found['spread']:.3g}.",
            "",
        ]
    for found in data.get("switch", []):  # files of before it was measured have none
        lines += [f"Switch {switch_line(found)}.", ""]
    if data["memory"]:
        cells = [
            [one["who"], str(one["batch"]), str(one["depth"]), f"{one['peak'] / 2**20:,.0f} MiB",
             f"{one['loaded'] / 2**20:,.0f} MiB"]
            for one in data["memory"]
        ]  # fmt: skip
        columns = ["one generation in a process of its own", "batch", "depth", "peak memory",
                   "with the model loaded"]  # fmt: skip
        lines += table(columns, cells)
    return lines


def _weights_read(rows: list[dict[str, Any]], bandwidth: float) -> list[str]:
    """How far from reading every weight once a product; files of before it was counted: nothing."""
    times = [
        f"depth {row['depth']} {row['ms']['median'] * row['batch'] / 1000 * bandwidth / bytes_:.2f}"
        for row in rows
        if (bytes_ := row.get("weight_bytes"))
    ]
    if not times:
        return []
    return [f"Times over reading the weights at the copy bandwidth: {', '.join(times)}.", ""]


def _kernels(data: dict[str, Any]) -> list[str]:
    lines = [
        "Contenders of a case take turns; times are medians, the ratio is that of the peer to "
        "ours within each round (above 1: ours is faster), the limit is the measured GEMM rate or "
        "copy bandwidth, whichever binds.",
        "",
    ]
    if data["quick"]:
        lines += ["A quick run: few rounds of small cases.", ""]
    infos = [one["extra_info"] for one in data["benchmarks"]]
    for op, device in dict.fromkeys((info["op"], info["device"]) for info in infos):
        cells = []
        some = [i for i in infos if (i["op"], i["device"]) == (op, device)]
        for case in dict.fromkeys(info["case"] for info in some):
            of_case = [info for info in some if info["case"] == case]
            others = ", ".join(
                f"{info['contender']} {duration(info['median'])}"
                for info in of_case
                if not info["ours"] and info["contender"] != info["peer"]
            )
            for info in of_case:
                if info["ours"]:
                    low, high = info["ratio_quartiles"]
                    rate = (
                        f"{info['achieved_flops'] / 1e9:,.0f} GFLOP/s"
                        if info["bound"] == "compute"
                        else f"{info['achieved_bandwidth'] / 1e9:,.1f} GB/s"
                    )
                    cells.append([
                        case,
                        info["contender"],
                        duration(info["median"]),
                        duration(info["peer_median"]),
                        f"{info['ratio_to_peer']:.2f}",
                        f"{low:.2f} to {high:.2f}",
                        rate,
                        f"{info['share_of_limit']:.0%}",
                        others,
                    ])  # fmt: skip
        columns = ["case", "ours", "time", some[0]["peer"], "ratio", "quartiles", "rate",
                   "of the limit", "others"]  # fmt: skip
        isa = some[0]["isa"]
        title = f"### {op} on {device}" + (f", {isa}" if isa else "")
        lines += [title, "", *table(columns, cells)]
    return lines


def _dropin(data: dict[str, Any]) -> list[str]:
    lines = [
        f"The code of `{data['family']}` itself ({data['size']}, random weights) before and after "
        "`patch`; all take turns, times are medians without the decoder.",
        "",
    ]
    cells = []
    for run in data["results"]:
        dtype = run["dtype"] + (", copies kept" if run["keep_copies"] else "")
        for name, one in run["contenders"].items():
            cells.append(
                [dtype, name, duration(one["median"]), f"{one['times_original']:.2f}",
                 f"{one['peak_mib']:,.0f} MiB", one["note"]]
            )  # fmt: skip
    columns = ["dtype", "contender", "time", "times the original", "peak beyond before", ""]
    lines += table(columns, cells)
    for run in data["results"]:
        if "depth" in run:
            found = run["depth"]
            lines += [
                f"{run['dtype']}: depth {found['depth']} over full depth {found['gained']:.2f} of "
                f"{found['ceiling']:.2f} by linear work.",
                "",
            ]
    return lines


def _training(data: dict[str, Any]) -> list[str]:
    ratio = f"ratio to {data['peer']}"
    cells = [
        [row["contender"], duration(row["median"]), f"{row[ratio]:.2f}", f"{row['loss']:.3f}"]
        for row in data["steps"]
    ]
    return [
        f"One optimiser step of {data['model']}, batch {data['batch']}, {data['dtype']} on "
        f"{data['device']}, bridge {data['bridge']}.",
        "",
        *table(["contender", "time", f"times {data['peer']}", "loss"], cells),
    ]


def _kv8(data: dict[str, Any]) -> list[str]:
    cells = [
        [row["model"], row["dtype"], str(row["depth"]), f"{row['largest']:.3f}",
         f"{row['rms']:.4f}", f"{row['top_changed']:.2%}", f"{row['greedy_changed']:.1%}"]
        for row in data["rows"]
    ]  # fmt: skip
    columns = ["model", "dtype", "depth", "largest", "rms", "likeliest token", "greedy tokens"]
    return [
        "What 8-bit K/V change: logits over their standard deviation, shares of tokens.",
        "",
        *table(columns, cells),
    ]


def _largest(data: dict[str, Any]) -> list[str]:
    cells = [
        [row["who"], str(row["depth"]), f"{row['image_bytes'] / 2**20:,.1f} MiB",
         str(row["largest"]), str(row["by_line"])]
        for row in data["rows"]
    ]  # fmt: skip
    return [
        f"{data['model']}: the largest batch that ran in {data['limit_bytes'] / 2**30:g} GiB, and "
        "where a line through two small ones reaches them.",
        "",
        *table(["who", "depth", "an image", "largest batch", "by the line"], cells),
    ]


# What shows each kind, and the name by which its pictures are drawn.
PARTS = {
    ENGINE: _engine,
    KERNELS: _kernels,
    DROPIN: _dropin,
    TRAINING: _training,
    KV8: _kv8,
    LARGEST: _largest,
}
PICTURES = {ENGINE: "engine", KERNELS: "kernels"}


def main(arguments: list[str] | None = None) -> int:
    """Write the page; 0, or 1 with one line that says why not."""
    options = tyro.cli(Options, args=arguments, prog="python -m benchmarks.report")
    try:
        results = [result for path in options.results for result in read_all(path)]
        if not results:
            raise UserError("name at least one result file")
        options.out.mkdir(parents=True, exist_ok=True)
        text = page(results, options.out)
        with atomic_write(options.out / PAGE) as temporary:
            temporary.write_text(text)
    except (UserError, OSError) as error:
        print(f"report: error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {options.out / PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
