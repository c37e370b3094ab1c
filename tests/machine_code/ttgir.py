"""Read Triton's GPU dialect (TTGIR): which waits for asynchronous copies stand in a loop."""

from __future__ import annotations

import re

_LOOP = re.compile(r"^(\s*)(?:%[^=]*=\s*)?scf\.(?:for|while)\b")
_WAIT = re.compile(r"\bttg\.async_wait\b.*\{[^{}]*\bnum = (\d+)")


def waits_in_loops(text: str) -> list[int]:
    """Groups of copies that each ``async_wait`` in a loop leaves in flight, in the text's order.

    0 means that the loop waits for what it has just begun to copy: nothing is loaded ahead.

    Raises:
        ValueError: a wait cannot be read.
    """
    open_loops: list[int] = []
    found: list[int] = []
    for line in text.splitlines():
        stripped = line.lstrip()
        depth = len(line) - len(stripped)
        # A loop ends with a brace in its own column. MLIR indents what is inside by two.
        if open_loops and depth <= open_loops[-1] and stripped.startswith("}"):
            if not stripped.startswith("} do"):  # the second half of scf.while
                open_loops.pop()
        elif match := _LOOP.match(line):
            open_loops.append(len(match.group(1)))
        elif "ttg.async_wait" in line:
            match = _WAIT.search(line)
            if match is None:
                raise ValueError(f"ttgir: a wait without a number: {stripped}")
            if open_loops:
                found.append(int(match.group(1)))
    return found
