"""pytest benchmarks --json FILE: every case of every op, one test for each implementation."""

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
from variant.bench.roofline import Peaks, drift, measure_peaks


def pytest_addoption(parser):
    parser.addoption(
        "--quick", action="store_true", help="few rounds of a few small cases: under a minute"
    )
    parser.addoption(
        "--json", type=Path, metavar="FILE", help="file for the results, for benchmarks.report"
    )
    parser.addoption(
        "--seconds", type=float, help="start no new case of a bench file after this time"
    )
    parser.addoption(
        "--hmar-repo", type=Path, help="clone of NVlabs/HMAR, to time its block-causal kernel"
    )


class Session:
    """State of one run: limits of each device, the comparison being reported, finished cases.

    seconds: no new case of a bench file is started after this time; None is without limit.
    """

    def __init__(self, quick: bool, seconds: float | None = None) -> None:
        self.quick, self.seconds = quick, seconds
        self.started: dict[str, float] = {}
        self.limits: dict[str, Peaks] = {}
        self.current: tuple[Any, ...] | None = None
        self.cases: list[dict[str, Any]] = []

    def limit(self, device: str, dtype: str) -> Peaks:
        """Measured once for each device and dtype, before the first comparison that needs it."""
        peaks = self.limits.get(device)
        if peaks is None or dtype not in peaks.gemm:
            new = measure_peaks(device, [getattr(torch, dtype)], quick=self.quick)
            peaks = new if peaks is None else Peaks(peaks.gemm | new.gemm, peaks.copy)
            self.limits[device] = peaks
        return peaks

    def out_of_time(self, file: str) -> bool:
        """Whether ``seconds`` have passed since the first case of a bench file."""
        elapsed = time.monotonic() - self.started.setdefault(file, time.monotonic())
        return self.seconds is not None and elapsed > self.seconds


def keep_memory():
    """Let glibc keep freed memory, so that the time of an op excludes the clearing of new pages.

    With new pages 4.8 ms became 19 (adaln_modulate, 64 MiB in, 64 MiB out, two Zen 4 cores). The
    tensors of the engine are small enough for glibc to keep their memory by default.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # other C libraries do not have it
        mmap_max, trim_threshold = -4, -1  # M_MMAP_MAX, M_TRIM_THRESHOLD of malloc.h
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)


def pytest_configure(config):
    keep_memory()
    config.stash[SESSION] = Session(config.getoption("--quick"), config.getoption("--seconds"))
    if config.getoption("--hmar-repo") is not None:
        REPOSITORIES["hmar"] = config.getoption("--hmar-repo").resolve()


SESSION = pytest.StashKey[Session]()


def pytest_generate_tests(metafunc):
    """One test for each implementation of each case; those of one case follow each other."""
    if "implementation" not in metafunc.fixturenames:
        return
    quick = metafunc.config.getoption("--quick")
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    parameters = [
        pytest.param(device, case, name, id=f"{device}-{case.name}-{name}")
        for device in devices
        for case in metafunc.module.CASES
        if device in case.devices and (case.quick or not quick)
        for name in metafunc.module.IMPLEMENTATIONS
    ]
    metafunc.parametrize(("device", "case", "implementation"), parameters)


@pytest.fixture
def report_timing(request, benchmark):
    """report_timing(op, case, device, implementation, build): reports one implementation.

    The first test of a case builds the comparison and times all its implementations.
    """
    session = request.config.stash[SESSION]

    def report(op, case, device, implementation, build):
        limits = session.limit(device, case.dtype)
        key = op, case.name, device
        if session.current is None or session.current[0] != key:
            session.current = None  # free the tensors of the case before
            if session.out_of_time(request.path.name):
                pytest.skip(f"{request.path.name}: its {session.seconds:g} seconds have passed")
            # torch.compile stops compiling a function after eight shapes.
            torch.compiler.reset()
            torch.manual_seed(0)
            comparison = build(case, device, session.quick)
            samples, wrong = run(comparison, device=device, quick=session.quick)
            # Free the tensors that the calls and the check hold.
            comparison.calls = {}
            comparison.check = lambda name, result: None
            session.current = key, comparison, samples, wrong
            session.cases.append(record(op, case, device, comparison, samples, limits))
        _, comparison, samples, wrong = session.current
        if implementation in wrong:
            pytest.fail(f"{wrong[implementation]}: not timed", pytrace=False)
        if implementation not in samples:
            reason = f"this case has no implementation {implementation}"
            pytest.skip(comparison.missing.get(implementation, reason))
        benchmark.group = f"{op}, {device}, {case.name}"
        replay.load(samples[implementation])
        benchmark.pedantic(lambda: None, rounds=len(samples[implementation].seconds))

    return report


def pytest_sessionfinish(session):
    """Write the cases with a description of the machine and the limits at the end."""
    config = session.config
    path, run_state = config.getoption("--json"), config.stash[SESSION]
    if path is None or not run_state.cases:
        return
    limits = {}
    for device, start in run_state.limits.items():
        dtypes = [getattr(torch, name) for name in start.gemm]
        end = measure_peaks(device, dtypes, quick=run_state.quick)
        limits[device] = {
            "start": start.to_dict(),
            "end": end.to_dict(),
            "drift": drift(start, end),
        }
    result = {
        "format": KERNELS,
        "quick": run_state.quick,
        "environment": environment(["pytest", *config.invocation_params.args]),
        "limits": limits,
        "cases": run_state.cases,
    }
    write_result(path, result)


def pytest_terminal_summary(terminalreporter, config):
    """Say where the results are."""
    path = config.getoption("--json")
    if path is not None and config.stash[SESSION].cases:
        terminalreporter.write_line(f"wrote {path}")
