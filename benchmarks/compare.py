"""Whether anything became slower: two results compared by ratio to the peer, never by time.

    python -m benchmarks.compare OLD.json NEW.json [--tolerance 0.1]

OLD and NEW are result files of either kind, or folders of them. Exits with 1 if a ratio fell by
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
    """How much a ratio may fall: 0.1 is a tenth."""
    partial: bool = False
    """NEW may leave cases out; they are still listed."""


@dataclass(frozen=True)
class Verdict:
    """regressions: (what, old, new), worst first.  missing: cases of OLD only.  improved: how
    many rose by more than the tolerance.  compared: how many were in both.
    """

    regressions: list[tuple[str, Ratio, Ratio]]
    missing: list[str]
    improved: int
    compared: int


def compare(old: list[Result], new: list[Result], tolerance: float) -> Verdict:
    """Every ratio of OLD beside NEW's.

    Raises:
        UserError: nothing is in both.
    """
    before = {what: ratio for result in old for what, ratio in ratios(result)}
    after = {what: ratio for result in new for what, ratio in ratios(result)}
    both = [what for what in before if what in after]
    if not both:
        raise UserError("the two results have no case in common")
    worse = [
        (what, before[what], after[what])
        for what in both
        if after[what].ratio < before[what].ratio * (1 - tolerance)
    ]
    worse.sort(key=lambda one: one[2].ratio / one[1].ratio)
    improved = sum(after[w].ratio > before[w].ratio * (1 + tolerance) for w in both)
    return Verdict(worse, [w for w in before if w not in after], improved, len(both))


def differences(old: list[Result], new: list[Result]) -> list[str]:
    """What of the machines is not the same: ratios travel better than times, but not everywhere."""
    found = []
    for name in ("cpu", "isa", "threads", "torch", "gpu"):
        left, right = ({str(r.environment.get(name)) for r in some} for some in (old, new))
        if left != right:
            found.append(f"{name}: {', '.join(sorted(left))} / {', '.join(sorted(right))}")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Print the verdict; 0 or 1."""
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
    for what, before, after in verdict.regressions:
        # Quartiles that overlap say that the machine was restless, not that all is well.
        overlap = " (their quartiles overlap)" if after.high >= before.low else ""
        print(
            f"slower: {what}: {before.ratio:.2f} -> {after.ratio:.2f} "
            f"({after.ratio / before.ratio - 1:+.0%}){overlap}"
        )
    for what in verdict.missing:
        print(f"missing: {what}")
    print(
        f"{verdict.compared} ratios compared, tolerance {options.tolerance:.0%}: "
        f"{len(verdict.regressions)} slower, {verdict.improved} faster, "
        f"{len(verdict.missing)} missing"
    )
    return int(bool(verdict.regressions or (verdict.missing and not options.partial)))


if __name__ == "__main__":
    sys.exit(main())
