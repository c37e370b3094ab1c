"""Words of messages."""

from __future__ import annotations


def counted(count: float, noun: str) -> str:
    """A number and its noun: ``1 image``, ``1,024 images``, ``2 batches``, ``1.5 epochs``.

    Args:
        noun: in the singular; words before it stay as they are.
    """
    if count != 1:
        if noun.endswith(("s", "x", "sh", "tch")):
            noun += "es"
        elif noun.endswith("y") and noun[-2] not in "aeiou":
            noun = f"{noun[:-1]}ies"
        else:
            noun += "s"
    return f"{count:,} {noun}" if isinstance(count, int) else f"{count:g} {noun}"
