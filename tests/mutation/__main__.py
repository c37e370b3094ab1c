"""``python -m tests.mutation``: changes the code in one place at a time and runs its tests.

A change ("mutant") that no test notices shows code that no test holds. The operators are mutmut's;
its runner is not used: it writes all changes of a file into the file and chooses one at each call,
and Triton, torch.compile and ops that are registered at import do not see such a choice.

For each module one process imports the packages and collects the tests, and forks for each mutant:
the fork runs the tests that reach the changed line on the changed functions, the quickest first
(``collected.py``). Changes that act during an import take a process that imports the changed source
(``forked.py``).
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

from tests.mutation.changes import Mutant, mutants_of
from tests.mutation.collected import Job, verdicts_of
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

    def say(mutant: Mutant, tests: int, verdict: str, by: str) -> None:
        counts[verdict] += 1
        place = place_of(mutant)
        print(f"{verdict:9} {place}  {mutant}  {by}", flush=True)
        if options.json:
            record = {
                "place": place,
                "change": str(mutant),
                "verdict": verdict,
                "by": by,
                "tests": tests,
            }
            with options.json.open("a") as file:
                file.write(json.dumps(record) + "\n")

    by_module: dict[str, list[Mutant]] = {}
    for module, mutant in picked:
        by_module.setdefault(module, []).append(mutant)
    for module, mutants in by_module.items():
        files = TARGETS[module]
        if module not in reaches:
            alike = sorted(other for other in by_module if TARGETS[other] == files)
            # These tests run once, for the lines that each of them reaches.
            print(f"{', '.join(alike)}: running the tests of {len(files)} files", flush=True)
            reaches |= reach_of(alike, files)
        reach = reaches[module]
        print(f"{module}: {len(reach.seconds)} tests, {sum(reach.seconds.values()):.0f} s")
        jobs = [Job(mutant, reach.tests_of(mutant)) for mutant in mutants]
        left = set(range(len(jobs)))
        for index, verdict, by in verdicts_of(jobs, files, options.seconds):
            mutant, tests = jobs[index]
            # A survivor that also runs during the import may act there.
            if verdict != "survived" or mutant.line not in reach.imported:
                left.remove(index)
                say(mutant, len(tests), verdict, by)
        for index in sorted(left):
            mutant, tests = jobs[index]
            say(mutant, len(tests), *verdict_of(module, mutant, tests, options.seconds))
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
