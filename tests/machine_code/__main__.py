"""``python -m tests.machine_code [BEGINNING ...] [--write]``: compare or write the table.

The Triton that is imported decides which table; see the package's docstring.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor

from tests.machine_code import figures, rules, table


def main(arguments: list[str] | None = None) -> int:
    """Print what differs; 1 if something does and is not written."""
    parser = argparse.ArgumentParser(prog="python -m tests.machine_code", description=__doc__)
    parser.add_argument("beginning", nargs="*", help="only cases whose key begins so")
    parser.add_argument("--write", action="store_true", help="write the table anew")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args(arguments)
    import triton

    version = triton.__version__
    cases = figures.shipped_cases()
    chosen = [key for key in cases if key.startswith(tuple(args.beginning or [""]))]
    if not chosen:
        parser.error(f"no case begins with {args.beginning}; the first are {list(cases)[:3]}")
    expected = table.read(version)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, mp_context=context) as pool:
        got = dict(zip(chosen, pool.map(figures.measure_key, chosen), strict=True))
    print(f"Triton {version}: {len(chosen)} of {len(cases)} cases compiled for {figures.TARGET}")
    if args.write:
        # Read again: another run may have written other cases meanwhile.
        kept = {key: old for key, old in table.read(version).items() if key in cases}
        table.write(version, {**kept, **got})
    differ = False
    for key in sorted({*chosen, *(() if args.beginning else expected)}):
        if key not in got:
            lines = ["the case is no longer compiled"]
        elif key not in expected:
            lines = ["the table has no such case"]
        else:
            # To the last digit where the table is written.
            lines = table.differences(
                expected[key], got[key], tolerance=0 if args.write else table.TOLERANCE
            )
        if lines:
            differ = True
            print("\n  ".join([f"{key}:", *lines]) if args.write
                  else table.complaint(key, version, lines))  # fmt: skip
    broken = [
        one for key in chosen for one in rules.violations(
            key, figures.elements_per_thread(cases[key]), got[key])
    ]  # fmt: skip
    exceptions = rules.read_exceptions(rules.EXCEPTIONS.read_text())
    left = rules.unexcused(broken, exceptions, version)
    for one in left:
        print(f"{one.key}: rule {one.rule}: {one.text}")
    if args.write:
        print(f"wrote {table.path_for(version)}")
    return int(bool(left) or (differ and not args.write))


if __name__ == "__main__":
    sys.exit(main())
