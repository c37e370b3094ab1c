"""The committed figures: reading, comparing and writing ``expected/triton-VERSION.json``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "expected"
COMMAND = "make sass SASS='{key}'"
# Relative: a compiler's scheduler moves a few instructions when a line is rewritten.
TOLERANCE = 0.05
WITHIN_TOLERANCE = ("instructions", "registers")

Figures = dict[str, Any]


def path_for(version: str) -> Path:
    """The table of one version of Triton."""
    return FOLDER / f"triton-{version}.json"


def read(version: str) -> dict[str, Figures]:
    """The figures by key; empty if the version has no table."""
    path = path_for(version)
    return json.loads(path.read_text())["cases"] if path.exists() else {}


def write(version: str, cases: Mapping[str, Figures]) -> None:
    """Replace the table: one line for each case, so that a diff shows what changed."""
    lines = [f"  {json.dumps(key)}: {json.dumps(cases[key])}" for key in sorted(cases)]
    head = f'{{\n "triton": "{version}",\n "target": "sm_90",\n "dtype": "bf16",\n "cases": {{\n'
    path_for(version).write_text(head + ",\n".join(lines) + "\n }\n}\n")


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(quantity, number) of everything in the figures: ``loops[0].ISETP``."""
    if isinstance(value, Mapping):
        for part, inner in value.items():
            yield from _leaves(inner, f"{name}.{part}" if name else part)
    elif isinstance(value, list):
        yield f"number of {name}", len(value)
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{name}[{index}]")
    else:
        yield name, value


def differences(
    expected: Mapping[str, Any], got: Mapping[str, Any], *, tolerance: float = TOLERANCE
) -> list[str]:
    """One line for each quantity that differs: instructions and registers by more than tolerance.

    ISETP, MUFU and other counts in a loop must be equal: a program that is the same compiles to the
    same code, so a difference is a change of the kernel or of the compiler.
    """
    left, right = dict(_leaves(expected)), dict(_leaves(got))
    lines = []
    for name in dict.fromkeys((*left, *right)):
        before, after = left.get(name, 0), right.get(name, 0)
        slack = tolerance * before if name.rpartition(".")[2] in WITHIN_TOLERANCE else 0
        if abs(after - before) > slack:
            change = f" ({(after - before) / before:+.1%})" if before else ""
            lines.append(f"{name}: expected {before}, got {after}{change}")
    return lines


def complaint(key: str, version: str, lines: list[str]) -> str:
    """The message of a failed comparison: the case, each quantity, and the command to run."""
    command = COMMAND.format(key=key)
    return "\n  ".join([
        f"{key} (Triton {version}):",
        *lines,
        f"to accept it, run `{command} WRITE=1` and commit the tables with the change",
    ])  # fmt: skip
