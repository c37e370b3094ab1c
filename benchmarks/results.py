"""Read result files of every kind, and list the ratios by which two of them are compared."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from variant.errors import UserError

KERNELS, ENGINE = "variant-kernel-bench-2", "variant-engine-bench-2"
DROPIN, TRAINING = "variant-dropin-2", "variant-training-step-2"
KV8, LARGEST = "variant-kv8-error-1", "variant-largest-batch-1"
VAE_LOSSES = "variant-vae-losses-1"
# A run of all of them on a GPU, in one file.
RUN = "variant-gpu-run-1"
# The command that writes a file of each kind.
KINDS = {
    KERNELS: "pytest benchmarks --json",
    ENGINE: "variant bench --json",
    DROPIN: "python -m benchmarks.dropin --json",
    TRAINING: "python -m benchmarks.training_step --json",
    KV8: "python -m benchmarks.kv8 --json",
    LARGEST: "python -m benchmarks.largest_batch --json",
    VAE_LOSSES: "python -m benchmarks.vae_losses --json",
    RUN: "python -m benchmarks.gpu",
}


@dataclass(frozen=True)
class Result:
    """One result file. name: its stem.  kind: a key of KINDS."""

    name: str
    kind: str
    data: dict[str, Any]

    @property
    def environment(self) -> dict[str, Any]:
        """The machine, its software, the command and the commit of the measurement."""
        return self.data["environment"]


def read(path: Path) -> Result:
    """Read one result file.

    Raises:
        UserError: the file is missing or is no result file.
    """
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from error
    kind = data.get("format") if isinstance(data, dict) else None
    if kind not in KINDS:
        commands = ", ".join(f"`{command}`" for command in KINDS.values())
        raise UserError(
            f'{path}: must be a result of one of {commands}, whose "format" is one of '
            f"{', '.join(KINDS)}; got {kind!r}"
        )
    return Result(path.stem, kind, data)


def read_all(path: Path) -> list[Result]:
    """Read one file, or every result file of a folder: a long run may be split into several."""
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path}: holds no .json file")
    return [part for file in files for part in parts_of(read(file))]


def parts_of(result: Result) -> list[Result]:
    """A run on a GPU as one result of each kind that it measured, after itself; others alone."""
    if result.kind != RUN:
        return [result]
    data, by_kind = result.data, dict[str, list[Any]]()
    for entry in data["results"]:
        by_kind.setdefault(entry["kind"], []).append(entry["data"])
    environment, limits = data.get("environment"), data.get("limits", {})
    if environment is None or "start" not in limits:
        return [result]  # it was stopped before it measured anything
    shared = {"environment": environment, "complete": data["complete"]}
    limits = {name: limits[name] for name in ("start", "end") if name in limits}
    found = [result]

    def add(name: str, kind: str, **fields: Any) -> None:
        found.append(Result(f"{result.name}-{name}", kind, {"format": kind, **shared, **fields}))

    engine = by_kind.get("engine", [])
    if any(part.get("rows") for part in engine):
        # A later measurement has more rounds than an earlier one of the same depth.
        lists = {
            name: _latest([row for part in engine for row in part.get(name, [])])
            for name in ("rows", "images", "decoder", "switch", "logits")
        }
        add("engine", ENGINE, **data["engine"], limits=limits, memory=[], **lists)
    if "kernel" in by_kind:
        cases = _latest(by_kind["kernel"], ("op", "case", "device"))
        add("kernels", KERNELS, quick=data["quick"], cases=cases,
            limits={data["engine"]["device"]: limits})  # fmt: skip
    for part in by_kind.get("training", [])[-1:]:
        add("training-step", TRAINING, **{k: v for k, v in part.items() if k != "format"})
    if largest := by_kind.get("largest", []):
        settings = {name: data["engine"][name] for name in ("model", "bridge")}
        rows = [part["row"] for part in largest]
        limit = largest[0]["limit_bytes"]
        add("largest-batch", LARGEST, **settings, dtype=data["dtype"], limit_bytes=limit, rows=rows)
    return found


def _latest(
    rows: list[dict[str, Any]], key: tuple[str, ...] = ("batch", "dtype", "depth", "what")
) -> list[dict[str, Any]]:
    """The last row of each key, in the order in which the keys first came."""
    return list({tuple(row.get(name) for name in key): row for row in rows}.values())


@dataclass(frozen=True)
class Ratio:
    """Time of the peer over ours: above 1 ours is faster.  low, high: quartiles."""

    ratio: float
    low: float
    high: float


def kernel_timings(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each implementation of each case of a KERNELS file.

    Returns:
        The fields of the case and of the implementation, with "implementation", its name;
        "peer_median", seconds; "achieved_flops", FLOP/s; "achieved_bandwidth", bytes/s; and
        "fraction_of_limit", the shortest possible time over the median.
    """
    rows = []
    for case in data["cases"]:
        shared = {name: value for name, value in case.items() if name != "implementations"}
        peer_median = case["implementations"][case["peer"]]["median"]
        for name, timing in case["implementations"].items():
            seconds = timing["median"]
            rows.append({
                **shared,
                **timing,
                "implementation": name,
                "peer_median": peer_median,
                "achieved_flops": case["flop"] / seconds,
                "achieved_bandwidth": case["bytes"] / seconds,
                "fraction_of_limit": case["limit_seconds"] / seconds,
            })  # fmt: skip
    return rows


def ratios(result: Result) -> Iterator[tuple[str, Ratio]]:
    """(case, ratio to the peer) for every implementation of ours; absolute times are left out."""
    read_ratios = RATIOS.get(result.kind)
    if read_ratios is not None:  # files without timings have none
        yield from read_ratios(result.data)


def _kernel_ratios(data: Mapping[str, Any]) -> Iterator[tuple[str, Ratio]]:
    for row in kernel_timings(data):
        if row["ours"]:
            case = f"{row['op']}, {row['device']}, {row['case']}"
            yield (
                f"{case}: {row['implementation']} against {row['peer']}",
                Ratio(row["ratio_to_peer"], *row["ratio_quartiles"]),
            )


def _engine_ratios(data: Mapping[str, Any]) -> Iterator[tuple[str, Ratio]]:
    model = data["model"]
    for row in data["rows"]:
        case = f"{model}, batch {row['batch']}, {row['dtype']}, depth {row['depth']}"
        for peer in row["against"]:
            yield (
                f"{case}: against {peer['peer']}",
                Ratio(peer["ratio"], *peer["ratio_quartiles"]),
            )
        if row["ceiling"] > 1:
            speed_up = row["speed_up"]
            yield f"{case}: over own full depth", Ratio(speed_up, speed_up, speed_up)
    for row in data["decoder"]:
        case = f"{model}, decoder, batch {row['batch']}, {row['dtype']}"
        for peer in row["against"]:
            yield (
                f"{case}: against {peer['peer']}",
                Ratio(peer["ratio"], *peer["ratio_quartiles"]),
            )


def _dropin_ratios(data: Mapping[str, Any]) -> Iterator[tuple[str, Ratio]]:
    for run in data["results"]:
        kept = ", copies kept" if run["keep_copies"] else ""
        case = f"{data['family']} {data['size']}, {run['dtype']}{kept}"
        for name, timing in run["implementations"].items():
            if name != "original":
                yield (
                    f"{case}: {name} against original",
                    Ratio(timing["ratio_to_original"], *timing["ratio_quartiles"]),
                )


def _training_ratios(data: Mapping[str, Any]) -> Iterator[tuple[str, Ratio]]:
    case = f"{data['model']}, training step, batch {data['batch']}, {data['dtype']}"
    for row in data["steps"]:
        if row["implementation"] != data["peer"]:
            yield (
                f"{case}: {row['implementation']} against {data['peer']}",
                Ratio(row["ratio_to_peer"], *row["ratio_quartiles"]),
            )


RATIOS = {
    KERNELS: _kernel_ratios,
    ENGINE: _engine_ratios,
    DROPIN: _dropin_ratios,
    TRAINING: _training_ratios,
}
