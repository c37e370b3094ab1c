"""Predicted times on an H200 of the cases that have a target; nothing here is a measurement.

    python -m benchmarks.predict                     # the table of predictions
    python -m benchmarks.predict --run results.json  # with a run's measurements beside them
    python -m benchmarks.predict --fit results.json  # the model's constants from a run on a GPU

The model is in ``benchmarks/prediction``; each module says what it counts and which published
figures it is calibrated on. The constants are in ``prediction/constants.json``; ``source`` says
where they come from.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.prediction.constants import CONSTANTS, Constants, constants
from benchmarks.prediction.fit import fit
from benchmarks.prediction.generation import generation, linear_ceiling
from benchmarks.prediction.times import (
    DEPTHS,
    DIRECTIONS,
    FLASH,
    FLASHINFER,
    FLEX,
    FULL,
    PAGED_FLOP,
    TORCH,
    TORCH_CALLS,
    TRAINING_BATCH,
    TRITON,
    Times,
    attention_flop,
    measured,
    predicted,
)
from benchmarks.results import RUN, Result, read
from variant.errors import UserError
from variant.files import atomic_write

ROOT = Path(__file__).parents[1]
NOT_MEASURED, NOT_MODELLED = "not yet measured", "not modelled"


@dataclass(frozen=True)
class Quantity:
    """A quantity of the table; ``value`` computes it from seconds by name, predicted or measured.

    target: as text; empty where there is none.  digits: behind the point.
    """

    name: str
    target: str
    unit: str
    value: Callable[[Times], float]
    digits: int = 0

    def of(self, times: Times) -> float | None:
        """The value; None if a time is missing."""
        try:
            return self.value(times)
        except KeyError:
            return None

    def missed_by(self, value: float) -> bool:
        """Whether a value is on the wrong side of a target that is a number."""
        match = re.match(r"at (most|least) ([\d.]+)", self.target)
        if match is None:
            return self.target == "faster" and value <= 1
        bound = float(match[2])
        # To the digits that are shown.
        shown = round(value, self.digits)
        return shown > bound if match[1] == "most" else shown < bound


@dataclass(frozen=True)
class Case:
    """One line of the table.

    predicted: None where the model has no part for it.  measured: the value of a run; None where
    there is none.
    """

    quantity: Quantity
    predicted: float | None
    measured: float | None = None

    @property
    def name(self) -> str:
        """Of its quantity."""
        return self.quantity.name

    def cells(self) -> list[str]:
        """Name, target, predicted, measured."""
        predicted = self._text(self.predicted, NOT_MODELLED)
        measured = self._text(self.measured, NOT_MEASURED)
        return [self.name, self.quantity.target, predicted, measured]

    def _text(self, value: float | None, absent: str) -> str:
        if value is None:
            return absent
        return f"{value:,.{self.quantity.digits}f} {self.quantity.unit}"


def _ms(name: str) -> Callable[[Times], float]:
    return lambda times: 1e3 * times[name]


def _ratio(slower: str, faster: str) -> Callable[[Times], float]:
    return lambda times: times[slower] / times[faster]


def _generations() -> list[Quantity]:
    found = [
        Quantity("batch 1, full depth", "at most 13 ms", "ms", _ms("generation 1 30"), 1),
        Quantity(
            "batch 1, full depth, with the decoder", "at most 16 ms", "ms", _ms("images 1 30"), 1
        ),
        Quantity(
            "batch 64, full depth, over its products alone",
            "at most 1.25 times",
            "times",
            _ratio("generation 64 30", "gemms 64 30"),
            2,
        ),
        Quantity(
            "batch 64, full depth, as fast as the original",
            "at least 1.6 times",
            "times",
            _ratio("original 64", "generation 64 30"),
            2,
        ),
    ]
    for depth in DEPTHS:
        name = "full depth" if depth == FULL else f"depth {depth}"
        found += [
            Quantity(f"batch 64, {name}", "", "ms", _ms(f"generation 64 {depth}")),
            Quantity(f"batch 64, {name}, with the decoder", "", "ms", _ms(f"images 64 {depth}")),
        ]
    return [
        *found,
        *(_linear_share(depth) for depth in DEPTHS if depth != FULL),
        Quantity("batch 64, a change of depth", "at most 1 ms", "ms", _ms("switch 64"), 2),
        Quantity(
            "batch 64, K/V bytes, over those of the plan",
            "at most 1 times",
            "times",
            _ratio("kv allocated 64", "kv planned 64"),
            3,
        ),
    ]


def _linear_share(depth: int) -> Quantity:
    speed_up = _ratio(f"generation 64 {FULL}", f"generation 64 {depth}")
    return Quantity(
        f"batch 64, depth {depth}, of the linear-work ratio",
        "at least 90 %",
        "%",
        lambda times: 100 * speed_up(times) / linear_ceiling(depth),
        1,
    )


_ATTENTION_TARGETS = (
    ("2240", "forward", 340),
    ("2240", "backward", 300),
    ("680", "forward", 300),
    ("680", "backward", 260),
)


def _attention_rate(length: str, direction: str) -> Callable[[Times], float]:
    def rate(times: Times) -> float:
        forward = times[f"attention {length} forward {TRITON}"]
        seconds = forward
        if direction == "backward":
            # What is measured is both passes.
            seconds = times[f"attention {length} forward+backward {TRITON}"] - forward
        return attention_flop(length, direction) / seconds / 1e12

    return rate


def _kernels() -> list[Quantity]:
    found = [
        Quantity(
            f"block-causal attention, D 64, L {length}, {direction}",
            f"at least {target} TFLOP/s",
            "TFLOP/s",
            _attention_rate(length, direction),
        )
        for length, direction, target in _ATTENTION_TARGETS
    ]
    found += [
        Quantity(
            f"the same, L {length}, {direction}, as fast as FlexAttention ({name})",
            "faster",
            "times",
            _ratio(f"attention {length} {direction} {peer}",
                   f"attention {length} {direction} {TRITON}"),
            2,
        )
        for peer, name in ((FLEX, "Triton"), (FLASH, "FLASH"))
        for length in ("2240", "680")
        for direction in DIRECTIONS
    ]  # fmt: skip
    paged, sampling = "paged attention, last scale, batch 64", "sampling, last scale, batch 64"
    return [
        *found,
        Quantity(paged, "", "TFLOP/s", lambda times: PAGED_FLOP / times[f"paged {TRITON}"] / 1e12),
        Quantity(
            f"{paged}, as fast as torch on contiguous K and V",
            "faster",
            "times",
            _ratio(f"paged {TORCH}", f"paged {TRITON}"),
            2,
        ),
        Quantity(
            f"{paged}, as fast as FlashInfer",
            "faster",
            "times",
            _ratio(f"paged {FLASHINFER}", f"paged {TRITON}"),
            2,
        ),
        Quantity(sampling, "", "ms", _ms(f"sampling {TRITON}"), 2),
        Quantity(
            f"{sampling}, as fast as torch's calls",
            "at least 10 times",
            "times",
            _ratio(f"sampling {TORCH_CALLS}", f"sampling {TRITON}"),
            1,
        ),
    ]


def _training() -> list[Quantity]:
    name = f"training step, batch {TRAINING_BATCH}"
    return [
        Quantity(f"{name}, full depth", "", "ms", _ms("training 30")),
        Quantity(
            f"{name}, full depth, as fast as the original",
            "at least 1.3 times",
            "times",
            _ratio("training original", "training 30"),
            2,
        ),
        Quantity(
            f"{name}, depth 16, as fast as the original",
            "at least 1.5 times",
            "times",
            _ratio("training original", "training 16"),
            2,
        ),
        Quantity(
            f"{name}, depth 16, as fast as full depth",
            "at least 1.5 times",
            "times",
            _ratio("training 30", "training 16"),
            2,
        ),
    ]


def quantities() -> list[Quantity]:
    """The lines of the table."""
    return _generations() + _kernels() + _training()


def cases(c: Constants, run: Mapping[str, Any] | None = None) -> list[Case]:
    """The targets with their predictions and, from a run on a GPU, what was measured."""
    own, times = predicted(c), {} if run is None else measured(run)
    return [Case(one, one.of(own), one.of(times)) for one in quantities()]


def limits(c: Constants) -> dict[str, str]:
    """What limits the quantities that are predicted to miss their target, by the model's parts."""
    one, many = generation(c, 1, FULL), generation(c, 64, FULL)
    ms = {name: 1e3 * seconds for name, seconds in asdict(one).items()}
    batch_1 = (
        f"{ms['gemms']:.1f} ms are products with weights, which would have to take "
        f"{13 - sum(ms[name] for name in ('attention', 'rows', 'rest')):.1f}: those of the first "
        f"seven scales read all weights for few rows, those of the last three have 200 to 512 "
        f"rows, which leave processors idle. Attention takes {ms['attention']:.1f}, kernels "
        f"bound by memory {ms['rows']:.1f} (a launch is at least "
        f"{1e6 * c.row_seconds:.1f} us), the rest {ms['rest']:.1f}. Fewer launches do not suffice; "
        f"products of few rows would need kernels of their own"
    )
    return {
        "batch 1, full depth": batch_1,
        "batch 1, full depth, with the decoder": (
            f"The limits are those without it; the decoder takes {ms['decoder']:.1f} ms"
        ),
        "batch 64, full depth, as fast as the original": (
            f"{1e3 * many.gemms:.0f} of our {1e3 * many.tokens:.0f} ms are products, the same on "
            "both sides"
        ),
    }


def misses(c: Constants) -> list[str]:
    """One line for each target that is predicted to be missed: by how much, and why."""
    why = limits(c)
    return [
        f"{case.name}: {case.cells()[2]}, target {case.quantity.target}. "
        f"{why.get(case.name, 'Its limit is not known')}."
        for case in cases(c)
        if case.predicted is not None and case.quantity.missed_by(case.predicted)
    ]


def text(found: Sequence[Case]) -> str:
    """The table for a terminal."""
    lines = [("what", "target", "predicted", "measured"), *(tuple(x.cells()) for x in found)]
    widths = [max(len(line[i]) for line in lines) for i in range(4)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def run_of(results: Iterable[Result]) -> Result | None:
    """The run on a GPU among some results, if there is one."""
    return next((result for result in results if result.kind == RUN), None)


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.predict", description=__doc__)
    parser.add_argument("--run", type=Path, help="show this run's measurements beside them")
    parser.add_argument("--fit", type=Path, metavar="RUN", help="fit the constants to this run")
    parser.add_argument("--out", type=Path, default=CONSTANTS, help="where --fit writes")
    options = parser.parse_args(arguments)
    try:
        c, run, path = constants(), None, options.fit or options.run
        if path is not None:
            result = read(path)
            if result.kind != RUN:
                raise UserError(f"{path}: must be a run on a GPU; got {result.kind}")
            run = result.data
        if options.fit is not None:
            c = fit(c, run or {}, f"fitted to {options.fit.name}")
            with atomic_write(options.out) as temporary:
                temporary.write_text(json.dumps(asdict(c), indent=1) + "\n")
    except UserError as error:
        print(f"benchmarks.predict: {error}", file=sys.stderr)
        return 1
    print(f"Predicted for one H200; {c.source}.\n\n{text(cases(c, run))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
