"""Run cases in forked children, so that a crash, a hang or a huge allocation belongs to one case.

The parent must not run torch with several threads before: a forked child of OpenMP's threads hangs.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import random
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from tests.robustness.progress import Progress

MIB, GIB = 2**20, 2**30
# A new child costs 10 to 20 ms.
CASES_PER_CHILD = 250
BUSY = 0.01  # share of the wall clock for which a case that does not hang computes
TICK = 1.0  # seconds between two calls of ``waiting``


@dataclass(frozen=True)
class Limits:
    """Of one case. Seconds of CPU, so that a busy machine makes no case fail; bytes of memory.

    wall_seconds: without an answer, of which the case computes for less than a hundredth: it hangs.
    cases_per_child: what a case leaves behind ends with its child.
    """

    cpu_seconds: float = 20
    wall_seconds: float = 240
    memory: int = 2 * GIB
    cases_per_child: int = CASES_PER_CHILD


class Failed(AssertionError):
    """The case does not hold; the message says what came and what was expected."""


# A case, what went wrong or None, and what the case returned.
Result = tuple[int, str | None, Any]


class Ended(str):
    """How a child ended that did not finish its case."""


def rng_of(seed: int, case: int) -> random.Random:
    """The random numbers of one case."""
    return random.Random(f"{seed}:{case}")


def run_cases(
    run: Callable[[int], object],
    cases: Iterable[int],
    limits: Limits = Limits(),
    describe: Callable[[int], str] | None = None,
    quiet: bool = True,
    waiting: Callable[[int], object] = lambda case: None,
) -> Iterator[Result]:
    """The result of each case; ``run`` raises where a case fails, and returns plain values.

    Args:
        describe: the text of a case that ended its process and so could not give its own.
        quiet: discard what the cases print.
        waiting: called with the number of a case about every second while it runs.
    """
    left = list(cases)
    while left:
        batch = left[: limits.cases_per_child]
        done = 0
        for case, text, value in _run_in_child(run, batch, limits, quiet, waiting):
            done += 1
            if isinstance(text, Ended):
                text = f"{describe(case)}: {text}" if describe else str(text)
            yield case, text, value
        left = left[done:]


def _run_in_child(
    run: Callable[[int], object],
    cases: list[int],
    limits: Limits,
    quiet: bool,
    waiting: Callable[[int], object],
) -> Iterator[Result]:
    """Runs cases until the first that ends the child."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _child(run, cases, writing, limits, quiet)
    os.close(writing)
    status, finished = None, 0
    with os.fdopen(reading, "rb") as pipe:
        buffer = b""
        deadline, used = time.monotonic() + limits.wall_seconds, 0.0
        while finished < len(cases):
            rest = deadline - time.monotonic()
            ready, _, _ = select.select([pipe], [], [], max(0, min(TICK, rest)))
            if not ready and rest > TICK:
                waiting(cases[finished])
                continue
            before, used = used, _cpu_seconds(child) if not ready else used
            if not ready and used - before > BUSY * limits.wall_seconds:
                # On a busy machine; the seconds of CPU will end it.
                deadline = time.monotonic() + limits.wall_seconds
                continue
            if not ready:
                os.kill(child, signal.SIGKILL)
                status = f"no answer after {limits.wall_seconds:g} s"
                break
            data = os.read(pipe.fileno(), 1 << 16)
            if not data:
                break
            deadline, used = time.monotonic() + limits.wall_seconds, _cpu_seconds(child)
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                case, text, value = json.loads(line)
                finished += 1
                yield case, text, value
    _, code = os.waitpid(child, 0)
    if finished < len(cases):
        yield cases[finished], Ended(status or _reason(code, limits)), None


def _cpu_seconds(process: int) -> float:
    """Seconds for which a process has computed; 0 if it has ended."""
    try:
        with open(f"/proc/{process}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _reason(code: int, limits: Limits) -> str:
    if os.WIFEXITED(code):
        return f"ended the process with exit code {os.WEXITSTATUS(code)}"
    number = os.WTERMSIG(code)
    if number == signal.SIGPROF:
        return f"not done after {limits.cpu_seconds:g} s of CPU"
    return f"crash: killed by {signal.Signals(number).name}"


def _child(
    run: Callable[[int], object], cases: list[int], writing: int, limits: Limits, quiet: bool
) -> None:
    try:
        faulthandler.disable()
        if quiet:
            null = os.open(os.devnull, os.O_RDWR)
            for stream in (1, 2):
                os.dup2(null, stream)
        limit_memory(limits.memory)
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        for case in cases:
            signal.setitimer(signal.ITIMER_PROF, limits.cpu_seconds)
            text = value = None
            try:
                value = run(case)
            except Failed as error:
                text = " ".join(str(error).split())
            except BaseException as error:
                if not quiet:
                    traceback.print_exc()
                last = traceback.extract_tb(error.__traceback__)[-1]
                place = f"{os.path.basename(last.filename)}:{last.lineno}"
                text = f"{type(error).__name__} at {place}: {' '.join(str(error).split())}"
            signal.setitimer(signal.ITIMER_PROF, 0)
            os.write(writing, json.dumps([case, text and text[:600], value]).encode() + b"\n")
    finally:
        os._exit(0)


def limit_memory(more: int) -> None:
    """Allow this process ``more`` bytes of address space beyond what it has now."""
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + more
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def single_thread() -> None:
    """One thread in this process, and no network."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    torch.set_num_threads(1)


def option(name: str, default: int) -> int:
    """An environment variable ``VARIANT_ROBUSTNESS_<NAME>``, or the default."""
    return int(os.environ.get(f"VARIANT_ROBUSTNESS_{name}", default))


def cases_of(arguments: argparse.Namespace) -> range:
    """The numbers of the cases that a command was asked for."""
    if arguments.case is not None:
        return range(arguments.case, arguments.case + 1)
    return range(arguments.first, arguments.first + arguments.cases)


def main(
    module: str,
    run: Callable[[int, int], object],
    default_cases: int,
    limits: Limits = Limits(),
    extra: Callable[[argparse.ArgumentParser], None] | None = None,
    prepare: Callable[[argparse.Namespace], str] | None = None,
    describe: Callable[[int, int], str] | None = None,
    finish: Callable[[list[Any]], list[str]] | None = None,
) -> int:
    """The command of a generator: run cases, print one line for each failure that repeats it.

    Its progress goes to standard error.

    Args:
        run: called with a seed and a case.
        prepare: gets the arguments; returns the words that repeat its own options.
        describe: the text of a case that crashed.
        finish: gets what the cases returned; returns further failures.
    Returns:
        0, or 1 if a case failed.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}")
    parser.add_argument("--seed", type=int, default=option("SEED", 0))
    parser.add_argument("--cases", type=int, default=default_cases)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--case", type=int, help="run this case only, and show what it prints")
    parser.add_argument("--all-failures", action="store_true", help="print more than 20")
    if extra:
        extra(parser)
    arguments = parser.parse_args()
    one = arguments.case is not None
    progress = Progress(module, 1 if one else arguments.cases)
    single_thread()
    words = prepare(arguments) if prepare else ""
    command = f"python -m {module}{words} --seed {arguments.seed}"
    progress.prepared()
    cases = cases_of(arguments)
    failures, started = 0, time.monotonic()
    seed = arguments.seed
    text_of = (lambda case: describe(seed, case)) if describe else None
    values = []
    for case, text, value in run_cases(
        lambda case: run(seed, case),
        cases,
        limits,
        text_of,
        quiet=not one,
        waiting=progress.waiting,
    ):
        values.append(value)
        progress.case(text is not None)
        if text is not None:
            failures += 1
            if failures <= 20 or arguments.all_failures:
                print(f"{command} --case {case}: {text}", flush=True)
    values = [value for value in values if value is not None]
    for text in finish(values) if finish and not one else ():
        failures += 1
        print(f"{command} --cases {len(cases)}: {text}", flush=True)
    seconds = time.monotonic() - started
    print(f"{module}: {len(cases)} cases, {failures} failures, {seconds:.0f} s")
    with suppress(BrokenPipeError):
        sys.stdout.flush()
    return 1 if failures else 0
