"""``python -m tests.mutation``: changes the code in one place at a time and runs its tests.

A change ("mutant") that no test notices shows code that no test holds. The operators are mutmut's;
its runner is not used: it writes all changes of a file into the file and chooses one at each call,
and Triton, torch.compile and ops that are registered at import do not see such a choice.

One process imports torch and pytest and forks for each mutant. The child replaces one module's
source while it is imported and runs the tests that reach the changed line, quickest first.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path

from tests.mutation.changes import Mutant, mutants_of
from tests.mutation.forked import Reach, reach_of, verdict_of
from tests.mutation.targets import ROOT, TARGETS


def sample(seed: int, count: int, chosen: list[str]) -> list[tuple[str, Mutant]]:
    """``count`` mutants, spread over the modules by the square root of their numbers of mutants."""
    draw = random.Random(seed)
    every = {module: mutants_of(module) for module in TARGETS if not chosen or module in chosen}
    for mutants in every.values():
        draw.shuffle(mutants)
    shares = {module: len(mutants) ** 0.5 for module, mutants in every.items()}
    whole = sum(shares.values())
    picked = [
        (module, mutant)
        for module, mutants in every.items()
        for mutant in mutants[: max(1, round(count * shares[module] / whole))]
    ]
    return picked


def not_killed(file: Path) -> list[tuple[str, Mutant]]:
    """The mutants of an earlier run that no test killed, as far as the code still has them."""
    records = [json.loads(line) for line in file.read_text().splitlines()]
    wanted = {(r["place"], r["change"]) for r in records if r["verdict"] != "killed"}
    return [
        (module, mutant)
        for module in TARGETS
        for mutant in mutants_of(module)
        if (place_of(mutant), str(mutant)) in wanted
    ]


def place_of(mutant: Mutant) -> str:
    return f"{mutant.path.relative_to(ROOT)}:{mutant.line}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=160)
    parser.add_argument("--seconds", type=float, default=60, help="limit of one mutant's tests")
    parser.add_argument("--least", type=float, default=90, help="per cent of decided, killed")
    parser.add_argument("--json", type=Path, help="every verdict, one object a line")
    parser.add_argument("--again", type=Path, help="those of a --json file that were not killed")
    parser.add_argument("modules", nargs="*", help=f"some of: {' '.join(TARGETS)}")
    options = parser.parse_args()
    if unknown := set(options.modules) - set(TARGETS):
        parser.error(f"no such module: {' '.join(sorted(unknown))}")

    counts = {"killed": 0, "survived": 0, "undecided": 0}
    reaches: dict[str, Reach] = {}
    if options.again:
        picked = not_killed(options.again)
        if not picked:
            parser.error(f"{options.again}: the code has none of its mutants any more")
    else:
        picked = sample(options.seed, options.count, options.modules)
    for module, mutant in picked:
        if module not in reaches:
            files = TARGETS[module]
            alike = {other for other, _ in picked if TARGETS[other] == files}
            # These tests run once, for the lines that each of them reaches.
            names = ", ".join(sorted(alike))
            print(f"{names}: running the tests of {len(files)} files", flush=True)
            reaches |= reach_of(sorted(alike), files)
            seconds = reaches[module].seconds
            print(f"{module}: {len(seconds)} tests, {sum(seconds.values()):.0f} s", flush=True)
        tests = reaches[module].tests_of(mutant.line)
        start = time.monotonic()
        verdict, by = verdict_of(module, mutant, tests, options.seconds)
        counts[verdict] += 1
        place = place_of(mutant)
        print(f"{verdict:9} {place}  {mutant}  {by}", flush=True)
        if options.json:
            record = {
                "place": place,
                "change": str(mutant),
                "verdict": verdict,
                "by": by,
                "tests": len(tests),
                "seconds": round(time.monotonic() - start, 1),
            }
            with options.json.open("a") as file:
                file.write(json.dumps(record) + "\n")
    decided = counts["killed"] + counts["survived"]
    share = 100 * counts["killed"] / decided if decided else 0.0
    print(
        f"{counts['killed']} killed, {counts['survived']} survived, "
        f"{counts['undecided']} undecided: {share:.1f} % of the decided are killed "
        f"(at least {options.least:g} %)"
    )
    return 0 if share >= options.least else 1


if __name__ == "__main__":
    sys.exit(main())
