"""Words of messages."""

from __future__ import annotations

import operator
from typing import SupportsIndex


def counted(count: SupportsIndex | float, noun: str) -> str:
    """A number and its noun: ``1 image``, ``1,024 images``, ``2 batches``, ``1.5 epochs``.

    Args:
        count: an integer of Python, numpy or torch (in a graph of symbolic sizes too), or a float.
        noun: in the singular; words before it stay as they are.
    """
    try:
        number = f"{operator.index(count):,}"  # pyright: ignore[reportArgumentType]
    except TypeError:
        number = f"{count:g}"
    if count != 1:
        if noun.endswith(("s", "x", "sh", "tch")):
            noun += "es"
        elif noun.endswith("y") and noun[-2] not in "aeiou":
            noun = f"{noun[:-1]}ies"
        else:
            noun += "s"
    return f"{number} {noun}"
