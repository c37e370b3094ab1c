"""Result files: JSON with one case a line, so that two of them can be compared by ``diff``.

Torch is imported only to write a file: ``variant plan --json -`` must not wait for it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from variant.paths import json_text

# The last digits of a double are noise in every measurement.
SIGNIFICANT_DIGITS = 7


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result file; an existing one is replaced as a whole.

    Args:
        result: plain values; each item of its lists takes one line, every other value one line.
    Raises:
        UserError: the folder cannot be written.
    """
    from variant.files import atomic_write

    with atomic_write(path) as temporary:
        temporary.write_text(result_text(result))


def result_text(result: Mapping[str, Any]) -> str:
    """The text of a result file: floats are rounded to ``SIGNIFICANT_DIGITS``.

    JSON has no number for what is not finite: it becomes the text "Infinity", "-Infinity" or "NaN",
    which ``float`` reads.
    """
    fields = []
    for name, value in result.items():
        if isinstance(value, list) and value:
            items = ",\n".join(f"  {json_text(_rounded(item))}" for item in value)
            fields.append(f" {json.dumps(name)}: [\n{items}\n ]")
        else:
            fields.append(f" {json.dumps(name)}: {json_text(_rounded(value))}")
    return "{\n" + ",\n".join(fields) + "\n}\n"


def _rounded(value: Any) -> Any:
    if isinstance(value, float) and math.isfinite(value):
        return float(f"{value:.{SIGNIFICANT_DIGITS}g}")
    if isinstance(value, Mapping):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value
