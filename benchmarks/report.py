"""One Markdown page with pictures from result files.

    python -m benchmarks.report RESULT.json ... --out FOLDER

``benchmarks.results.KINDS`` lists the commands whose result files it reads.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from benchmarks.plots import draw, groups
from benchmarks.results import (
    DROPIN,
    ENGINE,
    KERNELS,
    KV8,
    LARGEST,
    RUN,
    TRAINING,
    VAE_LOSSES,
    Result,
    kernel_timings,
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
        lines += [f"## {result.name}", "", *environment_lines(result), ""]
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


def environment_lines(result: Result) -> list[str]:
    """The machine, the command and the measured limits of a result."""
    machine = result.data.get("environment")
    if machine is None:
        return ["The run was stopped before it described its machine."]
    caches = ", ".join(f"{name} {size}" for name, size in machine["caches"].items())
    commit = (machine["commit"] or "unknown")[:12] + (" with changes" if machine["dirty"] else "")
    lines = [
        f"{machine['cpu']}, {machine['isa']}, {machine['threads']} of {machine['cores']} cores, "
        f"{caches}, {machine['memory_bytes'] / 2**30:.0f} GiB; {machine['system']}, "
        f"Python {machine['python']}, "
        f"torch {machine['torch']}"
        + (f"; {machine['gpu']}, driver {machine['gpu_driver']}" if machine["gpu"] else "")
        + f". Commit {commit}, {machine['date'][:10]}.",
        "",
        f"`{machine['command']}`",
        "",
    ]
    limits = result.data.get("limits", {})
    by_device = {"": limits} if result.kind in (ENGINE, RUN) and limits else limits
    for device, measured in by_device.items():
        start, drift = measured["start"], measured.get("drift")
        rates = ", ".join(
            f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in start["gemm"].items()
        )
        where = f" on {device}" if device else ""
        lines.append(
            f"Measured limits{where}: GEMM {rates}; copying {start['copy'] / 1e9:.1f} GB/s"
            + (
                f"; at the end {min(drift.values()):.2f} to {max(drift.values()):.2f} of that."
                if drift
                else "."
                if "end" in measured
                else "; the run was stopped before its end."
            )
        )  # fmt: skip
    return lines


def _engine(data: dict[str, Any]) -> list[str]:
    sampling = data["sampling"]
    rounds = {row["ms"]["rounds"] for row in data["rows"]}
    runs = "one run of each, without a spread"
    if max(rounds) > 1:
        counts = " to ".join(str(count) for count in sorted({min(rounds), max(rounds)}))
        runs = f"medians of {counts} interleaved runs"
    lines = [
        f"Whole generations of {data['model']} ({data['weights']} weights, bridge "
        f"{data['bridge']}, cfg {sampling['cfg']}, top_k {sampling['top_k']}, top_p "
        f"{sampling['top_p']}) without the VQ-VAE decoder; {runs}. "
        "An asterisk: the original has one depth and runs every layer. Speed-up: over our own full "
        "depth; in brackets how many times fewer FLOP the products with weights are. Attention and "
        "all else change by other factors, so that the speed-up may be larger or smaller.",
        "",
    ]
    for (dtype, batch), rows in groups(data["rows"]).items():
        lines += [f"### {dtype}, batch {batch}", "", *_depths(rows)]
        lines += _weights_read(rows, data["limits"]["start"]["copy"])
        lines += _eight_bit_kv(rows)
    lines += _decoder(data["decoder"])
    lines += _images(data)
    lines += _logits(data["logits"])
    for switch in data.get("switch", []):  # older files have none
        lines += [f"Switch {switch_line(switch)}.", ""]
    return lines + _peak_memory(data["memory"])


def _depths(rows: list[dict[str, Any]]) -> list[str]:
    """Time and K/V memory of every depth, beside the peers."""
    peers = [peer["peer"] for peer in rows[0]["against"]]
    columns = ["depth", "ours, ms per image", "quartiles"]
    columns += [f"{peer}, ms (times ours)" for peer in peers]
    columns += ["K/V allocated (plan)", "speed-up (fewer FLOP)", "beyond the GEMMs"]
    cells = []
    for row in rows:
        low, high = row["ms"]["quartiles"]
        equal = row["kv_allocated_bytes"] == row["kv_planned_bytes"]
        planned = "equal" if equal else f"NOT {row['kv_planned_bytes'] / 2**20:,.1f}"
        cells.append([
            str(row["depth"]),
            f"{row['ms']['median']:,.1f}",
            f"{low:,.1f} to {high:,.1f}" if row["ms"]["rounds"] > 1 else "-",
            *(
                f"{peer['ms']['median']:,.1f} ({peer['ratio']:.2f})"
                + ("\\*" if peer["full_depth"] else "")
                for peer in row["against"]
            ),
            f"{row['kv_allocated_bytes'] / 2**20:,.1f} MiB ({planned})",
            f"{row['speed_up']:.2f} ({row['ceiling']:.2f})",
            f"{row['beyond_gemms']:.0%}",
        ])  # fmt: skip
    return table(columns, cells)


def _weights_read(rows: list[dict[str, Any]], bandwidth: float) -> list[str]:
    """Our time over that of reading each weight once a product, at ``bandwidth`` bytes/s."""
    times = [
        f"depth {row['depth']} {row['ms']['median'] * row['batch'] / 1000 * bandwidth / size:.2f}"
        for row in rows
        if (size := row.get("weight_bytes"))  # older files have none
    ]
    if not times:
        return []
    return [f"Times over reading the weights at the copy bandwidth: {', '.join(times)}.", ""]


def _eight_bit_kv(rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    for row in rows:
        kv8 = row.get("kv8")  # older files have none
        if kv8 is not None:
            lines += [
                f"Depth {row['depth']} with 8-bit K/V: {kv8['ms']['median']:,.1f} ms per image "
                f"(exact takes {kv8['ratio']:.2f} times as long), "
                f"{kv8['kv_allocated_bytes'] / 2**20:,.1f} MiB; greedy tokens that change: "
                f"{kv8['greedy_changed']:.1%}.",
                "",
            ]
    return lines


def _decoder(rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    for row in rows:
        peers = ", ".join(
            f"{peer['peer']} {peer['ms']['median']:,.1f} ms ({peer['ratio']:.2f} times)"
            for peer in row["against"]
        )
        lines += [
            f"Decoder, {row['dtype']}, batch {row['batch']}: {row['ms']['median']:,.1f} ms "
            f"per image; {peers}.",
            "",
        ]
    return lines


def with_decoder(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Generations with the decoder: measured ones, else the sums of what was timed by itself.

    Returns:
        rows with "dtype", "batch", "depth", "ms" and "against" with "peer", "ms", "ratio" and
        "full_depth", as a result file has them; none where the decoder was not timed.
    """
    if data.get("images"):  # older files have none
        return data["images"]
    decoders = {(row["dtype"], row["batch"]): row for row in data["decoder"]}
    sums = []
    for row in data["rows"]:
        decoder = decoders.get((row["dtype"], row["batch"]))
        if decoder is None:
            continue
        ours = row["ms"]["median"] + decoder["ms"]["median"]
        theirs = {peer["peer"]: peer["ms"]["median"] for peer in decoder["against"]}
        against = []
        for peer in row["against"]:
            if peer["peer"] in theirs:
                ms = peer["ms"]["median"] + theirs[peer["peer"]]
                against.append({**peer, "ms": {"median": ms}, "ratio": ms / ours})
        sums.append({**row, "ms": {"median": ours}, "against": against})
    return sums


def _images(data: dict[str, Any]) -> list[str]:
    """Generations with the decoder, a line for each depth."""
    cells = []
    for row in with_decoder(data):
        peers = ", ".join(
            f"{peer['peer']} {peer['ms']['median']:,.1f} ms ({peer['ratio']:.2f} times)"
            + ("\\*" if peer["full_depth"] else "")
            for peer in row["against"]
        )
        ms = f"{row['ms']['median']:,.1f}"
        cells.append([row["dtype"], str(row["batch"]), str(row["depth"]), ms, peers or "-"])
    how = "with the decoder" + ("" if data.get("images") else ", the sum of both medians")
    columns = [how, "batch", "depth", "ours, ms per image", "peers"]
    return table(columns, cells) if cells else []


def _logits(rows: list[dict[str, Any]]) -> list[str]:
    # A comparison that does not involve our dtype is there once for each of our dtypes.
    texts = dict.fromkeys(
        f"Logits of the last scale, {row['what']}: largest difference {row['largest']:.3g}, "
        f"mean {row['mean']:.3g}; their spread is {row['spread']:.3g}."
        for row in rows
    )
    return [line for text in texts for line in (text, "")]


def _peak_memory(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    cells = [
        [row["who"], str(row["batch"]), str(row["depth"]), f"{row['peak'] / 2**20:,.0f} MiB",
         f"{row['loaded'] / 2**20:,.0f} MiB"]
        for row in rows
    ]  # fmt: skip
    columns = ["one generation in a process of its own", "batch", "depth", "peak memory",
               "with the model loaded"]  # fmt: skip
    return table(columns, cells)


def _kernels(data: dict[str, Any]) -> list[str]:
    lines = [
        "The implementations of a case run interleaved. Times are medians; the ratio is the median "
        "over the rounds of the peer's time over ours (above 1: ours is faster). The limit is the "
        "measured GEMM rate or copy bandwidth, whichever takes longer.",
        "",
    ]
    if data["quick"]:
        lines += ["A quick run: few rounds of small cases.", ""]
    by_op: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in kernel_timings(data):
        by_op.setdefault((row["op"], row["device"]), []).append(row)
    for (op, device), rows in by_op.items():
        isa = rows[0]["isa"]
        title = f"### {op} on {device}" + (f", {isa}" if isa else "")
        lines += [title, "", *_op_table(rows)]
    return lines


def _op_table(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each implementation of ours in each case of one op."""
    cells = []
    for case in dict.fromkeys(row["case"] for row in rows):
        of_case = [row for row in rows if row["case"] == case]
        others = ", ".join(
            f"{row['implementation']} {duration(row['median'])}"
            for row in of_case
            if not row["ours"] and row["implementation"] != row["peer"]
        )
        for row in of_case:
            if row["ours"]:
                low, high = row["ratio_quartiles"]
                cells.append([
                    case,
                    row["implementation"],
                    duration(row["median"]),
                    duration(row["peer_median"]),
                    f"{row['ratio_to_peer']:.2f}",
                    f"{low:.2f} to {high:.2f}",
                    f"{row['achieved_flops'] / 1e9:,.0f} GFLOP/s"
                    if row["bound"] == "compute"
                    else f"{row['achieved_bandwidth'] / 1e9:,.1f} GB/s",
                    f"{row['fraction_of_limit']:.0%}",
                    others,
                ])  # fmt: skip
    columns = ["case", "ours", "time", rows[0]["peer"], "ratio", "quartiles", "rate",
               "of the limit", "others"]  # fmt: skip
    return table(columns, cells)


def _dropin(data: dict[str, Any]) -> list[str]:
    lines = [
        f"The code of `{data['family']}` itself ({data['size']}, random weights) before and after "
        "`patch`; interleaved runs, medians without the decoder.",
        "",
    ]
    cells = []
    for run in data["results"]:
        dtype = run["dtype"] + (", copies kept" if run["keep_copies"] else "")
        for name, timing in run["implementations"].items():
            cells.append(
                [dtype, name, duration(timing["median"]), f"{timing['ratio_to_original']:.2f}",
                 f"{timing['peak_mib']:,.0f} MiB", timing["note"]]
            )  # fmt: skip
    columns = ["dtype", "implementation", "time", "original / this", "additional peak memory", ""]
    lines += table(columns, cells)
    for run in data["results"]:
        if "depth" in run:
            depth = run["depth"]
            lines += [
                f"{run['dtype']}: `patch` at depth {depth['depth']} is {depth['gained']:.2f} times "
                f"as fast as at full depth; its products with weights are {depth['ceiling']:.2f} "
                "times fewer FLOP.",
                "",
            ]
    return lines


def _training(data: dict[str, Any]) -> list[str]:
    cells = [
        [
            row["implementation"],
            duration(row["median"]),
            f"{row['ratio_to_peer']:.2f}",
            *_of_linear_work(row),
            f"{row['loss']:.3f}",
        ]
        for row in data["steps"]
    ]  # fmt: skip
    columns = [
        *("implementation", "time", f"{data['peer']} / this"),
        *("full depth / this", "the same in FLOP of linear layers", "share"),
        "loss",
    ]
    return [
        f"One optimiser step of {data['model']}, batch {data['batch']}, {data['dtype']} on "
        f"{data['device']}, bridge {data['bridge']}.",
        "",
        *table(columns, cells),
    ]


def _of_linear_work(row: dict[str, Any]) -> tuple[str, str, str]:
    """A depth's speed-up over full depth, that of its products with weights, and their ratio."""
    if row.get("ceiling", 1) == 1:
        return "", "", ""
    speed_up, ceiling = row["speed_up"], row["ceiling"]
    return f"{speed_up:.2f}", f"{ceiling:.2f}", f"{speed_up / ceiling:.0%}"


def _kv8(data: dict[str, Any]) -> list[str]:
    cells = [
        [row["model"], row["dtype"], str(row["depth"]), f"{row['largest']:.3f}",
         f"{row['rms']:.4f}", f"{row['top_changed']:.2%}", f"{row['greedy_changed']:.1%}"]
        for row in data["rows"]
    ]  # fmt: skip
    columns = ["model", "dtype", "depth", "largest", "rms", "likeliest token", "greedy tokens"]
    return [
        "The error of 8-bit K/V: change of the logits over their standard deviation, share of "
        "tokens that change.",
        "",
        *table(columns, cells),
    ]


def _vae_losses(data: dict[str, Any]) -> list[str]:
    def row(run: dict[str, Any], by_scale: str, digits: str) -> str:
        return " ".join(f"{value:{digits}}" for value in run[by_scale])

    one = data["rows"][0]
    cells = [
        [run["name"], run["losses"], run.get("sha256", "")[:12], f"{run['fd']:.3f}",
         f"{run['fd'] - one['fd']:+.3f} (s.e. {run['fd_change_error']:.3f})"
         if run["fd_change_error"] else "",
         f"{run['psnr']:.2f} dB",
         f"{run['ssim']:.4f}", row(run, "psnr_by_scale", ".2f"),
         row(run, "codes_used_by_scale", ".0%")]
        for run in data["rows"]
    ]  # fmt: skip
    columns = ["run", "losses besides the quantizer's", "weights (SHA-256)", "rFD", "change of rFD",
               "PSNR", "SSIM", "PSNR from the first scales", "codes used by scale"]  # fmt: skip
    starts = {run["adversary_from"] for run in data["rows"]} - {None}
    start = f", the adversary from step {min(starts)}" if starts else ""
    origins = {run.get("start_sha256") for run in data["rows"]}
    start += "".join(f", from the weights {name[:12]}" for name in sorted(origins - {None}))
    return [
        f"VQ-VAEs of the recipe `{data['recipe']}` of that commit that differ in their losses (the "
        f"file has the settings of each): {one['steps']:,} steps of "
        f"{one['batch']} images from {one['train_images']:,} training images, one seed{start}. "
        f"Reconstructions of {data['images']:,} held-out images; rFD is the Fréchet distance of "
        f"features of a classifier ({data['classifier']['accuracy']:.1%} right) that took no part "
        f"in the training; two halves of the real images have {data['floor']:.3f}. The standard "
        "error of a change is that of the images (a jackknife), not of the seed.",
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
        "its prediction from the memory of two small batches.",
        "",
        *table(["who", "depth", "memory of an image", "largest batch", "predicted"], cells),
    ]


def _run(data: dict[str, Any]) -> list[str]:
    """What a run on a GPU measured besides the results of other kinds."""
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for entry in data["results"]:
        by_kind.setdefault(entry["kind"], []).append(entry)
    state = "" if data["complete"] else " The run was stopped before its end."
    cells = [[step["name"], f"{step['seconds']:.0f} s", step["status"]] for step in data["steps"]]
    lines = [f"One run on a GPU.{state}", "", *table(["step", "time", "outcome"], cells)]
    for entry in by_kind.get("tests", []):
        counts = [f"{n} {what}" for what, n in entry["data"].items() if isinstance(n, int)]
        lines += [f"Tests, {entry['name']}: {', '.join(counts)}.", ""]
    for entry in by_kind.get("failure", []):
        lines += [f"Not measured: {entry['step']}, {entry['name']}: {entry['data']['error']}", ""]
    for entry in by_kind.get("profile", []):
        profile = entry["data"]
        lines += [
            f"One generation, batch {profile['batch']}: {profile['kernels']} kernels take "
            f"{profile['kernel_us'] / 1e3:,.1f} of {profile['seconds'] * 1e3:,.1f} ms.",
            "",
        ]
        rows = [
            [f"`{row['name'][:70]}`", str(row["count"]), f"{row['us'] / 1e3:,.2f} ms"]
            for row in profile["by_name"][:15]
        ]
        lines += table(["kernel", "launches", "time"], rows)
    return lines


# The function that writes the part of each kind, and the kinds that have pictures.
PARTS = {
    ENGINE: _engine,
    KERNELS: _kernels,
    DROPIN: _dropin,
    TRAINING: _training,
    KV8: _kv8,
    LARGEST: _largest,
    VAE_LOSSES: _vae_losses,
    RUN: _run,
}
PICTURES = {ENGINE: "engine", KERNELS: "kernels"}


def main(arguments: list[str] | None = None) -> int:
    """Write the page; 0, or 1 with an error of one line."""
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
