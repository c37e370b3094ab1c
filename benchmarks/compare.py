"""Compare two results by their ratios to the peer, never by absolute times.

    python -m benchmarks.compare OLD.json NEW.json [--tolerance 0.1]

OLD and NEW are result files of any kind, or folders of them. Exits with 1 if a ratio fell by
more than the tolerance, or if a case of OLD is missing in NEW (``--partial`` allows that).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmarks.results import Ratio, Result, ratios, read_all
from variant.errors import UserError


@dataclass
class Options:
    """Compare two results by ratio to the peer.

    Example: python -m benchmarks.compare benchmarks/results/kernels.json new.json
    """

    old: tyro.conf.Positional[Path]
    """Result file, or a folder of them."""
    new: tyro.conf.Positional[Path]
    """Result file, or a folder of them."""
    tolerance: float = 0.1
    """Largest relative fall of a ratio that is accepted: 0.1 is a tenth."""
    partial: bool = False
    """Allow cases of OLD that are missing in NEW; they are still listed."""


@dataclass(frozen=True)
class Verdict:
    """regressions: (case, old, new), worst first.  missing: cases of OLD only.  improved: number
    of ratios that rose by more than the tolerance.  compared: number of ratios in both.
    """

    regressions: list[tuple[str, Ratio, Ratio]]
    missing: list[str]
    improved: int
    compared: int


def compare(old: list[Result], new: list[Result], tolerance: float) -> Verdict:
    """Compare every ratio of OLD with that of NEW.

    Raises:
        UserError: OLD and NEW have no case in common.
    """
    before = {case: ratio for result in old for case, ratio in ratios(result)}
    after = {case: ratio for result in new for case, ratio in ratios(result)}
    both = [case for case in before if case in after]
    if not both:
        raise UserError("the two results have no case in common")
    regressions = [
        (case, before[case], after[case])
        for case in both
        if after[case].ratio < before[case].ratio * (1 - tolerance)
    ]
    regressions.sort(key=lambda regression: regression[2].ratio / regression[1].ratio)
    improved = sum(after[case].ratio > before[case].ratio * (1 + tolerance) for case in both)
    missing = [case for case in before if case not in after]
    return Verdict(regressions, missing, improved, len(both))


def differences(old: list[Result], new: list[Result]) -> list[str]:
    """A line for each property in which the machines differ: ratios may depend on it too."""
    lines = []
    for name in ("cpu", "isa", "threads", "torch", "gpu"):
        left, right = (
            {str(result.environment.get(name)) for result in results} for results in (old, new)
        )
        if left != right:
            lines.append(f"{name}: {', '.join(sorted(left))} / {', '.join(sorted(right))}")
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Print the comparison; 1 if something became slower or is missing, else 0."""
    options = tyro.cli(Options, args=arguments, prog="python -m benchmarks.compare")
    try:
        if not 0 <= options.tolerance < 1:
            raise UserError(f"--tolerance must be in [0, 1); got {options.tolerance}")
        old, new = read_all(options.old), read_all(options.new)
        verdict = compare(old, new, options.tolerance)
    except UserError as error:
        print(f"compare: error: {error}", file=sys.stderr)
        return 1
    for line in differences(old, new):
        print(f"not the same machine: {line}")
    for case, before, after in verdict.regressions:
        # Overlapping quartiles may be noise; they do not prove that nothing became slower.
        overlap = " (their quartiles overlap)" if after.high >= before.low else ""
        print(
            f"slower: {case}: {before.ratio:.2f} -> {after.ratio:.2f} "
            f"({after.ratio / before.ratio - 1:+.0%}){overlap}"
        )
    for case in verdict.missing:
        print(f"missing: {case}")
    print(
        f"{verdict.compared} ratios compared, tolerance {options.tolerance:.0%}: "
        f"{len(verdict.regressions)} slower, {verdict.improved} faster, "
        f"{len(verdict.missing)} missing"
    )
    return int(bool(verdict.regressions or (verdict.missing and not options.partial)))


if __name__ == "__main__":
    sys.exit(main())
