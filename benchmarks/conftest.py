"""pytest benchmarks --json FILE: every case of every op, each contender a parameter."""

from __future__ import annotations

import ctypes
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.harness import REPOSITORIES, record, replay, run
from benchmarks.results import KERNELS
from variant.bench.environment import environment
from variant.bench.result_file import write_result
from variant.bench.roofline import Limits, drift, measure_limits


def pytest_addoption(parser):
    parser.addoption(
        "--quick", action="store_true", help="a few small cases, few rounds: under a minute"
    )
    parser.addoption(
        "--json", type=Path, metavar="FILE", help="file for the results, for benchmarks.report"
    )
    parser.addoption(
        "--seconds", type=float, help="a file of benchmarks begins no new case after this long"
    )
    parser.addoption(
        "--hmar-repo", type=Path, help="clone of NVlabs/HMAR: its block-causal kernel takes part"
    )


class Session:
    """Limits of each device, the contest that is being reported, and all cases so far."""

    def __init__(self, quick: bool, seconds: float | None = None) -> None:
        self.quick, self.seconds = quick, seconds
        self.begun: dict[str, float] = {}
        self.limits: dict[str, Limits] = {}
        self.current: tuple[Any, ...] | None = None
        self.cases: list[dict[str, Any]] = []

    def limit(self, device: str, dtype: str) -> Limits:
        """Measured once for each device and dtype, before the first contest that needs it."""
        known = self.limits.get(device)
        if known is None or dtype not in known.gemm:
            new = measure_limits(device, [getattr(torch, dtype)], quick=self.quick)
            known = new if known is None else Limits(known.gemm | new.gemm, known.copy)
            self.limits[device] = known
        return known

    def spent(self, file: str) -> bool:
        """Whether a file has had its seconds, counted from its first case."""
        since = time.monotonic() - self.begun.setdefault(file, time.monotonic())
        return self.seconds is not None and since > self.seconds


def keep_memory():
    """Let glibc keep freed memory, so that a large result costs its op, not the clearing of pages.

    Fresh pages made 19 ms of what are 4.8 (adaln_modulate, 64 MiB in, 64 MiB out, two Zen 4
    cores). The engine's own tensors are small enough to be kept anyway.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # other C libraries have no such switch
        most_mapped, trim_threshold = -4, -1
        mallopt(most_mapped, 0)
        mallopt(trim_threshold, 2**31 - 1)


def pytest_configure(config):
    keep_memory()
    config.stash[SESSION] = Session(config.getoption("--quick"), config.getoption("--seconds"))
    if config.getoption("--hmar-repo") is not None:
        REPOSITORIES["hmar"] = config.getoption("--hmar-repo").resolve()


SESSION = pytest.StashKey[Session]()


def pytest_generate_tests(metafunc):
    """Cases outside, contenders inside: those of one case report one after the other."""
    if "contender" not in metafunc.fixturenames:
        return
    quick = metafunc.config.getoption("--quick")
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    found = [
        pytest.param(device, case, name, id=f"{device}-{case.name}-{name}")
        for device in devices
        for case in metafunc.module.CASES
        if device in case.devices and (case.quick or not quick)
        for name in metafunc.module.PEERS
    ]
    metafunc.parametrize(("device", "case", "contender"), found)


@pytest.fixture
def compete(request, benchmark):
    """compete(op, case, device, contender, build): checks, alternates, reports one contender.

    The first contender of a case builds the contest and lets all of them take turns.
    """
    session = request.config.stash[SESSION]

    def report(op, case, device, contender, build):
        limits = session.limit(device, case.dtype)
        key = op, case.name, device
        if session.current is None or session.current[0] != key:
            session.current = None  # the last contest's tensors go first
            if session.spent(request.path.name):
                pytest.skip(f"the {session.seconds:g} seconds of {request.path.name} are spent")
            # After eight shapes of one function torch.compile would leave the ninth uncompiled.
            torch.compiler.reset()
            torch.manual_seed(0)
            contest = build(case, device, session.quick)
            samples, wrong = run(contest, device=device, quick=session.quick)
            contest.calls = {}
            contest.check = lambda name, answer: None
            session.current = key, contest, samples, wrong
            session.cases.append(record(op, case, device, contest, samples, limits))
        _, contest, samples, wrong = session.current
        if contender in wrong:
            pytest.fail(f"{wrong[contender]}: not timed", pytrace=False)
        if contender not in samples:
            pytest.skip(contest.missing.get(contender, f"{contender} has no part in this case"))
        benchmark.group = f"{op}, {device}, {case.name}"
        replay.load(samples[contender])
        benchmark.pedantic(lambda: None, rounds=len(samples[contender].seconds))

    return report


def pytest_sessionfinish(session):
    """Write the cases with a description of the machine and the limits at the end."""
    config = session.config
    path, found = config.getoption("--json"), config.stash[SESSION]
    if path is None or not found.cases:
        return
    limits = {}
    for device, start in found.limits.items():
        dtypes = [getattr(torch, name) for name in start.gemm]
        end = measure_limits(device, dtypes, quick=found.quick)
        limits[device] = {
            "start": start.to_dict(),
            "end": end.to_dict(),
            "drift": drift(start, end),
        }
    result = {
        "format": KERNELS,
        "quick": found.quick,
        "environment": environment(["pytest", *config.invocation_params.args]),
        "limits": limits,
        "cases": found.cases,
    }
    write_result(path, result)


def pytest_terminal_summary(terminalreporter, config):
    """Say where the results are."""
    path = config.getoption("--json")
    if path is not None and config.stash[SESSION].cases:
        terminalreporter.write_line(f"wrote {path}")
