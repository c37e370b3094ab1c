"""Result files of the kernel benchmarks to the table that "auto" goes by.

    python -m benchmarks.winners benchmarks/results              what the table would be
    python -m benchmarks.winners benchmarks/results --write      write it into the package

Backends are ranked within a case, where they took turns: each place goes to the first in the
preference order that the fastest of those left does not clearly beat. It does so with a median
more than 3 % below the other's and quartiles that do not overlap. Of several runs of one case the
latest counts. Where all cases of an op, a kind of device and a dtype agree, one line says so.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.reading import KERNELS, Result, read_all
from variant.errors import UserError
from variant.files import atomic_write
from variant_kernels import ops, winners
from variant_kernels.dispatch.request import dtype_name
from variant_kernels.kv_quantization import KV8_DTYPE
from variant_kernels.winners import PREFERENCE

# A lead below this is taken for noise.
CLEAR = 0.03
# Backends that win on a clock only: they are measured, and taken where a call names them.
ASKED_FOR_ONLY = {"flashinfer": "plans on the host, which waits for the device"}
# What a case was measured with, where its sizes do not say it: parts of names in the bench files.
WITH_GRADIENT, OTHER_DRAW, PAGES_8_BITS = "-forward+backward", "-generator", "-kv8-"
# Attention with qk_norm inside goes where the attention alone goes.
WITH_QK_NORM = "-qk_norm-"


@dataclass(frozen=True)
class Measured:
    """One case of one result file.

    key: op, device, kind, dtypes, kv_dtype, gradient: what an entry is found by.
    """

    key: tuple[str, str, str, tuple[str, ...], str | None, bool]
    sizes: tuple[tuple[str, int], ...]
    name: str
    source: str
    date: str
    ranking: tuple[str, ...]


# --- reading results ----------------------------------------------------------------------------


def _sizes(op: str, shape: Mapping[str, Any]) -> dict[str, int]:
    """A bench file's sizes by the names that a request has for them."""
    if op in ("adaln_modulate", "gated_residual_adaln"):
        return {"row": shape["width"], "rows": shape["batch"] * shape["tokens"]}
    if op == "sample_tokens":
        return {"row": shape["vocab"], "rows": shape["batch"] * shape["tokens"]}
    if op in ("qk_norm_append_paged_kv", "append_paged_kv", "qk_norm"):
        rows = shape["batch"] * shape["tokens"] * shape["heads"]
        return {"head_dim": shape["head_dim"], "rows": rows}
    if op == "block_causal_attention":
        rows, tokens = shape["batch"] * shape["heads"], shape["tokens"]
        return {"head_dim": shape["head_dim"], "rows": rows, "queries": tokens, "keys": tokens}
    if op == "paged_attention":
        # Result files without a page size are of pages of 16 tokens.
        return {
            "head_dim": shape["head_dim"],
            "page_size": shape.get("page_size", 16),
            "rows": shape["rows"] * shape["heads"],
            "queries": shape["queries"],
            "keys": shape["keys"],
        }
    raise UserError(f"{op}: benchmarks.winners does not know which sizes of it decide")


def _dtypes(op: str, info: Mapping[str, Any]) -> tuple[str, ...]:
    """Those of a request that count: of stream and rows in adaln, else the first."""
    if op in ("adaln_modulate", "gated_residual_adaln"):
        return info["shape"]["stream"], info["shape"]["rows"]
    return (info["dtype"],)


def measured(result: Result) -> Iterator[Measured]:
    """Every case of a result file in which two backends took turns.

    Raises:
        UserError: a quick run, or a result that does not say on which kind of GPU it was measured.
    """
    source = f"{result.name}.json"
    if result.data["quick"]:
        raise UserError(f"{source}: a quick run has too few rounds to decide anything")
    cases: dict[tuple[str, str, str], dict[str, Mapping[str, Any]]] = {}
    for one in result.data["benchmarks"]:
        info = one["extra_info"]
        if info["contender"] in PREFERENCE:
            case = cases.setdefault((info["op"], info["device"], info["case"]), {})
            case[info["contender"]] = info
    for (op, device, name), found in cases.items():
        if op not in ops.tables():
            raise UserError(f"{source}: no op is named {op}")
        backends = {
            backend: info
            for backend, info in found.items()
            if backend in ops.tables()[op] and backend not in ASKED_FOR_ONLY
        }
        if len(backends) < 2 or name.endswith(OTHER_DRAW) or WITH_QK_NORM in name:
            continue
        info = next(iter(backends.values()))
        kind = info["isa"] if device == "cpu" else info.get("kind")
        if kind is None:
            raise UserError(f"{source}: {op}, {name} does not say on which kind of {device}")
        dtypes = _dtypes(op, info)
        kv_dtype = dtype_name(KV8_DTYPE) if PAGES_8_BITS in name else None
        yield Measured(
            (op, device, kind, dtypes, kv_dtype, name.endswith(WITH_GRADIENT)),
            tuple(_sizes(op, info["shape"]).items()),
            name,
            source,
            result.environment["date"],
            rank(backends),
        )


def rank(backends: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    """Backends of one case, the best first, by the rule at the top of this file."""
    left = sorted(backends, key=PREFERENCE.index)
    ranking = []
    while left:
        fastest = min(left, key=lambda name: backends[name]["median"])
        place = next(n for n in left if not _clearly(backends[fastest], backends[n]))
        ranking.append(place)
        left.remove(place)
    return tuple(ranking)


def _clearly(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether one is faster than the other, beyond what noise explains."""
    apart = one["quartiles"][1] < other["quartiles"][0]
    return apart and one["median"] < (1 - CLEAR) * other["median"]


# --- the table ----------------------------------------------------------------------------------


def table(results: Iterable[Result]) -> dict[str, Any]:
    """What the package reads: see ``variant_kernels/winners.py``."""
    results = list(results)
    latest: dict[tuple[Any, ...], Measured] = {}
    for one in sorted((m for r in results for m in measured(r)), key=lambda m: (m.date, m.source)):
        latest[(one.key, one.sizes)] = one
    entries: dict[tuple[Any, ...], list[Measured]] = {}
    for one in latest.values():
        entries.setdefault(one.key, []).append(one)
    used = sorted({one.source for one in latest.values()})
    environments = {f"{result.name}.json": result.environment for result in results}
    return {
        "format": winners.FORMAT,
        "sources": {source: _source(environments[source]) for source in used},
        "entries": [_entry(key, entries[key]) for key in sorted(entries, key=_in_order)],
    }


def _in_order(key: tuple[Any, ...]) -> tuple[Any, ...]:
    op, device, kind, dtypes, kv_dtype, gradient = key
    return list(ops.tables()).index(op), device, kind, dtypes, kv_dtype or "", gradient


def _source(found: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "date": found["date"][:10],
        "device": found["gpu"] or found["cpu"],
        "torch": found["torch"],
        "triton": found["triton"],
        "driver": found["gpu_driver"],
    }


def _entry(key: tuple[Any, ...], cases: list[Measured]) -> dict[str, Any]:
    op, device, kind, dtypes, kv_dtype, gradient = key
    rankings = {case.ranking for case in cases}
    if len(rankings) == 1:
        sources = sorted({case.source for case in cases})
        lines = [{"ranking": list(rankings.pop()), "sources": sources, "sizes": {}}]
    else:
        lines = [
            {"ranking": list(case.ranking), "sources": [case.source], "sizes": dict(case.sizes)}
            for case in sorted(cases, key=lambda case: case.sizes)
        ]
    return {
        "op": op,
        "device": device,
        "kind": kind,
        "dtypes": list(dtypes),
        "kv_dtype": kv_dtype,
        "gradient": gradient,
        "cases": lines,
    }


def text(data: Mapping[str, Any]) -> str:
    """The file: one line for a source and for a case, so that a change can be read."""
    sources = ",\n".join(
        f"  {json.dumps(name)}: {json.dumps(one)}" for name, one in data["sources"].items()
    )
    entries = []
    for entry in data["entries"]:
        head = json.dumps({name: one for name, one in entry.items() if name != "cases"})[:-1]
        cases = ",\n".join(f"   {json.dumps(case)}" for case in entry["cases"])
        entries.append(f'  {head}, "cases": [\n{cases}\n  ]}}')
    listed = ",\n".join(entries)
    return (
        f'{{\n "format": {json.dumps(data["format"])},\n "sources": {{\n{sources}\n }},\n'
        f' "entries": [\n{listed}\n ]\n}}\n'
    )


# --- the command --------------------------------------------------------------------------------


def lines(data: Mapping[str, Any]) -> list[str]:
    """One line for each case, for reading and for comparing two tables."""
    shown = []
    for entry in data["entries"]:
        pages = f", pages of {entry['kv_dtype']}" if entry["kv_dtype"] else ""
        gradient = ", with backward" if entry["gradient"] else ""
        where = f"{entry['op']}, {entry['kind']}, {' and '.join(entry['dtypes'])}{pages}{gradient}"
        for case in entry["cases"]:
            sizes = ", ".join(f"{name} {size}" for name, size in case["sizes"].items())
            shown.append(f"{where}, {sizes or 'every size'}: {' < '.join(case['ranking'])}")
    return shown


def changes(old: Iterable[str], new: Iterable[str]) -> list[str]:
    """Lines that go and that come."""
    gone, come = list(old), list(new)
    return [
        *(f"- {line}" for line in gone if line not in set(come)),
        *(f"+ {line}" for line in come if line not in set(gone)),
    ]


def _kernel_results(paths: Iterable[Path]) -> list[Result]:
    found = []
    for path in paths:
        for result in read_all(path):
            if result.kind == KERNELS:
                found.append(result)
            elif not path.is_dir():
                raise UserError(f"{path}: is no result of the kernel benchmarks")
    if not found:
        raise UserError("name at least one result of pytest benchmarks --benchmark-json")
    names = [result.name for result in found]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{name}.json: given twice; a source is told apart by its name")
    return found


def _lines_of(path: Path) -> list[str]:
    """Those of a table that lies there; a broken one is there to be replaced."""
    try:
        winners.read(path)
    except ValueError as error:
        if path.exists():
            print(f"replaced whole: {error}", file=sys.stderr)
        return []
    return lines(json.loads(path.read_text()))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and what would change, write it if asked; 1 with one line if it cannot."""
    # argparse: the command line's own library may be missing on a bare GPU machine.
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.winners",
        description="Rank backends by result files of the kernel benchmarks.",
        epilog="Example: python -m benchmarks.winners benchmarks/results --write",
    )
    parser.add_argument(
        "results", nargs="+", type=Path, help="result files, or folders that hold some"
    )
    parser.add_argument("--write", action="store_true", help="write the table")
    parser.add_argument(
        "--to", type=Path, default=winners.PATH, help="where to; by default into the package"
    )
    options = parser.parse_args(arguments)
    try:
        data = table(_kernel_results(options.results))
        new, old = lines(data), _lines_of(options.to)
        print("\n".join(new))
        changed = changes(old, new)
        print(f"\nbeside {options.to.name} as it is:" + ("" if changed else " no change"))
        print("\n".join(changed))
        if options.write:
            with atomic_write(options.to) as temporary:
                temporary.write_text(text(data))
            winners.read(options.to)
            print(f"wrote {options.to}")
    except (UserError, OSError) as error:
        print(f"winners: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
