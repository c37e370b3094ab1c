"""The report's pictures. Opaque and light, so that they read on a dark page too.

An implementation has the same colour in every picture; error bars are quartiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks.results import kernel_timings

# Okabe and Ito's colours, which colour-blind readers can distinguish too.
BLUE, SKY, ORANGE, RED, GREEN, PURPLE, GREY = (
    "#0072B2", "#9CCBEA", "#E69F00", "#D55E00", "#009E73", "#CC79A7", "#666666",
)  # fmt: skip
PEERS = (ORANGE, RED, GREEN, PURPLE)
STYLE = {
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "savefig.dpi": 130,
    "savefig.bbox": "tight",
}
Row = dict[str, Any]


def panels(
    count: int, title: str, *, width: float = 4.6, height: float = 3.4
) -> tuple[Figure, list[Axes]]:
    """A figure of equal panels, two in a row: three would be too small on a page."""
    columns = min(count, 2)
    if count == 1:
        width *= 1.6
    lines = -(-count // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(width * columns, height * lines), squeeze=False, layout="tight"
    )
    flat = list(axes.flat)
    for extra in flat[count:]:
        extra.set_visible(False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    return figure, flat[:count]


def save(figure: Figure, path: Path) -> Path:
    """Write the figure and free it."""
    figure.savefig(path)
    plt.close(figure)
    return path


def groups(rows: Sequence[Row]) -> dict[tuple[str, int], list[Row]]:
    """Engine rows by dtype and batch, shallowest last."""
    by_setting: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        by_setting.setdefault((row["dtype"], row["batch"]), []).append(row)
    return by_setting


def latency_by_depth(result: dict[str, Any], path: Path) -> Path:
    """Our time at each depth, split into the GEMMs timed alone and the rest, with the peers."""
    by_setting = groups(result["rows"])
    figure, axes = panels(len(by_setting), f"{result['model']}: time per image by depth")
    for axis, ((dtype, batch), rows) in zip(axes, by_setting.items(), strict=True):
        positions = list(range(len(rows)))
        ours = [row["ms"]["median"] for row in rows]
        gemms = [min(row["gemms_ms"]["median"], time) for row, time in zip(rows, ours, strict=True)]
        rest = [time - alone for time, alone in zip(ours, gemms, strict=True)]
        axis.bar(positions, gemms, color=BLUE, width=0.55, label="ours: the GEMMs alone")
        axis.bar(positions, rest, bottom=gemms, color=SKY, width=0.55, label="ours: all else")
        low, high = (
            [abs(row["ms"]["quartiles"][side] - time) for row, time in zip(rows, ours, strict=True)]
            for side in (0, 1)
        )
        axis.errorbar(
            positions, ours, yerr=[low, high], fmt="none", ecolor="black", capsize=3, lw=1
        )
        for position, time in zip(positions, ours, strict=True):
            axis.annotate(f"{time:,.0f}" if time >= 100 else f"{time:,.1f}", (position, 0),
                          xytext=(0, 3), textcoords="offset points", ha="center", color="white",
                          fontsize=9, fontweight="bold")  # fmt: skip
        for colour, index in zip(PEERS, range(len(rows[0]["against"])), strict=False):
            peers = [row["against"][index] for row in rows]
            label = peers[0]["peer"]
            times = [peer["ms"]["median"] for peer in peers]
            if any(peer["full_depth"] for peer in peers):
                axis.axhline(times[0], color=colour, lw=1.6, ls="--", label=f"{label} (all layers)")
            else:
                axis.plot(positions, times, color=colour, marker="o", lw=1.4, label=label)
        axis.set_xticks(positions, [str(row["depth"]) for row in rows])
        axis.set(xlabel="depth (layers in the flexible zone)", ylabel="ms per image")
        axis.set_title(f"{dtype}, batch {batch}")
        axis.grid(axis="x", visible=False)
        axis.margins(y=0.12)
    _legend(figure, axes)
    return save(figure, path)


def memory_by_depth(result: dict[str, Any], path: Path) -> Path:
    """Allocated K/V beside the paper's scheme, and peak memory of processes if measured."""
    by_setting = groups(result["rows"])
    batches = dict.fromkeys(one["batch"] for one in result["memory"])
    figure, axes = panels(len(by_setting) + len(batches), f"{result['model']}: memory by depth")
    for axis, ((dtype, batch), rows) in zip(axes, by_setting.items(), strict=False):
        positions = list(range(len(rows)))
        for shift, name, colour, label in (
            (-0.2, "kv_allocated_bytes", BLUE, "K/V allocated (equals the plan)"),
            (0.2, "kv_paper_bytes", ORANGE, "K/V of the paper's scheme, same dtype"),
        ):
            sizes = [row[name] / 2**20 for row in rows]
            bars = axis.bar([p + shift for p in positions], sizes, 0.38, color=colour, label=label)
            axis.bar_label(bars, fmt=lambda x: f"{x:,.0f}" if x >= 10 else f"{x:.1f}", fontsize=8)
        axis.set_xticks(positions, [str(row["depth"]) for row in rows])
        axis.set(xlabel="depth (layers in the flexible zone)", ylabel="K/V in MiB")
        axis.set_title(f"{dtype}, batch {batch}")
        axis.grid(axis="x", visible=False)
        axis.margins(y=0.1)
    for axis, batch in zip(axes[len(by_setting) :], batches, strict=True):
        sizes = [one for one in result["memory"] if one["batch"] == batch]
        names = [
            f"{one['who']}, depth {one['depth']}" if one["who"].startswith("ours") else one["who"]
            for one in sizes
        ]
        loaded = [one["loaded"] / 2**20 for one in sizes]
        on_top = [one["peak"] / 2**20 - below for one, below in zip(sizes, loaded, strict=True)]
        positions = list(range(len(sizes)))[::-1]
        axis.barh(positions, loaded, color=GREY, label="process with the model loaded")
        bars = axis.barh(positions, on_top, left=loaded, color=RED, label="on top while generating")
        axis.bar_label(bars, [f" {one['peak'] / 2**20:,.0f}" for one in sizes], fontsize=8)
        axis.set_yticks(positions, names, fontsize=8)
        axis.set(xlabel="peak memory of the process in MiB")
        axis.set_title(f"whole process, batch {batch}")
        axis.grid(axis="y", visible=False)
        axis.margins(x=0.15)
    _legend(figure, axes)
    return save(figure, path)


def time_by_scale(result: dict[str, Any], path: Path) -> Path:
    """Time of each scale of a generation, one line per depth."""
    by_setting = groups(result["rows"])
    figure, axes = panels(len(by_setting), f"{result['model']}: time of each scale, whole batch")
    shades = (BLUE, GREEN, ORANGE, RED, PURPLE, GREY)
    for axis, ((dtype, batch), rows) in zip(axes, by_setting.items(), strict=True):
        for colour, row in zip(shades, rows, strict=False):
            scales = range(1, len(row["scale_ms"]) + 1)
            label = f"depth {row['depth']}"
            axis.plot(scales, row["scale_ms"], color=colour, marker="o", ms=4, lw=1.6, label=label)
        if result["bridge"]:
            axis.axvline(result["bridge"] + 0.5, color=GREY, lw=1, ls=":")
            axis.annotate("bridge ends", (result["bridge"] + 0.5, 1), rotation=90, va="top",
                          xytext=(3, -2), textcoords="offset points", fontsize=8, color=GREY,
                          xycoords=("data", "axes fraction"))  # fmt: skip
        axis.set(xlabel="scale", ylabel="ms")
        axis.set_ylim(bottom=0)
        axis.set_title(f"{dtype}, batch {batch}")
        axis.xaxis.get_major_locator().set_params(integer=True)
    _legend(figure, axes)
    return save(figure, path)


def roofline(result: dict[str, Any], device: str, path: Path) -> Path | None:
    """Achieved and possible FLOP/s of compute ops; None if the result has none."""
    rows = [
        row for row in kernel_timings(result) if row["implementation"] == device and row["flop"]
    ]
    if not rows:
        return None
    limits = result["limits"][device]["start"]
    dtypes = [d for d in limits["gemm"] if any(row["dtype"] == d for row in rows)]
    figure, axes = panels(
        len(dtypes), f"Roofline on {device}: ours and the peer", width=5.2, height=4
    )
    for axis, dtype in zip(axes, dtypes, strict=True):
        some = [row for row in rows if row["dtype"] == dtype]
        intensity = [row["flop"] / row["bytes"] for row in some]
        edge = [min(intensity) / 2, max(intensity) * 2]
        roof, slope = limits["gemm"][dtype], limits["copy"]
        knee = roof / slope
        xs = sorted([edge[0], *([knee] if edge[0] < knee < edge[1] else []), edge[1]])
        axis.plot(xs, [min(roof, slope * x) / 1e9 for x in xs], color="black", lw=1.8,
                  label="GEMM rate and copy bandwidth, measured")  # fmt: skip
        for op, marker in zip(dict.fromkeys(row["op"] for row in some), "osD^v", strict=False):
            mine = [row for row in some if row["op"] == op]
            xs = [row["flop"] / row["bytes"] for row in mine]
            axis.scatter(xs, [row["flop"] / row["peer_median"] / 1e9 for row in mine], s=22,
                         marker=marker, facecolor="none", edgecolor=ORANGE,
                         label=f"{op}: {mine[0]['peer']}")  # fmt: skip
            axis.scatter(xs, [row["achieved_flops"] / 1e9 for row in mine], s=24, marker=marker,
                         color=BLUE, label=f"{op}: ours")  # fmt: skip
        axis.set(xscale="log", yscale="log", xlabel="arithmetic intensity, FLOP per byte",
                 ylabel="GFLOP/s over visible pairs")  # fmt: skip
        _plain_numbers(axis)
        axis.set_title(dtype)
    _legend(figure, axes)
    return save(figure, path)


def bandwidth(result: dict[str, Any], device: str, path: Path) -> Path | None:
    """Fraction of the copy bandwidth of ops without FLOP; None if the result has none."""
    rows = [
        row for row in kernel_timings(result) if row["implementation"] == device and not row["flop"]
    ]
    if not rows:
        return None
    ops = list(dict.fromkeys(row["op"] for row in rows))
    most = max(sum(row["op"] == op for row in rows) for op in ops)
    figure, axes = panels(
        len(ops), f"Bandwidth on {device}, of what copying reaches (label: times the peer's speed)",
        width=6.4, height=1.7 + 0.33 * most,
    )  # fmt: skip
    for axis, op in zip(axes, ops, strict=True):
        some = [row for row in rows if row["op"] == op]
        positions = list(range(len(some)))[::-1]
        ours = [row["fraction_of_limit"] for row in some]
        bars = axis.barh([p + 0.2 for p in positions], ours, 0.38, color=BLUE, label="ours")
        axis.bar_label(bars, [f" {row['ratio_to_peer']:.1f}x" for row in some], fontsize=8)
        axis.barh([p - 0.2 for p in positions],
                  [row["limit_seconds"] / row["peer_median"] for row in some], 0.38, color=ORANGE,
                  label=f"{some[0]['peer']}")  # fmt: skip
        axis.axvline(1, color="black", lw=1.4)
        axis.set_yticks(positions, [row["case"] for row in some], fontsize=8)
        axis.set(xlabel="share of the copy bandwidth (above 1: from the cache)")
        axis.set_title(op)
        axis.grid(axis="y", visible=False)
        axis.margins(x=0.12)
    _legend(figure, axes)
    return save(figure, path)


def attention_by_scale(result: dict[str, Any], device: str, path: Path) -> Path | None:
    """paged_attention's time at each scale beside SDPA's; None if no case has several scales."""
    by_case: dict[str, list[Row]] = {}
    for row in kernel_timings(result):
        if row["op"] == "paged_attention" and row["implementation"] == device:
            layout, *kv8, scale, rows, dtype = row["case"].split("-")
            scale_index = int(scale.removeprefix("scale"))
            pixels, sequences = layout.removeprefix("layout"), rows.removeprefix("rows")
            key = f"{pixels} pixels, {sequences} rows, {dtype}" + ", 8-bit K/V" * bool(kv8)
            by_case.setdefault(key, []).append({**row, "scale": scale_index})
    by_case = {title: rows for title, rows in by_case.items() if len(rows) > 1}
    if not by_case:
        return None
    figure, axes = panels(
        len(by_case), f"paged_attention on {device}: time of one call by scale",
        height=2.9,
    )  # fmt: skip
    for axis, (title, rows) in zip(axes, by_case.items(), strict=True):
        rows.sort(key=lambda row: row["scale"])
        scales = [row["scale"] + 1 for row in rows]
        axis.plot(scales, [1e6 * row["peer_median"] for row in rows], color=ORANGE, marker="o",
                  ms=4, label=f"{rows[0]['peer']}, K and V in one piece")  # fmt: skip
        ours = [1e6 * row["median"] for row in rows]
        axis.plot(scales, ours, color=BLUE, marker="o", ms=4, label="ours, from pages")
        axis.fill_between(scales, [1e6 * row["quartiles"][0] for row in rows],
                          [1e6 * row["quartiles"][1] for row in rows], color=BLUE, alpha=0.2,
                          lw=0)  # fmt: skip
        axis.set(yscale="log", xlabel="scale", ylabel="us")
        _plain_numbers(axis)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_title(title, fontsize=9)
    _legend(figure, axes)
    return save(figure, path)


def _plain_numbers(axis: Axes) -> None:
    """Numbers instead of powers on logarithmic axes."""
    for one in (axis.xaxis, axis.yaxis):
        if one.get_scale() == "log":
            low, high = one.get_view_interval()
            if high < 300 * low:  # powers of ten alone would label one tick or none
                subs = (1, 2, 5) if high > 10 * low else (1, 1.5, 2, 3, 4, 6, 8)
                one.set_major_locator(LogLocator(subs=subs))
            one.set_major_formatter("{x:g}")
            one.set_minor_formatter(NullFormatter())


def _legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """One legend below all panels, each label once."""
    handles = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        list(handles.values()), list(handles), loc="upper center", bbox_to_anchor=(0.5, 0.01),
        ncols=min(len(handles), 2 if len(axes) == 1 else 4), fontsize=9,
    )  # fmt: skip


def draw(result: dict[str, Any], kind: str, folder: Path, name: str) -> list[tuple[str, Path]]:
    """All pictures of one result file: (caption, file)."""
    with plt.rc_context(STYLE):
        if kind == "engine":
            return [
                ("Latency by depth", latency_by_depth(result, folder / f"{name}-latency.png")),
                ("Memory by depth", memory_by_depth(result, folder / f"{name}-memory.png")),
                ("Time of each scale", time_by_scale(result, folder / f"{name}-scales.png")),
            ]
        pictures = []
        for device in result["limits"]:
            ours = "cpu" if device == "cpu" else "triton"
            for caption, plot in (
                ("Attention by scale", attention_by_scale),
                ("Roofline", roofline),
                ("Bandwidth", bandwidth),
            ):
                file = folder / f"{name}-{device}-{caption.split()[0].lower()}.png"
                path = plot(result, ours, file)
                if path is not None:
                    pictures.append((f"{caption} ({device})", path))
        return pictures
