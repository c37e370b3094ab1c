"""Which backend was measured fastest, by op, device, dtypes and sizes: what "auto" goes by.

``winners.json`` is written by ``python -m benchmarks.winners`` from result files of the kernel
benchmarks and read once, when the first call needs it. An entry holds, for one op, kind of device
and dtypes, the measured cases: each a ranking of backends, fastest first. A request takes the
ranking of the nearest case: the least sum of |log2(asked / measured)| over the sizes that both
know, however far that is. Where several are equally near, the ranking that most of them have.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from variant_kernels import _C

if TYPE_CHECKING:
    from variant_kernels.dispatch.request import Request

# Fastest first, where nothing was measured. `reference` supports everything, so that a choice
# always exists.
PREFERENCE = ("triton", "cuda", "flash", "flashinfer", "flex", "cpu", "reference")
# All of them that "auto" can take for CPU tensors: to hear the others' reasons costs microseconds.
ON_CPU = ("cpu", "reference")

FORMAT = "variant-winners-1"
PATH = Path(__file__).with_name("winners.json")
# Numbers of a request by which cases may differ.
SIZES = ("head_dim", "row", "page_size", "rows", "queries", "keys")
# Requests whose order is kept: a program has some dozens, one with ragged batches has thousands.
MOST_REQUESTS = 4096


@dataclass(frozen=True)
class Case:
    """Backends measured side by side at some sizes.

    ranking: fastest first.  sources: result files.  sizes: by names of SIZES; empty where the
    ranking is the same at every size that was measured.
    """

    ranking: tuple[str, ...]
    sources: tuple[str, ...]
    sizes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """Cases of one op on one kind of device.

    device: as in a request.  kind: as :func:`device_kind` names it.  dtypes: of the request's, the
    first ones; all where every one of them matters.  gradient: whether a backward pass was part.
    """

    op: str
    device: str
    kind: str
    dtypes: tuple[str, ...]
    kv_dtype: str | None
    gradient: bool
    cases: tuple[Case, ...]

    def speaks_of(self, request: Request) -> bool:
        """Whether it was measured with the request's dtypes, with or without a gradient."""
        names = tuple(_name(dtype) for dtype in request.dtypes[: len(self.dtypes)])
        kv_dtype = None if request.kv_dtype is None else _name(request.kv_dtype)
        return (names, kv_dtype, request.gradient) == (self.dtypes, self.kv_dtype, self.gradient)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- the file -----------------------------------------------------------------------------------


def read(path: Path) -> list[Entry]:
    """The table in a file.

    Raises:
        ValueError: it is missing, broken or of another format; the message names the file.
    """
    help = "Install the package again, or write it anew: python -m benchmarks.winners"
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: is no table of winners: {error}. {help}") from error
    found = data.get("format") if isinstance(data, dict) else None
    if found != FORMAT:
        raise ValueError(
            f'{path}: "format" must be {FORMAT!r} to be read by this version; got {found!r}. {help}'
        )
    try:
        return [_entry(one) for one in data["entries"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path}: is broken as a table of winners ({reason}). {help}") from error


def _entry(data: dict[str, Any]) -> Entry:
    cases = tuple(
        Case(_ranking(one["ranking"]), _texts(one["sources"]), _sizes(one["sizes"]))
        for one in data["cases"]
    )
    if not cases:
        raise ValueError(f"no case of {data['op']}")
    return Entry(
        _text(data["op"]),
        _text(data["device"]),
        _text(data["kind"]),
        _texts(data["dtypes"]),
        None if data["kv_dtype"] is None else _text(data["kv_dtype"]),
        bool(data["gradient"]),
        cases,
    )


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a text, got {value!r}")
    return value


def _texts(values: object) -> tuple[str, ...]:
    if not isinstance(values, list) or not values:
        raise TypeError(f"expected a list of texts, got {values!r}")
    return tuple(_text(value) for value in values)


def _ranking(values: object) -> tuple[str, ...]:
    ranking = _texts(values)
    unknown = sorted(set(ranking) - set(PREFERENCE))
    if unknown or len(set(ranking)) < len(ranking):
        raise ValueError(f"expected some of {', '.join(PREFERENCE)}, each once; got {values!r}")
    return ranking


def _sizes(values: dict[str, Any]) -> dict[str, int]:
    for name, size in values.items():
        if name not in SIZES or type(size) is not int or size < 1:
            raise ValueError(f"expected sizes among {', '.join(SIZES)}, got {name} {size!r}")
    return values


# --- the device ---------------------------------------------------------------------------------


@cache
def device_kind(device: str) -> str | None:
    """What results are told apart by: ``"sm_90"`` of a GPU, the instruction set of a CPU.

    None: not known, or GPUs that differ are at hand (a request does not say which it is for).
    Raises:
        ValueError: ``VARIANT_CPU_ISA`` names an instruction set that is unknown or missing here.
    """
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


# --- looking up ---------------------------------------------------------------------------------


def preference(device: str) -> tuple[str, ...]:
    """Backends in the order in which they are asked where nothing was measured."""
    return ON_CPU if device == "cpu" else PREFERENCE


@cache
def _entries(device: str) -> dict[str, list[Entry]]:
    """By op: what was measured on such a device as is at hand."""
    found: dict[str, list[Entry]] = {}
    for entry in read(PATH):
        if (entry.device, entry.kind) == (device, device_kind(device)):
            found.setdefault(entry.op, []).append(entry)
    return found


@cache
def deciding(device: str) -> frozenset[str]:
    """Ops of which some request takes another order than the default; none looks up the rest."""
    default = preference(device)
    return frozenset(
        op
        for op, entries in _entries(device).items()
        for entry in entries
        for case in entry.cases
        if merge(case.ranking, default) != default
    )


def merge(ranking: Sequence[str], default: tuple[str, ...]) -> tuple[str, ...]:
    """All of ``default`` in the order of a ranking.

    What was not measured comes before plain torch, unless plain torch is the winner.
    """
    ranked = [name for name in ranking if name in default]
    if ranked[:1] == ["reference"]:
        return (*ranked, *(name for name in default if name not in ranked))
    place = ranked.index("reference") if "reference" in ranked else len(ranked)
    unknown = [name for name in default if name not in ranked]
    return (*ranked[:place], *unknown, *ranked[place:])


def find(op: str, request: Request) -> Case | None:
    """The case that a request goes by, or None where nothing alike was measured.

    Its sources are those of all cases that are equally near and agree.
    """
    for entry in _entries(request.device).get(op, ()):
        if entry.speaks_of(request):
            break
    else:
        return None
    distances = [_distance(case, request) for case in entry.cases]
    least = min(distances)
    near = [c for c, far in zip(entry.cases, distances, strict=True) if far - least < 1e-9]
    counts = Counter(case.ranking for case in near)

    def place(ranking: tuple[str, ...]) -> tuple[int, list[int]]:
        # Equally many: the one that departs least from the preference order.
        return -counts[ranking], [PREFERENCE.index(name) for name in ranking]

    best = min(counts, key=place)
    sources = dict.fromkeys(s for case in near if case.ranking == best for s in case.sources)
    return Case(best, tuple(sources))


def _distance(case: Case, request: Request) -> float:
    far = 0.0
    for name, size in case.sizes.items():
        asked = getattr(request, name)
        if asked is not None:
            far += abs(math.log2(max(asked, 1) / size))
    return far


@lru_cache(maxsize=MOST_REQUESTS)
def order(op: str, request: Request) -> tuple[str, ...]:
    """Backends in the order in which they are asked whether they can serve."""
    case, default = find(op, request), preference(request.device)
    return default if case is None else merge(case.ranking, default)


def forget() -> None:
    """Read the file and look at the devices anew at the next call."""
    for kept in (device_kind, _entries, deciding, order):
        kept.cache_clear()
