"""Result files of every kind: reading them, and what is compared between two of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from variant.errors import UserError

KERNELS, ENGINE = "variant-kernel-bench-1", "variant-engine-bench-2"
DROPIN, TRAINING = "variant-dropin-1", "variant-training-step-1"
KV8, LARGEST = "variant-kv8-error-1", "variant-largest-batch-1"
# Where a file of each kind comes from.
KINDS = {
    KERNELS: "pytest benchmarks --benchmark-json",
    ENGINE: "variant bench --json",
    DROPIN: "python -m benchmarks.dropin --json",
    TRAINING: "python -m benchmarks.training_step --json",
    KV8: "python -m benchmarks.kv8 --json",
    LARGEST: "python -m benchmarks.largest_batch --json",
}


@dataclass(frozen=True)
class Result:
    """One result file. name: its stem.  kind: a key of KINDS."""

    name: str
    kind: str
    data: dict[str, Any]

    @property
    def environment(self) -> dict[str, Any]:
        """Where it was measured."""
        return self.data["environment"]


def read(path: Path) -> Result:
    """Raises: UserError for a file that is missing or is no result file."""
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
    """One file, or every result file of a folder: a long run may be split into several."""
    if not path.is_dir():
        return [read(path)]
    found = [read(file) for file in sorted(path.glob("*.json"))]
    if not found:
        raise UserError(f"{path}: holds no .json file")
    return found


@dataclass(frozen=True)
class Ratio:
    """What a comparison looks at. ratio: above 1 ours is faster; low, high: its quartiles."""

    ratio: float
    low: float
    high: float


def ratios(result: Result) -> Iterator[tuple[str, Ratio]]:
    """(what, how many times the peer takes as long) for everything of ours; never a time."""
    if result.kind == KERNELS:
        for one in result.data["benchmarks"]:
            info = one["extra_info"]
            if info["ours"]:
                what = (
                    f"{info['op']}, {info['device']}, {info['case']}: {info['contender']} against "
                    f"{info['peer']}"
                )
                yield what, Ratio(info["ratio_to_peer"], *info["ratio_quartiles"])
        return
    if result.kind == DROPIN:
        for run in result.data["results"]:
            kept = ", copies kept" if run["keep_copies"] else ""
            where = f"{result.data['family']} {result.data['size']}, {run['dtype']}{kept}"
            for name, one in run["contenders"].items():
                if name != "original":
                    peer = run["contenders"]["original"]["seconds"]
                    each = sorted(a / b for a, b in zip(peer, one["seconds"], strict=True))
                    ratio = Ratio(one["times_original"], each[0], each[-1])
                    yield f"{where}: {name} against original", ratio
        return
    if result.kind == TRAINING:
        data = result.data
        where = f"{data['model']}, training step, batch {data['batch']}, {data['dtype']}"
        for row in data["steps"]:
            if row["contender"] != data["peer"]:
                what = f"{where}: {row['contender']} against {data['peer']}"
                yield what, Ratio(row[f"ratio to {data['peer']}"], *row["ratio_quartiles"])
        return
    if result.kind in (KV8, LARGEST):
        return  # no timing
    model = result.data["model"]
    for row in result.data["rows"]:
        where = f"{model}, batch {row['batch']}, {row['dtype']}, depth {row['depth']}"
        for peer in row["against"]:
            what = f"{where}: against {peer['peer']}"
            yield what, Ratio(peer["ratio"], *peer["ratio_quartiles"])
        if row["ceiling"] > 1:
            speed_up = row["speed_up"]
            yield f"{where}: over own full depth", Ratio(speed_up, speed_up, speed_up)
    for one in result.data["decoder"]:
        for peer in one["against"]:
            what = f"{model}, decoder, batch {one['batch']}, {one['dtype']}: against {peer['peer']}"
            yield what, Ratio(peer["ratio"], *peer["ratio_quartiles"])
