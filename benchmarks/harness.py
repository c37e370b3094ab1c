"""One case of one op: its contenders take turns, their answers are checked before, work counted.

A bench file lists ``CASES`` and ``PEERS`` and builds a :class:`Contest` from a case; everything
else is done here and in ``conftest.py``.
"""

from __future__ import annotations

import functools
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

from variant.bench.alternate import Call, Samples, alternate, quartiles, ratios
from variant.bench.limits import Limits
from variant_kernels import _C
from variant_kernels.dispatch.request import Request
from variant_kernels.dispatch.select import Backend
from variant_kernels.dispatch.support import BACKENDS

# The rule by which tests judge: one copy of it.
sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "kernels"))
from compare import Tally

ROUNDS, QUICK_ROUNDS = 20, 4
# Contenders that are neither ours nor the peer are timed in every fifth round if they take longer.
SLOW_SECONDS = 0.1
# The checks and the dispatch of a public function cost microseconds: beyond this time one cannot
# tell it from its launcher, and it is timed in every fifth round too.
OP_SECONDS = 0.005


@dataclass(frozen=True)
class Case:
    """name: what pytest shows and what result files are compared by.  dtype: whose GEMM rate is
    the limit.  settings: what the bench file builds it from.  quick: part of a ``--quick`` run.
    devices: where it is run.
    """

    name: str
    dtype: str
    settings: Mapping[str, Any]
    quick: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")


Check = Callable[[str, Any], None]

# Clones of other people's code that take part: name to folder, from options such as --hmar-repo.
REPOSITORIES: dict[str, Path] = {}


@dataclass
class Contest:
    """What takes turns in one case.

    shape: sizes, for the reader.  flop: operations that must be done (visible pairs only).
    moved: bytes that must be read or written.  calls: contenders by name.  missing: others, with
    the reason.  peer: the contender to which all are compared.  ours: which contenders are ours.
    check: raises AssertionError if a contender's answer is too far from float64.  gradient:
    whether autograd is part of the work; else all runs in inference mode, as the engine does.
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
    """(name, implementation, reason why it cannot serve) of every backend that the op has."""
    for name in BACKENDS:
        if name in impls:
            yield name, impls[name], impls[name].unsupported(request)


@functools.cache
def _device_kind(device: str) -> str | None:
    """``"sm_90"`` of a GPU, the instruction set of a CPU; None where GPUs of several kinds are."""
    if device == "cpu":
        return _C.build_info()["isa"]
    if device != "cuda" or not torch.cuda.is_available():
        return None
    kinds = {_gpu_kind(index) for index in range(torch.cuda.device_count())}
    return kinds.pop() if len(kinds) == 1 else None


def _gpu_kind(index: int) -> str:
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def missing_module(name: str) -> str | None:
    """The reason for a skip, if a peer's package is not installed."""
    if importlib.util.find_spec(name.replace("-", "_")) is None:
        return f"{name} is not installed"
    return None


def near(
    exact: Sequence[Tensor],
    plain: Sequence[Tensor],
    *,
    ours: Sequence[str],
    times: Sequence[float] = (2.0,),
    pick: Callable[[str, Any], Sequence[Tensor]] = lambda name, answer: (answer,),
) -> Check:
    """The tests' rule: at most twice plain torch's error against float64, plus one last place.

    Peers only have to compute the same thing: eight times.

    Args:
        times: another factor than two, for each result (the tests allow three for gradients).
        pick: (contender, its answer) -> the tensors that ``exact`` and ``plain`` stand for.
    """

    def check(name: str, answer: Any) -> None:
        tally = Tally()
        factors = list(times) * (len(exact) // len(times))
        results = zip(pick(name, answer), plain, exact, factors, strict=True)
        for index, (got, usual, wanted, factor) in enumerate(results):
            allowed = factor if name in ours else 8.0
            tally.add(f"{name}, result {index}", got, usual, wanted, times=allowed)
        tally.check()

    return check


def run(
    contest: Contest, *, device: str, quick: bool
) -> tuple[dict[str, Samples], dict[str, AssertionError]]:
    """Check every answer, then let those alternate that are right.

    Returns:
        Samples of the contenders, and the errors of those that compute something else.
    Raises:
        AssertionError: the peer computes something else; nothing is timed then.
    """

    def every(name: str, seconds: float) -> int:
        if name == "op":
            return 5 if seconds > OP_SECONDS else 1
        first = name == contest.peer or name in contest.ours
        return 1 if first or seconds < SLOW_SECONDS else 5

    with nullcontext() if contest.gradient else torch.inference_mode():
        wrong = {}
        for name, call in contest.calls.items():
            try:
                contest.check(name, call())
            except AssertionError as error:
                wrong[name] = error
        if contest.peer in wrong:
            raise wrong[contest.peer]
        samples = alternate(
            {name: call for name, call in contest.calls.items() if name not in wrong},
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
    contest: Contest,
    samples: Mapping[str, Samples],
    name: str,
    limits: Limits,
) -> dict[str, Any]:
    """What one contender's ``extra_info`` holds: plain values, seconds, rates, ratios."""
    own, peer = samples[name], samples[contest.peer]
    against = ratios(peer, own)
    shortest, bound = limits.seconds(case.dtype, contest.flop, contest.moved)
    return {
        "op": op,
        "case": case.name,
        "device": device,
        "contender": name,
        "ours": name in contest.ours,
        "isa": _C.build_info()["isa"] if device == "cpu" else None,
        "kind": _device_kind(device),
        "threads": torch.get_num_threads() if device == "cpu" else None,
        "dtype": case.dtype,
        "shape": contest.shape,
        "flop": contest.flop,
        "bytes": contest.moved,
        "rounds": len(own.by_round),
        "iterations": own.iterations,
        "median": own.median,
        "quartiles": own.quartiles,
        "peer": contest.peer,
        "peer_median": peer.median,
        "ratio_to_peer": median(against),
        "ratio_quartiles": quartiles(against),
        "achieved_flops": contest.flop / own.median,
        "achieved_bandwidth": contest.moved / own.median,
        "bound": bound,
        "limit_seconds": shortest,
        "share_of_limit": shortest / own.median,
    }


class Replay:
    """A clock for pytest-benchmark that shows samples taken before, while others took turns.

    pytest-benchmark runs one test to its end before the next, minutes apart; what it reports here
    was measured by :func:`run`. It reads the clock before and after each round.
    """

    def __init__(self) -> None:
        self._ticks: Iterator[float] = iter(())

    def load(self, samples: Samples) -> None:
        """The next rounds last as long as these samples."""
        now, ticks = 0.0, []
        for seconds in samples.seconds:
            ticks += [now, now + seconds]
            now += seconds
        self._ticks = iter(ticks)

    def __call__(self) -> float:
        return next(self._ticks)


replay = Replay()
