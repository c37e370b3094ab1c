"""One case of one op: check the result of each implementation, then time them interleaved.

A bench file lists ``CASES`` and ``IMPLEMENTATIONS`` and builds a :class:`Comparison` from a case.
This module and ``conftest.py`` do the rest.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from variant.bench.interleaved import Call, Samples, quartiles, ratios, time_interleaved
from variant.bench.roofline import Peaks
from variant_kernels import _C
from variant_kernels.dispatch.request import Request
from variant_kernels.dispatch.select import Backend
from variant_kernels.dispatch.support import BACKENDS

# The tolerance of the tests: one copy of it.
sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "kernels"))
from compare import Tally

ROUNDS, QUICK_ROUNDS = 20, 4
# An implementation that is neither ours nor the peer is timed in every fifth round only if a call
# takes longer.
SLOW_SECONDS = 0.1
# A public function spends microseconds on checks and dispatch. If a call takes longer than this,
# they cannot be measured, and the function is timed in every fifth round only.
OP_SECONDS = 0.005


@dataclass(frozen=True)
class Case:
    """The sizes at which an op is timed.

    name: shown by pytest; two result files are compared by it.  dtype: the limit is the GEMM rate
    of this dtype.  settings: sizes and options, read by the bench file.  quick: part of a
    ``--quick`` run.  devices: on which it runs.
    """

    name: str
    dtype: str
    settings: Mapping[str, Any]
    quick: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")


Check = Callable[[str, Any], None]

# Clones of other repositories, timed as peers: name to folder, from options such as --hmar-repo.
REPOSITORIES: dict[str, Path] = {}


@dataclass
class Comparison:
    """The implementations of one case.

    shape: sizes, for the reader.  flop: operations that must be done (visible pairs only).
    moved: bytes that must be read or written.  calls: implementations by name.  missing: the reason
    for each implementation that cannot run.  peer: the implementation to which all are compared.
    ours: names of our implementations.  check: takes a name and a result; raises AssertionError if
    the result is too far from float64.  gradient: whether autograd is part of the work; if not, all
    calls run in inference mode, as in the engine.
    """

    shape: dict[str, Any]
    flop: float
    moved: float
    calls: dict[str, Call]
    peer: str
    check: Check
    ours: tuple[str, ...] = ()
    missing: dict[str, str] = field(default_factory=dict)
    gradient: bool = False


def backends(
    impls: Mapping[str, Backend], request: Request
) -> Iterator[tuple[str, Backend, str | None]]:
    """(name, implementation, reason if it cannot serve the request) of every backend of the op."""
    for name in BACKENDS:
        if name in impls:
            yield name, impls[name], impls[name].unsupported(request)


def split(builders: Mapping[str, Call | str]) -> tuple[dict[str, Call], dict[str, str]]:
    """(calls, missing) of a :class:`Comparison` from a call, or the reason for none, by name."""
    calls = {name: call for name, call in builders.items() if not isinstance(call, str)}
    return calls, {name: reason for name, reason in builders.items() if isinstance(reason, str)}


def missing_module(name: str) -> str | None:
    """The reason for a skip if the package of a peer is not installed."""
    if importlib.util.find_spec(name.replace("-", "_")) is None:
        return f"{name} is not installed"
    return None


def near(
    exact: Sequence[Tensor],
    plain: Sequence[Tensor],
    *,
    ours: Sequence[str],
    times: Sequence[float] = (2.0,),
    pick: Callable[[str, Any], Sequence[Tensor]] = lambda name, result: (result,),
) -> Check:
    """A check by the tolerance of the tests: at most twice plain torch's error against float64,
    plus one unit in the last place. For peers the factor is eight: enough to see that they compute
    the same thing.

    Args:
        exact: results in float64.
        plain: results of plain torch in the dtype of the case.
        ours: names of our implementations.
        times: the factor of each result, where it is not two (the tests allow three for gradients).
        pick: (name, result of an implementation) -> the tensors to compare with ``exact``.
    """

    def check(name: str, result: Any) -> None:
        tally = Tally()
        factors = list(times) * (len(exact) // len(times))
        tensors = zip(pick(name, result), plain, exact, factors, strict=True)
        for index, (tensor, plain_tensor, exact_tensor, factor) in enumerate(tensors):
            allowed = factor if name in ours else 8.0
            label = f"{name}, result {index}"
            tally.add(label, tensor, plain_tensor, exact_tensor, times=allowed)
        tally.check()

    return check


def run(
    comparison: Comparison, *, device: str, quick: bool
) -> tuple[dict[str, Samples], dict[str, AssertionError]]:
    """Check every result, then time the correct implementations interleaved.

    Returns:
        Samples by implementation, and errors by implementation for wrong results.
    Raises:
        AssertionError: the result of the peer is wrong; nothing is timed then.
    """

    def every(name: str, seconds: float) -> int:
        if name == "op":
            return 5 if seconds > OP_SECONDS else 1
        always = name == comparison.peer or name in comparison.ours
        return 1 if always or seconds < SLOW_SECONDS else 5

    with nullcontext() if comparison.gradient else torch.inference_mode():
        wrong = {}
        for name, call in comparison.calls.items():
            try:
                comparison.check(name, call())
            except AssertionError as error:
                wrong[name] = error
        if comparison.peer in wrong:
            raise wrong[comparison.peer]
        samples = time_interleaved(
            {name: call for name, call in comparison.calls.items() if name not in wrong},
            rounds=QUICK_ROUNDS if quick else ROUNDS,
            min_seconds=1e-4 if quick else 5e-4,
            every=every,
            device=device,
            launches=device == "cpu",
        )
    return samples, wrong


def record(
    op: str,
    case: Case,
    device: str,
    comparison: Comparison,
    samples: Mapping[str, Samples],
    limits: Peaks,
) -> dict[str, Any]:
    """One case of a result file, as plain values: sizes, work, limit, and each implementation's
    median and quartiles of seconds per call and of the peer's time over its own.
    """
    peer = samples[comparison.peer]
    limit_seconds, bound = limits.seconds(case.dtype, comparison.flop, comparison.moved)
    return {
        "op": op,
        "case": case.name,
        "device": device,
        "isa": _C.build_info()["isa"] if device == "cpu" else None,
        "threads": torch.get_num_threads() if device == "cpu" else None,
        "dtype": case.dtype,
        "shape": comparison.shape,
        "flop": comparison.flop,
        "bytes": comparison.moved,
        "bound": bound,
        "limit_seconds": limit_seconds,
        "peer": comparison.peer,
        "implementations": {
            name: {
                "ours": name in comparison.ours,
                "rounds": len(own.by_round),
                "iterations": own.iterations,
                "median": own.median,
                "quartiles": own.quartiles,
                "ratio_to_peer": median(ratios(peer, own)),
                "ratio_quartiles": quartiles(ratios(peer, own)),
            }
            for name, own in samples.items()
        },
    }


class Replay:
    """A clock for pytest-benchmark that replays the samples of :func:`run`.

    pytest-benchmark cannot interleave tests: it finishes one before the next, minutes apart. It
    reads this clock before and after each round, and so reports the interleaved samples.
    """

    def __init__(self) -> None:
        self._ticks: Iterator[float] = iter(())

    def load(self, samples: Samples) -> None:
        """Let the next rounds last as long as these samples."""
        now, ticks = 0.0, []
        for seconds in samples.seconds:
            ticks += [now, now + seconds]
            now += seconds
        self._ticks = iter(ticks)

    def __call__(self) -> float:
        return next(self._ticks)


replay = Replay()
