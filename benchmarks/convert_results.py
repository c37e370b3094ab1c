"""Old result files to the compact form, in place; run once, not kept.

python -m benchmarks.convert_results benchmarks/results/*.json
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from variant.bench.interleaved import quartiles
from variant.bench.result_file import write_result

CASE = ("op", "case", "device", "isa", "threads", "dtype", "shape", "flop", "bytes", "bound",
        "limit_seconds", "peer")  # fmt: skip
CONTENDER = ("ours", "rounds", "iterations", "median", "quartiles", "ratio_to_peer",
             "ratio_quartiles")  # fmt: skip


def engine(value: Any) -> Any:
    """Samples become their number; medians and quartiles of them are there already."""
    if isinstance(value, dict):
        converted = {}
        for name, item in value.items():
            if name == "samples":
                assert statistics.median(item) == value.get("median", value.get("ms"))
                assert list(quartiles(item)) == value["quartiles"]
                converted["rounds"] = len(item)
            else:
                converted[name] = engine(item)
        return converted
    if isinstance(value, list):
        return [engine(item) for item in value]
    return value


def kernels(old: dict[str, Any]) -> dict[str, Any]:
    """Contenders of one case share its line; what follows from other figures goes."""
    assert old["commit_info"]["id"] == old["environment"]["commit"]
    cases: dict[tuple[str, ...], dict[str, Any]] = {}
    for one in old["benchmarks"]:
        info = one["extra_info"]
        key = info["op"], info["device"], info["case"]
        case = cases.setdefault(key, {**{name: info[name] for name in CASE}, "implementations": {}})
        assert all(case[name] == info[name] for name in CASE)
        case["implementations"][info["contender"]] = {name: info[name] for name in CONTENDER}
    for one in old["benchmarks"]:
        info = one["extra_info"]
        case = cases[info["op"], info["device"], info["case"]]
        median = info["median"]
        assert info["peer_median"] == case["implementations"][case["peer"]]["median"]
        assert info["achieved_flops"] == case["flop"] / median
        assert info["achieved_bandwidth"] == case["bytes"] / median
        assert info["share_of_limit"] == case["limit_seconds"] / median
    header = {name: old[name] for name in ("quick", "environment", "limits")}
    return {"format": "variant-kernel-bench-2", **header, "cases": list(cases.values())}


def dropin(old: dict[str, Any]) -> dict[str, Any]:
    """Seconds become quartiles of the times and of the ratios."""
    for run in old["results"]:
        contenders = run.pop("contenders")
        original = contenders["original"]["seconds"]
        run["implementations"] = {}
        for name, one in contenders.items():
            assert one["median"] == statistics.median(one["seconds"])
            each = [a / b for a, b in zip(original, one["seconds"], strict=True)]
            assert one["times_original"] == statistics.median(each)
            run["implementations"][name] = {
                "median": one["median"],
                "quartiles": quartiles(one["seconds"]),
                "ratio_to_original": one["times_original"],
                "ratio_quartiles": quartiles(each),
                "peak_mib": one["peak_mib"],
                "note": one["note"],
            }
    return {**old, "format": "variant-dropin-2"}


def main() -> None:
    """The command."""
    for path in map(Path, sys.argv[1:]):
        old = json.loads(path.read_text())
        kind = old["format"]
        if kind == "variant-engine-bench-1":
            write_result(path, engine({**old, "format": "variant-engine-bench-2"}))
        elif kind == "variant-kernel-bench-1":
            write_result(path, kernels(old))
        elif kind == "variant-dropin-1":
            write_result(path, dropin(old))
        elif kind == "variant-kv8-error-1":
            write_result(path, old)
        else:
            raise SystemExit(f"{path}: {kind}")


if __name__ == "__main__":
    main()
