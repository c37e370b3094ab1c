"""Prints the branch coverage of each package, and fails below a bound.

    python -m coverage json -o report.json
    python tests/branch_coverage.py report.json variant_kernels=95 variant=90

A branch is a jump from one line to another that the code can take; the share of them that the tests
take is smaller than the share of lines. Files below the bound of their package are listed first.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def shares(report: dict, package: str) -> dict[str, tuple[int, int]]:
    """Per file of ``package`` with branches: how many of them were taken, how many it has."""
    counts = {}
    for file, entry in report["files"].items():
        summary = entry["summary"]
        if Path(file).parts[0] == package and summary["num_branches"]:
            counts[file] = (summary["covered_branches"], summary["num_branches"])
    return counts


def main(arguments: list[str]) -> int:
    report = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    low = []
    totals = []
    for argument in arguments[1:]:
        package, bound = argument.split("=")
        counts = shares(report, package)
        if not counts:
            print(f"{package}: no file of it was measured")
            return 2
        for file, (taken, every) in sorted(
            counts.items(), key=lambda item: item[1][0] / item[1][1]
        ):
            if 100 * taken < float(bound) * every:
                print(f"{100 * taken / every:6.1f} %  {taken:4} of {every:4} branches  {file}")
        taken, every = (sum(column) for column in zip(*counts.values(), strict=True))
        totals.append(
            f"{package}: {100 * taken / every:.1f} % of {every} branches (at least {bound} %)"
        )
        if 100 * taken < float(bound) * every:
            low.append(package)
    print(*totals, sep="\n")
    if low:
        print(f"below the bound: {', '.join(low)}; write tests of the files listed above")
    return 1 if low else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
