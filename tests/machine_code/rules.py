"""What must hold of every case, whatever the table says; exceptions carry a reason.

``exceptions.txt`` lists exceptions, one a line: rule, shell pattern of keys, Triton's version or
``*``, reason, separated by ``|``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

# Compares of a loop besides one for each entry of the tile, for bounds of the loop and its copies:
# 32 in most; one for each copy and 24 where small tiles have many copies, each with a predicate.
MORE_COMPARES, BESIDES_COPIES = 32, 24
EXCEPTIONS = Path(__file__).with_name("exceptions.txt")
ATTENTION = ("block_causal_attention", "paged_attention/")


@dataclass(frozen=True)
class Excused:
    """A rule that a case need not keep. pattern: of keys, a shell's.  triton: a version, or *."""

    rule: str
    pattern: str
    triton: str
    reason: str

    def holds_for(self, rule: str, key: str, version: str) -> bool:
        """Whether this exception is about the case."""
        return (
            rule == self.rule
            and fnmatchcase(key, self.pattern)
            and fnmatchcase(version, self.triton)
        )


def read_exceptions(text: str) -> list[Excused]:
    """Parse ``exceptions.txt``.

    Raises:
        ValueError: a line has no rule, pattern, version or reason.
    """
    found = []
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        parts = [part.strip() for part in line.split("|")]
        if len(parts) != 4 or not all(parts) or parts[0] not in RULES:
            raise ValueError(
                "exceptions.txt: a line is `rule | pattern of keys | Triton's version or * | "
                f"reason`, with a rule of {', '.join(RULES)}; got {line!r}"
            )
        found.append(Excused(*parts))
    return found


def _tensor_cores(key: str, elements: int, figures: Mapping[str, Any]) -> Iterator[str]:
    """Attention multiplies on the tensor cores, by wgmma where a tile has 64 rows or more."""
    if not key.startswith(ATTENTION):
        return
    if not figures["loops"]:
        yield "no loop computes products on the tensor cores"
    tile = re.search(r"(\d+) x (\d+)", key)
    # In dK and dV a tile of keys has the place of the queries.
    rows = int(tile.group(2 if "_dkv/" in key else 1)) if tile else 64
    for number, loop in enumerate(figures["loops"]):
        if rows >= 64 and not loop.get("HGMMA"):
            yield f"loop {number}: no HGMMA (wgmma), {loop.get('HMMA', 0)} HMMA"


def _registers_only(key: str, elements: int, figures: Mapping[str, Any]) -> Iterator[str]:
    """No loop of products reads or writes local memory: such a loop spills."""
    for number, loop in enumerate(figures["loops"]):
        if loop.get("LDL") or loop.get("STL"):
            yield f"loop {number}: {loop.get('LDL', 0)} LDL, {loop.get('STL', 0)} STL; expected 0"


def _no_stack(key: str, elements: int, figures: Mapping[str, Any]) -> Iterator[str]:
    """No kernel has a stack: Triton's hold spills only."""
    if figures["stack"]:
        yield f"{figures['stack']} bytes; expected 0"


def _compares(key: str, elements: int, figures: Mapping[str, Any]) -> Iterator[str]:
    """A mask costs one compare of integers for each entry of the tile, in 32 bits."""
    for number, loop in enumerate(figures["loops"]):
        copies = loop.get("LDGSTS", 0) + loop.get("LDG", 0)
        more = max(MORE_COMPARES, BESIDES_COPIES + copies)
        if loop.get("ISETP", 0) > elements + more:
            yield (
                f"loop {number}: {loop['ISETP']} ISETP; expected at most "
                f"{elements} (entries of a thread) + {more} ({copies} copies)"
            )


def _loads_ahead(key: str, elements: int, figures: Mapping[str, Any]) -> Iterator[str]:
    """Attention's loops copy asynchronously, and at least one group stays in flight at a wait.

    A wait for all groups may follow in the code behind a loop, not inside it.
    """
    if not key.startswith(ATTENTION):
        return
    if not figures["waits"]:
        yield "no loop waits for asynchronous copies: nothing is loaded ahead"
    for number, groups in enumerate(figures["waits"]):
        if groups == 0:
            yield f"async_wait {number} in a loop leaves 0 groups in flight; expected 1 or more"


def _fits(key: str, elements: int, figures: Mapping[str, Any]) -> Iterator[str]:
    """A processor holds a program: its registers and its shared memory suffice."""
    if figures["programs"] < 1:
        yield (
            f"{figures['registers']} registers and {figures['shared']} bytes of shared memory fit "
            "no processor; the launch would fail"
        )


def _wide_loads(key: str, elements: int, figures: Mapping[str, Any]) -> Iterator[str]:
    """Attention copies keys and values 16 bytes at a time."""
    if key.startswith(ATTENTION) and not figures["global"].get("load 128"):
        yield "no load of 16 bytes"


RULES = {
    "fits": _fits,
    "tensor-cores": _tensor_cores,
    "registers-only": _registers_only,
    "no-stack": _no_stack,
    "compares": _compares,
    "loads-ahead": _loads_ahead,
    "wide-loads": _wide_loads,
}


@dataclass(frozen=True)
class Violation:
    """A rule that a case does not keep."""

    rule: str
    key: str
    text: str


def violations(key: str, elements: int, figures: Mapping[str, Any]) -> list[Violation]:
    """Every rule that the figures of a case do not keep; ``elements``: of a tile, per thread."""
    return [
        Violation(name, key, text)
        for name, rule in RULES.items()
        for text in rule(key, elements, figures)
    ]


def unexcused(
    found: Sequence[Violation], exceptions: Sequence[Excused], version: str
) -> list[Violation]:
    """The violations that no exception covers."""
    return [
        one for one in found if not any(e.holds_for(one.rule, one.key, version) for e in exceptions)
    ]
